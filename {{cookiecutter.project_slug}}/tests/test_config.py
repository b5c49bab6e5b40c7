"""Settings: strict, all problems at once, and never a secret in a message."""

import secrets
from typing import Any

import pytest
from flask import Flask

from app import create_app, defaults, init_database
from app.config import DEAD_KEYS, Environment, Settings, SettingsError, plan_from_env

pytestmark = pytest.mark.sqlite  # no database in it: once is enough


def problems(environ: dict[str, str]) -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        Settings.from_env(environ)
    return caught.value.problems


def test_production_is_the_default(plain_environ: dict[str, str]) -> None:
    """Who forgets APP_ENV gets the strict one."""
    plain_environ.pop("APP_ENV")
    assert Settings.from_env(plain_environ).environment is Environment.PRODUCTION


def test_the_defaults(plain_environ: dict[str, str]) -> None:
    """As the table in the module says."""
    settings = Settings.from_env(plain_environ)
    assert settings.plan.max_connections == defaults.MAX_CONNECTIONS
    assert settings.plan.instances == defaults.INSTANCES
    assert (settings.db_pool_timeout, settings.db_connect_timeout, settings.db_statement_timeout) == (5, 3, 15)
    assert (settings.db_max_lifetime, settings.db_budget_check, settings.web_trusted_proxies) == (1800, "enforce", 0)
    assert (settings.web_timeout, settings.web_graceful_timeout) == (30, 30)
    assert (settings.web_host, settings.port) == ("127.0.0.1", 8000)
    assert (settings.plan.worker_class, settings.plan.pooler, settings.plan.max_overflow) == ("gthread", "none", 0)


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
def test_every_usual_scheme_of_postgres_is_understood(plain_environ: dict[str, str], scheme: str) -> None:
    """Hosting providers write postgres://, which SQLAlchemy does not know."""
    settings = Settings.from_env(plain_environ | {"DATABASE_URL": f"{scheme}://u:p@h/d"})
    assert settings.database_url.drivername == "postgresql+psycopg"
    assert settings.database_url.password == "p"


@pytest.mark.parametrize("hosts", ["host=one:1,two:2", "host=one:1&host=two:2", "host=one,two&port=1,2"])
def test_several_hosts_may_be_named(plain_environ: dict[str, str], hosts: str) -> None:
    """A primary and its standby: the driver gets both, each with its port."""
    url = Settings.from_env(plain_environ | {"DATABASE_URL": f"postgresql://u@/d?{hosts}"}).database_url
    arguments = url.get_dialect()().create_connect_args(url)[1]
    assert (arguments["host"], arguments["port"]) == ("one,two", "1,2")


@pytest.mark.parametrize("environment", ["testing", "development"])
def test_outside_production_nothing_has_to_be_set(environment: str) -> None:
    """SQLite in a file, and a fixed secret."""
    settings = Settings.from_env({"APP_ENV": environment})
    assert not settings.on_postgres
    assert settings.database_url.database not in {None, "", ":memory:"}


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("APP_ENV", "prod", "must be one of production, development, testing"),
        ("APP_ENV", "", "must be one of"),
        ("APP_INSTANCES", "0", "must be from 1"),
        ("APP_INSTANCES", "two", "is not a whole number"),
        ("DB_MAX_CONNECTIONS", "1e2", "is not a whole number"),
        ("DB_MAX_CONNECTIONS", "262144", "must be from 1 to 262143"),
        ("DB_RESERVED_CONNECTIONS", "-1", "is not a whole number"),
        ("DB_POOL_SIZE", "0", "must be from 1"),
        ("DB_POOL_SIZE", "", "is not a whole number"),
        ("DB_POOL_SIZE", " 5", "is not a whole number"),
        ("DB_POOL_SIZE", "5.0", "is not a whole number"),
        ("DB_POOL_SIZE", "1_0", "is not a whole number"),
        ("DB_POOL_SIZE", "٣", "is not a whole number"),
        ("DB_MAX_OVERFLOW", "-1", "is not a whole number"),
        ("DB_POOL_TIMEOUT", "nan", "is no number of seconds"),
        ("DB_POOL_TIMEOUT", "5s", "is no number of seconds"),
        ("DB_POOL_TIMEOUT", "0", "must be from 0.1"),
        ("DB_CONNECT_TIMEOUT", "1", "must be from 2"),
        ("DB_STATEMENT_TIMEOUT", "inf", "is no number of seconds"),
        ("DB_MAX_LIFETIME", "1e9", "is no number of seconds"),
        ("DB_POOLER", "pgpool", "must be one of none, pgbouncer"),
        ("DB_POOLER", "PgBouncer", "must be one of none, pgbouncer"),
        ("DB_BUDGET_CHECK", "true", "must be one of enforce, warn, off"),
        ("WEB_CONCURRENCY", "0", "must be from 1"),
        ("WEB_THREADS", "4.5", "is not a whole number"),
        ("WEB_WORKER_CLASS", "gevent", "must be one of gthread, sync"),
        ("WEB_TIMEOUT", "0", "must be from 1"),
        ("WEB_GRACEFUL_TIMEOUT", "-5", "is not a whole number"),
        ("WEB_WORKER_MEMORY_MIB", "150M", "is not a whole number"),
        ("WEB_TRUSTED_PROXIES", "yes", "is not a whole number"),
        ("WEB_HOST", "http://here", "is no address"),
        ("PORT", "65536", "must be from 1 to 65535"),
        ("PORT", "http", "is not a whole number"),
    ],
)
def test_what_does_not_parse_is_refused(plain_environ: dict[str, str], name: str, value: str, says: str) -> None:
    """With the name, the value and what is wrong with it; and it is the only problem."""
    (problem,) = problems(plain_environ | {name: value})
    assert problem.startswith(f"{name}={value!r}: ")
    assert says in problem


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("mysql://u:hunter2@h/d", "mysql:// is not supported"),
        ("postgresql+psycopg2://u:hunter2@h/d", "postgresql+psycopg2:// is not supported"),
        ("hunter2", "is not a database URL"),
        ("postgresql://u:hunter2@h:port/d", "is not a database URL"),
        ("postgresql://u:hunter2@/d?host=h&port=port", "is not a database URL"),
        ("postgresql://u:hunter2@/d?host=one:1&host=two:2&port=3", "is not a database URL"),
        ("sqlite://u:hunter2@h/d", "is not a database URL"),
        ("sqlite:///hunter2.db", "production needs Postgres, not sqlite"),
        ("sqlite://", "in-memory"),
        ("sqlite:///:memory:", "in-memory"),
        ("sqlite:///file:x?mode=memory&uri=true", "in-memory"),
        ("", "is not a database URL"),
    ],
)
def test_a_database_that_cannot_be_used_is_refused(plain_environ: dict[str, str], url: str, says: str) -> None:
    """Without a word of the URL, which has a password in it."""
    (problem,) = problems(plain_environ | {"DATABASE_URL": url})
    assert problem.startswith("DATABASE_URL=***: ")
    assert says in problem
    assert "hunter2" not in problem


@pytest.mark.parametrize("environment", ["testing", "development"])
@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
def test_an_in_memory_database_is_refused_everywhere(environment: str, url: str) -> None:
    """One connection for all threads: tests pass on it, and production loses rows."""
    assert "in-memory" in problems({"APP_ENV": environment, "DATABASE_URL": url})[0]


def test_testing_never_touches_a_server() -> None:
    """A DATABASE_URL left over in the shell must not be emptied by a test."""
    assert "SQLite file" in problems({"APP_ENV": "testing", "DATABASE_URL": "postgresql://u:p@h/d"})[0]


@pytest.mark.parametrize(
    "secret",
    [None, "", "short", "x" * 31, "a" * 64, "changeme" * 8, "my-super-Secret-key-that-is-long-enough", "password" * 6],
)
def test_a_bad_secret_is_refused_and_not_shown(plain_environ: dict[str, str], secret: str | None) -> None:
    """Missing, short, or a placeholder that somebody copied."""
    plain_environ.pop("SECRET_KEY")
    (problem,) = problems(plain_environ | ({} if secret is None else {"SECRET_KEY": secret}))
    assert problem.startswith("SECRET_KEY")
    assert "secrets.token_hex(32)" in problem
    assert not secret or secret not in problem


def test_a_random_secret_is_good(plain_environ: dict[str, str]) -> None:
    """The command in the message makes one that is accepted; and the settings do not show it."""
    for _ in range(100):
        settings = Settings.from_env(plain_environ | {"SECRET_KEY": secrets.token_hex(32)})
        assert settings.secret_key not in repr(settings)
        assert "hunter2" not in repr(settings)


def test_all_problems_are_told_at_once() -> None:
    """Not one for each attempt to start."""
    found = problems(
        {
            "APP_INSTANCES": "many",
            "DB_POOLSIZE": "5",
            "SQLALCHEMY_POOL_SIZE": "20",
            "DB_STATEMENT_TIMEOUT": "60",
            "PORT": "http",
        }
    )
    for name in (
        "APP_INSTANCES='many'",
        "DB_POOLSIZE='5'",
        "SQLALCHEMY_POOL_SIZE='20'",
        "DB_STATEMENT_TIMEOUT=60",
        "PORT='http'",
        "SECRET_KEY",
        "DATABASE_URL",
    ):
        assert any(problem.startswith(name) for problem in found), name


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("DB_POOLSIZE", "DB_POOL_SIZE"),
        ("DB_POOL_SZIE", "DB_POOL_SIZE"),
        ("DB_MAX_CONNECTION", "DB_MAX_CONNECTIONS"),
        ("DB_MAX_OVERLOW", "DB_MAX_OVERFLOW"),
        ("DB_STATMENT_TIMEOUT", "DB_STATEMENT_TIMEOUT"),
        ("DB_BUDGETCHECK", "DB_BUDGET_CHECK"),
        ("WEB_TREADS", "WEB_THREADS"),
        ("WEB_CONCURENCY", "WEB_CONCURRENCY"),
        ("APP_EVN", "APP_ENV"),
        ("APP_INSTANCE", "APP_INSTANCES"),
    ],
)
def test_a_misspelt_name_is_refused(plain_environ: dict[str, str], name: str, meant: str) -> None:
    """A setting that is silently ignored is how the guide's keys went wrong."""
    (problem,) = problems(plain_environ | {name: "5"})
    assert problem.startswith(f"{name}='5'")
    assert meant in problem


@pytest.mark.parametrize(
    "name",
    [
        "DB_PORT",
        "DB_HOST",
        "DB_NAME",
        "DB_USER",
        "DB_PASSWORD",
        "DB_SERVICE_HOST",
        "DB_SERVICE_PORT",
        "DB_PORT_5432_TCP",
        "DB_PORT_5432_TCP_ADDR",
        "WEB_PORT",
        "WEB_SERVICE_HOST",
        "WEB_SERVICE_PORT_HTTP",
        "WEB_PORT_80_TCP_PROTO",
        "APP_PORT",
        "APP_SERVICE_HOST",
        "APP_NAME",
        "APP_VERSION",
        "PATH",
    ],
)
def test_other_names_pass(plain_environ: dict[str, str], name: str) -> None:
    """Kubernetes sets them for services that are called db, web or app."""
    assert Settings.from_env(plain_environ | {name: "tcp://10.0.0.1:5432"})


@pytest.mark.parametrize(("dead", "living"), DEAD_KEYS.items())
def test_dead_keys_stop_the_start(plain_environ: dict[str, str], dead: str, living: str) -> None:
    """In the environment, and in app.config: Flask-SQLAlchemy would ignore both without a word."""
    (problem,) = problems(plain_environ | {dead: "20"})
    assert problem.startswith(f"{dead}='20'")
    assert living in problem

    app = Flask("app")
    app.config[dead] = 20
    with pytest.raises(SettingsError, match=living):
        init_database(app, Settings.from_env(plain_environ), web=True)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"DB_CONNECT_TIMEOUT": "6"}, "DB_CONNECT_TIMEOUT=6 must be at most DB_POOL_TIMEOUT=5"),
        ({"DB_POOL_TIMEOUT": "15"}, "DB_POOL_TIMEOUT=15 must be less than DB_STATEMENT_TIMEOUT=15"),
        ({"DB_STATEMENT_TIMEOUT": "30", "WEB_GRACEFUL_TIMEOUT": "60"}, "must be less than WEB_TIMEOUT=30"),
        ({"DB_STATEMENT_TIMEOUT": "20", "WEB_GRACEFUL_TIMEOUT": "20"}, "must be less than WEB_GRACEFUL_TIMEOUT=20"),
    ],
)
def test_a_broken_ladder_is_named(plain_environ: dict[str, str], values: dict[str, str], says: str) -> None:
    """A wait that outlives the one around it: both names and both values."""
    (problem,) = problems(plain_environ | values)
    assert says in problem


def test_waits_that_fit_into_each_other_are_fine(plain_environ: dict[str, str]) -> None:
    """The lock's wait lies between the pool's and the statement's by itself."""
    settings = Settings.from_env(plain_environ | {"DB_POOL_TIMEOUT": "3", "DB_STATEMENT_TIMEOUT": "4.5"})
    assert settings.db_pool_timeout < settings.lock_timeout < settings.db_statement_timeout


def test_a_plan_that_does_not_fit_is_a_problem_of_the_settings(plain_environ: dict[str, str]) -> None:
    """With the sum."""
    assert "> " in problems(plain_environ | {"APP_INSTANCES": "90000", "DB_MAX_CONNECTIONS": "100"})[0]


def test_the_plan_alone_needs_no_secret_and_no_database() -> None:
    """`flask pool plan` is for the time before there is either."""
    assert plan_from_env({}).instances == defaults.INSTANCES
    assert plan_from_env({"SECRET_KEY": "x"}, instances=1).instances == 1
    for name in ("DB_POOLSIZE", "SQLALCHEMY_POOL_SIZE"):
        with pytest.raises(SettingsError, match=name):
            plan_from_env({name: "4"})


def test_the_settings_reach_flask(make_app: Any) -> None:
    """What Flask and Flask-SQLAlchemy read."""
    app: Flask = make_app()
    settings: Settings = app.extensions["settings"]
    assert app.config["SECRET_KEY"] == settings.secret_key
    assert app.config["SQLALCHEMY_DATABASE_URI"] == settings.database_url
    assert not app.debug


def test_the_factory_reads_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only when it is given no settings."""
    monkeypatch.setenv("APP_ENV", "nowhere")
    with pytest.raises(SettingsError, match="nowhere"):
        create_app()
