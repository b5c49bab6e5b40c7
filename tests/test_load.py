"""`make load` as a person runs it, on a real server: what it prints, and when it fails."""

import contextlib
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import CLEAN, free_port, postgres, run, served


@pytest.fixture(scope="module")
def service(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with postgres(installed, tmp_path_factory.mktemp("load") / "data", "loaded") as url:
        environ = {"DATABASE_URL": url, "WEB_CONCURRENCY": "2", "WEB_THREADS": "2"}
        with served("exec make prod", installed, port := free_port(), **environ):
            yield port


def load(project: Path, port: int, words: str = "", **environ: str) -> tuple[int, str, dict[str, str]]:
    """The exit code, all that was printed, and the rows at the end by name."""
    done = run(f"make load {words}", project, PORT=str(port), **environ)
    rows = re.findall(r"^([a-z ]{12}) (.+)$", done.stdout, re.MULTILINE)
    return done.returncode, done.stdout, {name.strip(): text for name, text in rows}


def test_clients_that_wait_for_their_answers(service: int, installed: Path):
    """4 for each slot; none fails, no more connections are held than planned, and the report is there."""
    code, text, rows = load(installed, service, 'ARGS="--run-time 3s"')
    assert code == 0, text
    assert re.fullmatch(r"[1-9]\d+ good, 0 failed", rows["answers"])
    assert rows["rate"].endswith(" good answers a second, 16 clients")
    assert re.fullmatch(r"p50 \d+ ms, p95 \d+ ms, p99 \d+ ms", rows["latency"])
    assert re.fullmatch(r"[1-4] of 4 open at most", rows["connections"])
    assert "2 instances x 2 workers x (2 + 0) = 8 of 87" in rows["plan"]
    assert "<html" in Path(rows["report"]).read_text()[:500].lower()


def test_a_constant_rate(service: int, installed: Path):
    """As many requests as were asked for, whatever the answers take."""
    code, text, rows = load(installed, service, 'RATE=20 ARGS="--run-time 5s"')
    assert code == 0, text
    rate = float(rows["rate"].split()[0])
    assert 15 < rate < 25
    assert "20 offered" in rows["rate"]


NOTE = """
from locustfile import *
import time
from locust import events

@events.request.add_listener
def note(response_time, **_):
    with open("{file}", "a") as file:
        file.write(f"{{time.time() - response_time / 1000}} ")
"""


def test_a_rate_is_spread(service: int, installed: Path, tmp_path: Path):
    """Clients that all asked at the same time would wait for each other, and for nothing else."""
    own, times = tmp_path / "own.py", tmp_path / "times"
    own.write_text(NOTE.format(file=times))
    code, text, _ = load(installed, service, f'RATE=60 ARGS="--run-time 5s -f {own}"', PYTHONPATH=str(installed))
    assert code == 0, text
    tenths = Counter(int(float(line) * 10) for line in times.read_text().split())
    assert tenths.total() > 200
    assert max(tenths.values()) < 24, tenths  # 6 on average


@pytest.mark.parametrize("seconds", [0, 0.3, 1.5])
def test_ctrl_c_ends_it_with_what_was_found(service: int, installed: Path, seconds: float):
    """At once, whatever runs at that moment, and without a traceback."""
    environ = CLEAN | {"PORT": str(service), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        ["make", "load", "ARGS=--run-time 60s"], cwd=installed, env=environ, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout
            text = next(line for line in process.stdout if " clients for " in line)
            time.sleep(seconds)
            os.killpg(process.pid, signal.SIGINT)
            text += process.communicate(timeout=300)[0]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert "Traceback" not in text, text
    assert "slots        " in text, text


def test_a_service_that_goes_away(installed: Path):
    """Refused connections come back at once. They are failures, and no part of the rate."""
    environ = CLEAN | {"PORT": str(port := free_port()), "PYTHONUNBUFFERED": "1"}
    with contextlib.ExitStack() as stack:
        stack.enter_context(served("exec make run", installed, port))
        with subprocess.Popen(
            ["make", "load", "ARGS=--run-time 12s"], cwd=installed, env=environ, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) as process:  # fmt: skip
            assert process.stdout
            text = next(line for line in process.stdout if " clients for " in line)
            time.sleep(3)
            stack.close()
            text += process.communicate(timeout=300)[0]
    assert process.returncode != 0, text
    assert "s  the service does not answer\n" in text, text
    assert f"problem      the service does not answer any more: http://127.0.0.1:{port}/pool.json" in text, text
    good, failed = map(int, re.search(r"^answers +(\d+) good, (\d+) failed$", text, re.MULTILINE).groups())
    rate = float(re.search(r"^rate +([\d.]+) good answers a second", text, re.MULTILINE)[1])
    assert rate == pytest.approx(good / 12, rel=0.1)
    assert failed > good


def test_failures_fail(service: int, installed: Path, tmp_path: Path):
    """A view that is not there, in a locustfile of one's own."""
    own = tmp_path / "own.py"
    own.write_text((installed / "locustfile.py").read_text().replace("/api/notes?limit=20", "/api/nothing"))
    code, text, rows = load(installed, service, f'ARGS="--run-time 2s -f {own}"')
    assert code != 0, text
    assert not rows["answers"].endswith(" 0 failed")


def test_more_connections_than_planned_fail(installed: Path, tmp_path: Path):
    """The problem is the last thing that is said, and the exit code says it, too."""
    own = tmp_path / "own.py"
    own.write_text(
        "from locustfile import *\nfrom scripts import held_to_plan\n"
        "ask = held_to_plan.Watch.ask\n"
        "held_to_plan.Watch.ask = lambda self: ({**ask(self)[0], 'connections_per_instance': 0}, ask(self)[1])\n"
    )
    with served("exec make run", installed, port := free_port()):
        code, text, rows = load(installed, port, f'ARGS="--run-time 2s -f {own}"', PYTHONPATH=str(installed))
    assert code != 0, text
    assert re.fullmatch(r"[1-9]\d* connections, more than the 0 of the plan", rows["problem"])


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "start `make run` or `make prod` in another terminal"),
        ('ARGS="--host http://example.org"', "only a server on this machine is put under load"),
        ('ARGS="--host http://127.0.0.1.example.org"', "only a server on this machine is put under load"),
    ],
)
def test_only_a_service_on_this_machine(installed: Path, words: str, says: str):
    code, text, _ = load(installed, free_port(), words)
    assert code != 0
    assert says in text
