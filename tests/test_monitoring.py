"""deploy/monitoring with the real parts: promtool, and a Prometheus that scrapes baked services in trouble."""

import contextlib
import http.client
import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import yaml
from serving import CLEAN, free_port, postgres, run, served

RULES = "deploy/monitoring/alerts.yml"
DASHBOARD = "deploy/monitoring/grafana/dashboard.json"
# The rules look at minutes. The real Prometheus of this test looks at seconds.
SHORTER = {"1m": "4s", "5m": "20s", "1h": "30s"}
FIRES_WITHIN_SECONDS = 300
# The service with views that hang, that are slow, and that take a second connection.
VIEWS = """
import time
from app import create_app
app = create_app()
db = app.extensions["flask_pooling"].db

@app.get("/hang")
def hang():
    time.sleep(600)

@app.get("/slow")
def slow():
    time.sleep(0.5)
    return "slow"

@app.get("/open")
def connect():
    with db.engine.connect():
        time.sleep(0.5)
    return "open"

@app.get("/two")
def two():
    with db.engine.connect():
        time.sleep(0.5)
        with db.engine.connect():
            return "two"
"""
LEAST = {
    "APP_ENV": "production",
    "SECRET_KEY": "f3a9c1d07b6e4825" * 4,
    "DB_BUDGET_CHECK": "off",
    "DB_CONNECT_TIMEOUT": "2",
    "DB_POOL_TIMEOUT": "2",
    "DB_STATEMENT_TIMEOUT": "2.5",
    "WEB_TIMEOUT": "3",
    "WEB_GRACEFUL_TIMEOUT": "3",
    "WEB_CONCURRENCY": "1",
    "WEB_THREADS": "2",
}


def promtool(*words: str | Path) -> None:
    done = subprocess.run(["promtool", *words], env=CLEAN, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def alerts(project: Path) -> dict[str, Any]:
    """Return the rules by name."""
    groups = yaml.safe_load((project / RULES).read_text())["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def test_the_files_are_what_prometheus_takes(project: Path):
    promtool("check", "config", project / "deploy/monitoring/prometheus.yml")
    promtool("check", "rules", project / RULES)


# What Prometheus has stored each 15 seconds, by what the alert is about: when it fires, and when it must not.
PLANNED = {
    'db_connections_planned{job="app",instance="a"}': "24x40",
    'db_connections_budget{job="app",instance="a"}': "87x40",
}
SLOTS = {'web_slots{job="app",instance="a"}': "4x40"}
ANSWERS = 'http_request_seconds_count{{job="app",instance="a",status="{}"}}'
BUCKET = 'http_request_seconds_bucket{{job="app",instance="a",le="{}"}}'
STORED = {
    "PlanOverBudget": (
        PLANNED | {'db_connections_budget{job="app",instance="b"}': "20x40"},
        PLANNED | {'db_connections_budget{job="another",instance="b"}': "20x40"},
    ),
    "MoreInstancesThanPlanned": (
        PLANNED | {f'db_pool_capacity{{job="app",instance="{name}"}}': "12x40" for name in "abc"},
        PLANNED | {f'db_pool_capacity{{job="app",instance="{name}"}}': "12x40" for name in "ab"},
    ),
    "ConnectionsNearBudget": (
        PLANNED | {'db_connections_open{job="app",instance="a",process="web"}': "70x40"},
        PLANNED
        | {
            'db_connections_open{job="app",instance="a",process="web"}': "69x40",
            'db_connections_open{job="app",instance="a",process="worker"}': "10x40",
        },
    ),
    "AllSlotsBusy": (
        SLOTS | {'web_slots_busy{job="app",instance="a"}': "4x40"},
        SLOTS | {'web_slots_busy{job="app",instance="a"}': "4 4 4 2 4 4 4 2 4 4 4 2 4 4 4 2 4 4 4 2 4 4 4 2 4 4 4 2"},
    ),
    "WaitsForConnection": (
        {'db_pool_wait_seconds_count{job="app",instance="a"}': "0x12 1x27"},
        {'db_pool_wait_seconds_count{job="app",instance="a"}': "7x40"},
    ),
    "RequestsPastLimit": (
        {'web_requests_over_limit_total{job="app",instance="a"}': "0x12 1x27"},
        {'web_requests_over_limit_total{job="app",instance="a"}': "7x40"},
    ),
    "InstanceDown": ({'up{job="app",instance="a"}': "0x40"}, {'up{job="app",instance="a"}': "1x40"}),
    "ErrorRate": (
        {ANSWERS.format(status): f"0+{count}x40" for status, count in ((200, 98), (503, 1), (500, 1))},
        {ANSWERS.format(status): f"0+{count}x40" for status, count in ((200, 998), (404, 900), (500, 1))},
    ),
    "Latency": (
        {BUCKET.format(le): f"0+{count}x40" for le, count in ((1, 94), (2.5, 100), ("+Inf", 100))},
        {BUCKET.format(le): f"0+{count}x40" for le, count in ((1, 96), (2.5, 100), ("+Inf", 100))},
    ),
    "WorkerReplaced": (
        {'web_workers_replaced_total{job="app",instance="a"}': "0x12 1x27"},
        {'web_workers_replaced_total{job="app",instance="a"}': "7x40"},
    ),
}


def test_each_alert_fires_when_it_should(project: Path, tmp_path: Path):
    """With the times as they are in the rules."""
    rules = alerts(project)
    assert STORED.keys() == rules.keys()
    tests = []
    for name, cases in STORED.items():
        labels = 'job="app"' if " by (job" in rules[name]["expr"] else 'instance="a",job="app"'
        severity = rules[name]["labels"]["severity"]
        fired = f'ALERTS{{alertname="{name}",alertstate="firing",{labels},severity="{severity}"}}'
        for stored, expected in zip(cases, ([{"labels": fired, "value": 1}], []), strict=True):
            series = [{"series": series, "values": values} for series, values in stored.items()]
            asked = {"expr": 'ALERTS{alertstate="firing"}', "eval_time": "6m", "exp_samples": expected}
            tests.append({"interval": "15s", "input_series": series, "promql_expr_test": [asked]})
    file = tmp_path / "rules.json"
    file.write_text(json.dumps({"rule_files": [str(project / RULES)], "evaluation_interval": "15s", "tests": tests}))
    promtool("test", "rules", file)


@dataclass
class Trouble:
    """One scenario: the instances of a service, what is asked of them, and which alerts that has to raise."""

    raises: set[str]
    path: str = "/api/notes"
    clients: int = 1
    again: bool = True  # the clients go on, or ask once
    instances: tuple[dict[str, str], ...] = ({},)
    may_raise: set[str] = field(default_factory=set)


TROUBLES = {
    "well": Trouble(set()),
    "busy": Trouble({"AllSlotsBusy"}, "/slow", clients=4),
    "waiting": Trouble({"WaitsForConnection"}, "/two", clients=2, again=False),
    "slow": Trouble({"RequestsPastLimit"}, "/hang", again=False),
    "hung": Trouble({"RequestsPastLimit", "WorkerReplaced"}, "/hang", 2, again=False, may_raise={"AllSlotsBusy"}),
    "more": Trouble({"MoreInstancesThanPlanned"}, instances=({"APP_INSTANCES": "1"},) * 2),
    "near": Trouble(
        {"ConnectionsNearBudget"}, "/open", 2, again=False,
        instances=({"APP_INSTANCES": "1", "DB_MAX_CONNECTIONS": "15"},),
    ),
    # One has been told of a server that is smaller than what the other may open.
    "unequal": Trouble({"PlanOverBudget"}, instances=({"WEB_THREADS": "4"}, {"DB_MAX_CONNECTIONS": "17"})),
}  # fmt: skip


def get(port: int, path: str, timeout: float) -> Any:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    with contextlib.closing(connection):
        connection.request("GET", path)
        return connection.getresponse().read()


@contextlib.contextmanager
def clients(trouble: Trouble, port: int) -> Iterator[None]:
    """Run as many clients as the scenario has, until the context ends."""
    over = threading.Event()

    def ask() -> None:
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                get(port, trouble.path, 12)
            if not trouble.again or over.wait(0.02):
                return

    threads = [threading.Thread(target=ask, daemon=True) for _ in range(trouble.clients)]
    for thread in threads:
        thread.start()
    yield
    over.set()


@contextlib.contextmanager
def prometheus(folder: Path, rules: str, targets: dict[str, list[int]]) -> Iterator[Callable[[str], Any]]:
    """Run a Prometheus that scrapes these ports; yield a function that asks its API for a path."""
    port, seconds = free_port(), "500ms"
    jobs = [
        {"job_name": job, "static_configs": [{"targets": [f"127.0.0.1:{port}" for port in ports]}]}
        for job, ports in targets.items()
    ]
    (folder / "alerts.yml").write_text(rules)
    (folder / "prometheus.yml").write_text(
        json.dumps(
            {
                "global": {"scrape_interval": seconds, "evaluation_interval": seconds},
                "rule_files": [str(folder / "alerts.yml")],
                "scrape_configs": jobs,
            }
        )
    )
    options = {"config.file": "prometheus.yml", "storage.tsdb.path": "data", "web.listen-address": f"127.0.0.1:{port}"}
    with (folder / "prometheus.log").open("w") as log:
        server = subprocess.Popen(
            ["prometheus", *(f"--{name}={value}" for name, value in options.items())],
            cwd=folder, env=CLEAN, stdout=log, stderr=log,
        )  # fmt: skip
        try:
            until = time.monotonic() + FIRES_WITHIN_SECONDS
            while server.poll() is None and time.monotonic() < until:
                with contextlib.suppress(OSError):
                    if b"is Ready" in get(port, "/-/ready", 1):
                        break
                time.sleep(0.1)
            assert server.poll() is None, (folder / "prometheus.log").read_text()
            yield lambda path: json.loads(get(port, path, 120))["data"]
        finally:
            server.terminate()
            server.wait(120)


def dashboard_expressions(project: Path) -> list[str]:
    board = json.loads((project / DASHBOARD).read_text())
    return [target["expr"] for panel in board["panels"] for target in panel["targets"]]


@pytest.fixture(scope="module")
def watched(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Callable[[str], Any], Any]]:
    """Every scenario at once, each a job of one Prometheus."""
    folder = tmp_path_factory.mktemp("monitoring")
    (folder / "troubled.py").write_text(VIEWS)
    rules = (installed / RULES).read_text()
    for long, short in SHORTER.items():
        rules = rules.replace(f"[{long}]", f"[{short}]").replace(f"for: {long}", f"for: {short}")
    targets: dict[str, list[int]] = {}
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(postgres(installed, tmp_path_factory.mktemp("data") / "data", "monitored"))
        environ = LEAST | {"DATABASE_URL": url}
        assert run("APP_ENV=production .venv/bin/python -m flask db upgrade", installed, **environ).returncode == 0
        environ["PYTHONPATH"] = str(folder)
        for job, trouble in TROUBLES.items():
            for more in trouble.instances:
                port = free_port()
                command = "exec .venv/bin/python -m gunicorn troubled:app"
                fails = job == "waiting"  # a pool that stays full is logged with its traceback
                stack.enter_context(served(command, installed, port, mistakes=fails, **environ | more))
                targets.setdefault(job, []).append(port + 1)
        api = stack.enter_context(prometheus(folder, rules, targets))
        # A counter has to be known before it moves.
        until = time.monotonic() + FIRES_WITHIN_SECONDS
        while len(api("/api/v1/query?query=web_slots")["result"]) < sum(map(len, targets.values())):
            assert time.monotonic() < until
            time.sleep(0.1)
        for job, trouble in TROUBLES.items():
            stack.enter_context(clients(trouble, targets[job][0] - 1))
        yield api, targets


def test_alerts_fire_in_their_scenario_and_in_no_other(watched: Any):
    api, _ = watched
    fired: dict[str, set[str]] = {job: set() for job in TROUBLES}
    expected = {job: trouble.raises for job, trouble in TROUBLES.items()}
    give_up = time.monotonic() + FIRES_WITHIN_SECONDS
    while not all(expected[job] <= fired[job] for job in TROUBLES):
        assert time.monotonic() < give_up, fired
        for alert in api("/api/v1/alerts")["alerts"]:
            if alert["state"] == "firing":
                fired[alert["labels"]["job"]].add(alert["labels"]["alertname"])
        time.sleep(0.2)
    for job, trouble in TROUBLES.items():  # where something is wrong, requests are slow or fail as well
        fired[job] -= trouble.may_raise | ({"Latency", "ErrorRate"} if trouble.raises else set())
    assert fired == expected


def test_the_dashboard_draws_something_everywhere(watched: Any, project: Path):
    """Every expression finds data in a service that serves."""
    api, _ = watched
    expressions = dashboard_expressions(project)
    assert len(expressions) >= 20
    for expression in expressions:
        asked = expression.replace("$job", "well").replace("$instance", ".*").replace("$__rate_interval", "10s")
        asked = asked.replace("[1h]", "[30s]")
        assert "$" not in asked
        found = api(f"/api/v1/query?query={quote(asked)}")["result"]
        assert [sample for sample in found if sample["value"][1] != "NaN"], f"{asked}: {found}"


def test_every_metric_is_one_that_the_service_has(watched: Any, project: Path):
    """A name that is misspelt would make an alert that never fires."""
    api, _ = watched
    known = set(api("/api/v1/label/__name__/values"))
    text = " ".join([*dashboard_expressions(project), *(rule["expr"] for rule in alerts(project).values())])
    used = set(re.findall(r"\b(?:web|db|http)_\w+", text))
    assert used <= known
    assert len(used) > 15
