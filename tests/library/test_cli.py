"""`flask pool plan` and `flask pool check`, as somebody types them."""

import json
from collections.abc import Callable

import pytest
from flask import Flask

KEYS = {
    *("cpus", "memory_mib", "workers", "threads", "pool_size", "max_overflow", "jobs", "notes"),
    *("connections_per_instance", "connections_peak", "connections_usable", "sum"),
    *("instances", "max_connections", "reserved", "binds", "pooler", "poolers", "worker_class", "worker_memory_mib"),
}
WHAT_IF = ["--cpus", "2", "--memory-mib", "4096", "--max-connections", "100", "--instances", "2"]


def run(app: Flask, *words: str) -> tuple[int, str]:
    result = app.test_cli_runner().invoke(args=["pool", *words])
    return result.exit_code, result.output


@pytest.mark.sqlite
def test_plan_shows_the_sum(plain: Flask) -> None:
    """Every number and where it came from."""
    code, text = run(plain, "plan", *WHAT_IF)
    assert code == 0
    assert "2 instances x 3 workers x (4 + 0) = 24 of 87 connections (100 - 3 for superusers - 10 reserved)" in text
    assert "3 x 4 = 12 requests at once" in text
    assert "240 requests a second if each takes 0.05 seconds: 12 / 0.05" in text


@pytest.mark.sqlite
def test_plan_as_json(plain: Flask) -> None:
    """The keys that tools rely on."""
    code, text = run(plain, "plan", "--json", *WHAT_IF)
    assert code == 0
    plan = json.loads(text)
    assert set(plan) >= KEYS
    assert (plan["workers"], plan["threads"], plan["connections_peak"], plan["connections_usable"]) == (3, 4, 24, 87)
    assert (plan["notes"], plan["jobs"]) == ([], {})


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--threads", "8"], {"threads": 8, "pool_size": 8}),
        (["--worker-class", "sync"], {"workers": 5, "threads": 1}),
        (["--instances", "300", "--pooler", "pgbouncer"], {"connections_peak": 3600}),
        (["--pooler", "pgbouncer", "--poolers", "2", "--jobs", "worker=2x4"], {"poolers": 2, "connections_usable": 87}),
        (["--jobs", "worker=2x4,beat=1x1"], {"connections_usable": 78}),
        (["--binds", "1", "--reserved", "20"], {"binds": 1, "reserved": 20, "connections_peak": 48}),
        (["--workers", "4", "--worker-memory-mib", "300"], {"workers": 4, "worker_memory_mib": 300}),
        (["--pool-size", "5", "--max-overflow", "1"], {"pool_size": 5, "max_overflow": 1, "connections_peak": 36}),
        (["--instances", "8", "--jobs", "worker=4x8"], {"workers": 3, "threads": 2, "connections_usable": 55}),
    ],
)
def test_other_numbers_can_be_tried(plain: Flask, words: list[str], expected: dict[str, int]) -> None:
    """Each option takes the place of a setting."""
    plan = json.loads(run(plain, "plan", "--json", *WHAT_IF, *words)[1])
    assert {name: plan[name] for name in expected} == expected


@pytest.mark.sqlite
def test_a_plan_that_does_not_fit_exits_with_1(plain: Flask) -> None:
    """With the sum and the three ways out."""
    code, text = run(plain, "plan", *WHAT_IF, "--instances", "120")
    assert code == 1
    assert "240 > 87" in text
    for way in ("DB_MAX_CONNECTIONS=", "APP_INSTANCES=", "DB_POOLER=pgbouncer"):
        assert way in text


@pytest.mark.sqlite
@pytest.mark.parametrize(
    "words",
    [
        *(["--cpus", "0"], ["--cpus", "nan"], ["--instances", "-1"], ["--pooler", "pgpool"], ["--memory", "x"]),
        *(["--jobs", "worker"], ["--poolers", "0"], ["--pool-size", "0"], ["--reserved", "x"], ["--workers", "1e3"]),
    ],
)
def test_options_that_make_no_sense_exit_with_2(plain: Flask, words: list[str]) -> None:
    """As click has it."""
    assert run(plain, "plan", *words)[0] == 2


@pytest.mark.sqlite
def test_check_has_nothing_to_ask_of_sqlite(plain: Flask) -> None:
    """And says so, which is neither a yes nor a no."""
    code, text = run(plain, "check")
    assert code == 2
    assert "SQLite" in text


@pytest.mark.postgres
def test_check_asks_the_server(plain: Flask) -> None:
    """0 where the plan fits."""
    code, text = run(plain, "check")
    assert code == 0, text
    assert "max_connections 100" in text
    assert text.rstrip().endswith("the plan fits")
    answer = json.loads(run(plain, "check", "--json")[1])
    assert answer["holds"] is True
    assert answer["server"]["max_connections"] == 100


@pytest.mark.postgres
@pytest.mark.direct
def test_check_exits_with_1_where_the_promise_does_not_hold(make_plain: Callable[..., Flask]) -> None:
    """Planned for a server of 1000, found one of 100."""
    app = make_plain(DB_MAX_CONNECTIONS=1000, APP_INSTANCES=50)
    code, text = run(app, "check")
    assert code == 1
    assert "> 87 (max_connections 100" in text
    assert text.rstrip().endswith("the plan does not fit")
    assert json.loads(run(app, "check", "--json")[1])["holds"] is False


@pytest.mark.postgres
@pytest.mark.parametrize("database", ["u:hunter2@127.0.0.1:1/d", "u:hunter2@nowhere.invalid/d"])
def test_check_exits_with_2_where_nobody_answers(make_plain: Callable[..., Flask], database: str) -> None:
    """A server that is not there proves nothing. It is said in one line, without the password."""
    code, text = run(make_plain(DATABASE_URL=f"postgresql://{database}"), "check")
    assert code == 2
    assert "cannot be asked" in text
    assert "hunter2" not in text
    assert "Traceback" not in text
