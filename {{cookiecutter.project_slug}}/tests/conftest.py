"""Fixtures, as in Flask's tutorial: `app`, `client` and `runner`, and `make_app` for an app with other settings.

The suite runs twice. `--database sqlite` has the settings of testing: a SQLite file and a NullPool.
`--database postgres` has those of production: a real Postgres and a web worker's QueuePool. Every test finds a migrated
database without rows.
"""

import os

# Nothing of the shell that starts the suite may reach it. This comes before the app is imported, since libraries look
# at the environment as well. TEST_DATABASE_URL and TEST_DB_POOLER are the suite's own.
for name in list(os.environ):
    if name.upper().startswith(("APP_", "DB_", "WEB_", "SQLALCHEMY_", "PG", "FLASK_", "GUNICORN_", "PROMETHEUS_")):
        del os.environ[name]

import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask.testing import FlaskClient, FlaskCliRunner
from flask_migrate import upgrade
from sqlalchemy.engine import make_url

from app import create_app
from app.config import Settings
from app.extensions import db
from scripts import postgres

for name in {field.upper() for field in Settings.model_fields}:
    os.environ.pop(name, None)
# The settings that are URLs of further databases. Each run has databases of its own for them, as for the first.
OTHERS = [name for name, field in Settings.model_fields.items() if "url.URL" in str(field.annotation)]
OTHERS.remove("database_url")

# What TEST_DATABASE_URL leads through: "pgbouncer", or nothing.
POOLER = os.environ.get("TEST_DB_POOLER", "")
SERVER = {"DB_MAX_CONNECTIONS": "100", "APP_INSTANCES": "2"}  # what the tests' Postgres has, whatever the service's has


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--database", choices=["sqlite", "postgres"], default="sqlite", help="what to run the suite on")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "sqlite: runs with --database sqlite only; also what needs no database at all")
    config.addinivalue_line("markers", "postgres: runs with --database postgres only")
    config.addinivalue_line("markers", "direct: needs the server itself, so it does not run behind TEST_DB_POOLER")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what belongs to the other run. Nothing is skipped: each test runs in at least one of the two."""
    others = ["postgres" if config.getoption("--database") == "sqlite" else "sqlite", *(["direct"] if POOLER else [])]
    left_out = [item for item in items if any(item.get_closest_marker(other) for other in others)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


@pytest.fixture(scope="session")
def database_kind(pytestconfig: pytest.Config) -> str:
    return str(pytestconfig.getoption("--database"))


@pytest.fixture(scope="session")
def own_postgres() -> Iterator[str]:
    """The URL of a Postgres of our own for the length of the run. Tests may fill it, limit it and crash it."""
    no_sync = {"fsync": "off"}  # it is for power failures, and costs a test more than anything else
    with (
        tempfile.TemporaryDirectory() as folder,
        postgres.running(Path(folder) / "data", "test", *OTHERS, settings=no_sync) as url,
    ):
        yield url


@pytest.fixture(scope="session")
def postgres_url(request: pytest.FixtureRequest) -> str:
    """The Postgres that the suite runs on: TEST_DATABASE_URL, or our own."""
    url = os.environ.get("TEST_DATABASE_URL")
    if not url:
        return str(request.getfixturevalue("own_postgres"))
    if "test" not in (make_url(url).database or ""):
        pytest.exit("TEST_DATABASE_URL must name a database with 'test' in its name: its tables are emptied", 2)
    if "PYTEST_XDIST_WORKER" in os.environ:
        pytest.exit(
            "TEST_DATABASE_URL is one database, so it does not go with -n; without it each worker has its own", 2
        )
    return url


@pytest.fixture(scope="session")
def run_on(
    database_kind: str, request: pytest.FixtureRequest
) -> Iterator[tuple[dict[str, str], dict[sa.URL, list[str]]]]:
    """The environment that makes the app use this run's databases, which have been migrated, and the models' tables."""
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if database_kind == "sqlite":
            files = {name.upper(): f"sqlite:///{folder}/{name}.db" for name in ("database_url", *OTHERS)}
            environ = SERVER | {"APP_ENV": "testing", **files}
        else:
            url = request.getfixturevalue("postgres_url")
            environ = SERVER | {"APP_ENV": "production", "DATABASE_URL": url, "SECRET_KEY": secrets.token_hex(32)}
            environ |= {"DB_MAX_CONNECTIONS": str(ask(url, "show max_connections"))}
            environ |= {"DB_POOLER": POOLER} if POOLER else {}
            environ |= {"DB_BINDS": str(len(OTHERS))}
            for name in OTHERS:
                own = make_url(request.getfixturevalue("own_postgres")).set(database=name)
                environ[name.upper()] = own.render_as_string(hide_password=False)
        for name, value in environ.items():
            patch.setenv(name, value)
        app = create_app()
        with app.app_context():
            upgrade()
            quoted = db.engine.dialect.identifier_preparer.format_table
            tables = {db.engines[key].url: [*map(quoted, each.tables.values())] for key, each in db.metadatas.items()}
        dispose(app)
        patch.undo()
        yield environ, tables


@pytest.fixture
def environ(
    run_on: tuple[dict[str, str], dict[sa.URL, list[str]]],
    database_kind: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[dict[str, str]]:
    """The environment that the test's apps read. On SQLite the test has files of its own; on Postgres the tables are
    emptied after it."""
    environ, tables = dict(run_on[0]), run_on[1]
    for name in [name.upper() for name in ("database_url", *OTHERS)] if database_kind == "sqlite" else ():
        migrated = Path(str(make_url(environ[name]).database))
        if migrated.exists():  # a database without models has no file
            environ[name] = f"sqlite:///{shutil.copy(migrated, tmp_path / migrated.name)}"
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    yield environ
    for url, names in tables.items() if database_kind == "postgres" else ():
        if there := ask(url, TABLES, names=names):
            ask(url, f"truncate {there} restart identity cascade")


# The database may have other tables: PostGIS' own, or somebody's.
TABLES = """select string_agg(name, ', ') from unnest(cast(:names as text[])) as name
            join pg_class on oid = to_regclass(name) where relkind in ('r', 'p')"""


def ask(url: str | sa.URL, statement: str, **values: object) -> Any:
    """Ask the database itself, without the app, and return the first value of the answer."""
    engine = sa.create_engine(make_url(url).set(drivername="postgresql+psycopg"), poolclass=sa.NullPool)
    with engine.begin() as connection:
        result = connection.execute(sa.text(statement), values)
        return result.scalar() if result.returns_rows else None


@pytest.fixture
def make_app(environ: dict[str, str]) -> Iterator[Callable[..., Flask]]:
    """A function that makes an app as a web worker has it, with other settings: `make_app(WEB_THREADS=3)`. With
    `web=False` it is a shell's, with `job="worker"` a job's. The engines are disposed of at the end.

    `create_app({"TESTING": True})` of Flask's tutorial works as well: on a SQLite file, as a shell has it.
    """
    made: list[Flask] = []

    def make(*, web: bool = True, job: str | None = None, **more: object) -> Flask:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in more.items():
                patch.setenv(name, str(value))
            if job:
                patch.setenv("APP_JOB", job)
            patch.setattr("flask_pooling.process.in_gunicorn", web and not job)
            app = create_app()
        app.testing = True
        made.append(app)
        return app

    yield make
    for app in made:
        dispose(app)


def dispose(app: Flask) -> None:
    with app.app_context():
        for engine in db.engines.values():
            engine.dispose()


@pytest.fixture
def app(make_app: Callable[..., Flask]) -> Flask:
    return make_app()


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def runner(app: Flask) -> FlaskCliRunner:
    return app.test_cli_runner()


@pytest.fixture
def production(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The least that production accepts, set in the environment; nobody connects to the database that it names."""
    environ = SERVER | {
        "APP_ENV": "production",
        "DATABASE_URL": "postgresql://somebody:hunter2@db.invalid/somewhere",
        "SECRET_KEY": secrets.token_hex(32),
    }
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    return environ
