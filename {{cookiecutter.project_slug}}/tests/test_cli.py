"""`flask pool plan` and `flask pool check`, as somebody types them."""

import json
from pathlib import Path

import pytest
import serving
from flask.testing import FlaskCliRunner

KEYS = {
    "cpus",
    "memory_mib",
    "workers",
    "threads",
    "pool_size",
    "max_overflow",
    "connections_per_instance",
    "connections_peak",
    "connections_usable",
    "notes",
}
WHAT_IF = ["--cpus", "2", "--memory-mib", "4096", "--max-connections", "100", "--instances", "2"]


def run(runner: FlaskCliRunner, *words: str) -> tuple[int, str]:
    result = runner.invoke(args=["pool", *words])
    return result.exit_code, result.output


def test_plan_shows_the_sum(runner: FlaskCliRunner) -> None:
    """Every number and where it came from."""
    code, text = run(runner, "plan", *WHAT_IF)
    assert code == 0
    assert "2 instances x 3 workers x (4 + 0) = 24 of 87 connections (100 - 3 for superusers - 10 reserved)" in text
    assert "3 x 4 = 12 requests at once" in text


def test_plan_as_json(runner: FlaskCliRunner) -> None:
    """The keys that tools rely on."""
    code, text = run(runner, "plan", "--json", *WHAT_IF)
    assert code == 0
    plan = json.loads(text)
    assert set(plan) == KEYS
    assert (plan["workers"], plan["threads"], plan["connections_peak"], plan["connections_usable"]) == (3, 4, 24, 87)
    assert plan["notes"] == []


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--threads", "8"], {"threads": 8, "pool_size": 8}),
        (["--worker-class", "sync"], {"workers": 5, "threads": 1}),
        (["--instances", "300", "--pooler", "pgbouncer"], {"connections_peak": 3600}),
    ],
)
def test_other_numbers_can_be_tried(runner: FlaskCliRunner, words: list[str], expected: dict[str, int]) -> None:
    """What if."""
    plan = json.loads(run(runner, "plan", "--json", *WHAT_IF, *words)[1])
    assert {name: plan[name] for name in expected} == expected


def test_a_plan_that_does_not_fit_exits_with_1(runner: FlaskCliRunner) -> None:
    """With the sum and the three ways out."""
    code, text = run(runner, "plan", *WHAT_IF, "--instances", "120")
    assert code == 1
    assert "120 > 87" in text
    for way in ("DB_MAX_CONNECTIONS=", "APP_INSTANCES=", "DB_POOLER=pgbouncer"):
        assert way in text


@pytest.mark.parametrize("words", [["--cpus", "0"], ["--instances", "-1"], ["--pooler", "pgpool"], ["--memory", "x"]])
def test_options_that_make_no_sense_exit_with_2(runner: FlaskCliRunner, words: list[str]) -> None:
    """As click has it."""
    assert run(runner, "plan", *words)[0] == 2


@pytest.mark.sqlite
def test_plan_answers_before_anything_is_configured(tmp_path: Path) -> None:
    """No secret, no database: it is arithmetic."""
    done = serving.run(["flask", "pool", "plan", "--json", *WHAT_IF], {"SECRET_KEY": "too short"}, tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["connections_peak"] == 24


@pytest.mark.sqlite
def test_anything_else_needs_settings_and_says_which(tmp_path: Path) -> None:
    """One clear error, no traceback."""
    done = serving.run(["flask", "routes"], {}, tmp_path)
    assert done.returncode == 1
    assert "SECRET_KEY is not set" in done.stderr
    assert "DATABASE_URL is not set" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.sqlite
def test_check_has_nothing_to_ask_of_sqlite(runner: FlaskCliRunner) -> None:
    """And says so, which is neither a yes nor a no."""
    code, text = run(runner, "check")
    assert code == 2
    assert "SQLite" in text


@pytest.mark.postgres
def test_check_asks_the_server(runner: FlaskCliRunner) -> None:
    """0 where the plan fits."""
    code, text = run(runner, "check")
    assert code == 0
    assert "max_connections 100" in text
    assert text.rstrip().endswith("the plan fits")
    answer = json.loads(run(runner, "check", "--json")[1])
    assert answer["holds"] is True
    assert answer["server"]["max_connections"] == 100


@pytest.mark.postgres
@pytest.mark.direct
def test_check_exits_with_1_where_the_promise_does_not_hold(make_app: object) -> None:
    """Planned for a server of 1000, found one of 100."""
    app = make_app(DB_MAX_CONNECTIONS="1000", APP_INSTANCES="50")  # type: ignore[operator]
    code, text = run(app.test_cli_runner(), "check")
    assert code == 1
    assert "> 87 (max_connections 100" in text
    assert text.rstrip().endswith("the plan does not fit")
    answer = json.loads(run(app.test_cli_runner(), "check", "--json")[1])
    assert answer["holds"] is False


@pytest.mark.postgres
def test_check_exits_with_2_where_nobody_answers(make_app: object) -> None:
    """A server that is not there proves nothing."""
    app = make_app(DATABASE_URL="postgresql://u:hunter2@127.0.0.1:1/d")  # type: ignore[operator]
    code, text = run(app.test_cli_runner(), "check")
    assert code == 2
    assert "cannot be asked" in text
    assert "hunter2" not in text
