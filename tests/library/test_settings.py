"""The machinery's settings: strict, and what is wrong is named with its value and a remedy."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
from pydantic import BaseModel, Field, SecretStr
from pydantic_settings import SettingsConfigDict

import flask_pooling
from flask_pooling import SettingsError
from flask_pooling.settings import DEAD_KEYS
from tests.serving import command


class Settings(flask_pooling.Settings):
    """As the template's."""

    strict: ClassVar[bool] = True


pytestmark = [pytest.mark.sqlite, pytest.mark.usefixtures("production")]  # no database in it: once is enough


def problems(monkeypatch: pytest.MonkeyPatch, **environ: str) -> tuple[str, ...]:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        Settings.load()
    return caught.value.problems


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("APP_INSTANCES", "0"),
        ("APP_INSTANCES", "two"),
        ("APP_JOBS", "worker"),
        ("APP_JOBS", "worker=2"),
        ("APP_JOBS", "worker=0x4"),
        ("APP_JOBS", "worker=2x4,worker=1x1"),
        ("APP_JOBS", "web=1x1"),
        ("APP_JOBS", "a b=1x1"),
        ("DB_BINDS", "-1"),
        ("DB_BIND_SERVERS", "reports"),
        ("DB_BIND_SERVERS", "reports=0"),
        ("DB_BIND_SERVERS", "reports=100:"),
        ("DB_BIND_SERVERS", "reports=100x5"),
        ("DB_BIND_SERVERS", "reports=100,"),
        ("DB_BIND_SERVERS", "reports=100,audit+reports=200"),
        ("DB_MAX_CONNECTIONS", "1e2"),
        ("DB_MAX_CONNECTIONS", "262144"),
        ("DB_RESERVED_CONNECTIONS", "-1"),
        ("DB_POOL_SIZE", "0"),
        ("DB_POOL_SIZE", "5.5"),
        ("DB_POOL_SIZE", "٣"),
        ("DB_MAX_OVERFLOW", "-1"),
        ("DB_POOL_TIMEOUT", "nan"),
        ("DB_POOL_TIMEOUT", "5s"),
        ("DB_POOL_TIMEOUT", "0"),
        ("DB_CONNECT_TIMEOUT", "1"),
        ("DB_STATEMENT_TIMEOUT", "inf"),
        ("DB_MAX_LIFETIME", "1e9"),
        ("DB_POOLER", "pgpool"),
        ("DB_POOLER", "PgBouncer"),
        ("DB_BUDGET_CHECK", "true"),
        ("WEB_CONCURRENCY", "0"),
        ("WEB_THREADS", "4.5"),
        ("WEB_WORKER_CLASS", "gevent"),
        ("WEB_TIMEOUT", "0"),
        ("WEB_GRACEFUL_TIMEOUT", "-5"),
        ("WEB_WORKER_MEMORY_MIB", "150M"),
        ("WEB_TRUSTED_PROXIES", "yes"),
        ("WEB_HOST", "http://here"),
        ("PORT", "65535"),  # the next one is the probes'
        ("PORT", "http"),
    ],
)
def test_what_does_not_parse_is_refused(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    """With the name and the value; and it is the only problem."""
    (problem,) = problems(monkeypatch, **{name: value})
    assert problem.startswith(f"{name}={value!r}: ")
    assert len(problem) > len(f"{name}={value!r}: ") + 10


class Login(BaseModel):
    port: int = 25
    password: SecretStr = SecretStr("")


@dataclass
class Key:
    number: int
    text: str


class Copies(BaseModel):
    to: list[str] = []
    port: int = 25


class Nested(Settings):
    mail: Login = Login()
    others: list[Login] = []  # noqa: RUF012  # pydantic copies it
    key: Key | None = None
    sizes: list[int] = []  # noqa: RUF012


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("MAIL", '{"port": "x", "password": "hunter2"}', "MAIL=***: port: Input should be a valid integer"),
        ("OTHERS", '[{"port": "x", "password": "hunter2"}]', "OTHERS=***: 0: port: Input should be"),
        ("KEY", '{"number": "x", "text": "hunter2"}', "KEY=***: number: Input should be a valid integer"),
        ("SIZES", '[1, "x"]', "SIZES=***: 1: Input should be a valid integer"),
    ],
)
def test_a_secret_in_a_nested_setting_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, says: str
) -> None:
    """A setting with fields may have a secret one; the message names the field that is wrong."""
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        Nested.load()
    (problem,) = caught.value.problems
    assert problem.startswith(says)
    assert "hunter2" not in problem


class Parts(Settings):
    model_config = SettingsConfigDict(env_nested_delimiter="__")

    mail: Copies | None = None


def test_a_part_may_be_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a variable for each part, as pydantic-settings has it. What is no JSON is named."""
    monkeypatch.setenv("MAIL__TO", '["a", "b"]')
    monkeypatch.setenv("MAIL__PORT", "26")
    assert Parts.load().mail == Copies(to=["a", "b"], port=26)
    monkeypatch.setenv("MAIL", "[hunter2")
    with pytest.raises(SettingsError, match="MAIL=") as caught:
        Parts.load()
    assert "hunter2" not in str(caught.value)


class WithSecrets(Settings):
    smtp_pass: str = Field("", min_length=12)
    db_pass: SecretStr | None = None


def test_a_secret_under_another_name_is_not_shown(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that does not parse, and a name that is misspelt."""
    monkeypatch.setenv("SMTP_PASS", "hunter2")
    monkeypatch.setenv("DB_PASSS", "hunter2")
    with pytest.raises(SettingsError) as caught:
        WithSecrets.load()
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["SMTP_PASS=***"]
    assert caplog.messages == ["DB_PASSS: no such setting; did you mean DB_PASS?"]


def test_one_problem_is_not_called_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message is for a person."""
    monkeypatch.setenv("PORT", "x")
    with pytest.raises(SettingsError, match=r"^1 problem in the settings:\n  - PORT="):
        Settings.load()
    monkeypatch.setenv("WEB_THREADS", "x")
    with pytest.raises(SettingsError, match=r"^2 problems in the settings:"):
        Settings.load()


@pytest.mark.parametrize(("dead", "living"), DEAD_KEYS.items())
def test_dead_keys_stop_the_start(monkeypatch: pytest.MonkeyPatch, dead: str, living: str) -> None:
    """Flask-SQLAlchemy would ignore them without a word."""
    (problem,) = problems(monkeypatch, **{dead: "20"})
    assert problem.startswith(f"{dead}='20'")
    assert f"set {living}" in problem
    (problem,) = problems(monkeypatch, **{dead: "mysql://u:hunter2@h/d"})
    assert problem.startswith(f"{dead}=***")


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"DB_CONNECT_TIMEOUT": "6"}, "DB_CONNECT_TIMEOUT=6 must be at most DB_POOL_TIMEOUT=5"),
        ({"DB_POOL_TIMEOUT": "15"}, "DB_POOL_TIMEOUT=15 must be less than DB_STATEMENT_TIMEOUT=15"),
        ({"DB_STATEMENT_TIMEOUT": "30", "WEB_GRACEFUL_TIMEOUT": "60"}, "must be less than WEB_TIMEOUT=30"),
        ({"DB_STATEMENT_TIMEOUT": "20", "WEB_GRACEFUL_TIMEOUT": "20"}, "must be less than WEB_GRACEFUL_TIMEOUT=20"),
        ({"APP_INSTANCES": "90000"}, "90000 instances"),
        ({"APP_JOBS": "worker=20x5"}, "the jobs alone hold 100 of 87 usable connections (worker 20 x 5)"),
    ],
)
def test_values_that_do_not_go_together_are_named(
    monkeypatch: pytest.MonkeyPatch, values: dict[str, str], says: str
) -> None:
    """A wait that outlives the one around it, two listeners on one port, a plan that does not fit."""
    (problem,) = problems(monkeypatch, **values)
    assert says in problem


def test_waits_that_fit_into_each_other_are_fine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait for a lock always lies between those for the pool and for the statement."""
    monkeypatch.setenv("DB_POOL_TIMEOUT", "3")
    monkeypatch.setenv("DB_STATEMENT_TIMEOUT", "4.5")
    settings = Settings.load()
    assert settings.db_pool_timeout < settings.lock_timeout < settings.db_statement_timeout


def test_flask_pool_plan_needs_no_secret_and_no_database() -> None:
    """It is arithmetic, and most useful before anything is configured. Anything else says what is missing."""
    nothing = {"APP_ENV": "production", "DATABASE_URL": "nonsense", "SECRET_KEY": "too short"}
    what_if = ("--cpus", "2", "--memory-mib", "4096")
    done = command("flask", "pool", "plan", *what_if, **nothing)
    assert done.returncode == 0, done.stderr
    assert "24 of 87" in done.stdout
    refused = command("flask", "routes", **nothing)
    assert refused.returncode == 1
    assert "SECRET_KEY=***" in refused.stderr
    assert "DATABASE_URL=***" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_the_arithmetic_refuses_a_misspelt_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would show the plan of other numbers than were meant."""
    monkeypatch.setenv("DB_POOLSIZE", "4")
    with pytest.raises(SettingsError, match="did you mean DB_POOL_SIZE"):
        Settings.load(numbers_only=True)
