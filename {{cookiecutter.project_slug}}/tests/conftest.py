"""Fixtures. The suite runs twice: `--database sqlite` with testing's settings (a SQLite file, NullPool), and
`--database postgres` with production's (a real server, a web worker's QueuePool).

No fixture keeps an app context open around the client: the session would be shared between requests and a test would
see what no request sees.
"""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask.testing import FlaskClient, FlaskCliRunner
from flask_migrate import upgrade
from sqlalchemy.engine import Connection, make_url

from app import create_app
from app.config import Settings
from app.extensions import db
from app.pools import RequestSession
from scripts import postgres

KINDS = ("sqlite", "postgres")
# What TEST_DATABASE_URL leads through: "pgbouncer", or nothing.
POOLER = os.environ.get("TEST_DB_POOLER", "")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--database", choices=KINDS, default="sqlite", help="what to run the suite on")


def pytest_configure(config: pytest.Config) -> None:
    for kind in KINDS:
        config.addinivalue_line("markers", f"{kind}: runs with --database {kind} only")
    config.addinivalue_line("markers", "direct: of connections to the server itself, so not run behind TEST_DB_POOLER")
    config.addinivalue_line("markers", "live: commits for real, on connections of its own; cleaned up afterwards")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what belongs to the other run. Nothing is skipped: each test runs in at least one of them."""
    others = [{"sqlite": "postgres", "postgres": "sqlite"}[config.getoption("--database")]]
    if POOLER:
        others.append("direct")
    left_out = [item for item in items if any(item.get_closest_marker(other) for other in others)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_report_header(config: pytest.Config) -> str:
    return f"database: {config.getoption('--database')}" + (f" behind {POOLER}" if POOLER else "")


@pytest.fixture(scope="session")
def database_kind(pytestconfig: pytest.Config) -> str:
    return str(pytestconfig.getoption("--database"))


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A real Postgres: TEST_DATABASE_URL, or one of our own for the length of the run."""
    given = os.environ.get("TEST_DATABASE_URL")
    if given:
        if "test" not in (make_url(given).database or ""):
            pytest.exit("TEST_DATABASE_URL must name a database with 'test' in its name: its tables are emptied", 2)
        yield given
        return
    settings = {"fsync": "off", "synchronous_commit": "off"}  # it is thrown away
    # Not below pytest's folder, which each run of pytest locks again for others: as root, Postgres runs as nobody.
    with (
        tempfile.TemporaryDirectory() as folder,
        postgres.running(Path(folder) / "data", "test", settings=settings) as url,
    ):
        yield url


@pytest.fixture(scope="session")
def environ_for(database_kind: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function that makes a whole environment for this run's database, migrated and empty."""
    if database_kind == "postgres":
        base = {
            "APP_ENV": "production",
            "DATABASE_URL": request.getfixturevalue("postgres_url"),
            "SECRET_KEY": secrets.token_hex(32),
            **({"DB_POOLER": POOLER} if POOLER else {}),
        }
        _migrate(base)
        return lambda **more: base | more

    migrated = tmp_path_factory.mktemp("sqlite") / "migrated.db"
    _migrate({"APP_ENV": "testing", "DATABASE_URL": f"sqlite:///{migrated}"})

    def sqlite(**more: str) -> dict[str, str]:
        file = tmp_path_factory.mktemp("sqlite") / "test.db"
        shutil.copy(migrated, file)
        return {"APP_ENV": "testing", "DATABASE_URL": f"sqlite:///{file}"} | more

    return sqlite


def _migrate(environ: dict[str, str]) -> None:
    app = create_app(Settings.from_env(environ), web=False)
    with app.app_context():
        upgrade()
        db.engine.dispose()


@pytest.fixture
def environ(environ_for: Any) -> dict[str, str]:
    made: dict[str, str] = environ_for()
    return made


@pytest.fixture
def make_app(environ: dict[str, str]) -> Iterator[Any]:
    """A function that makes apps as a web worker would, with more settings; their engines are disposed of."""
    made: list[Flask] = []

    def make(*, web: bool = True, **more: str) -> Flask:
        made.append(create_app(Settings.from_env(environ | more), web=web))
        return made[-1]

    yield make
    for app in made:
        with app.app_context():
            db.engine.dispose()


@pytest.fixture
def app(make_app: Any, database_kind: str, request: pytest.FixtureRequest) -> Iterator[Flask]:
    """The app. On Postgres everything that a test does is one transaction, rolled back at the end, unless the test is
    marked `live`; then the tables are emptied. On SQLite each test has a file of its own."""
    app: Flask = make_app()
    if database_kind == "sqlite":
        yield app
    elif request.node.get_closest_marker("live"):
        yield app
        _empty(app)
    else:
        yield from _in_one_transaction(app)


def _in_one_transaction(app: Flask) -> Iterator[Flask]:
    # On a connection of its own: the app's pool, which may be of one, is left to the app.
    engine = sa.create_engine(app.config["SQLALCHEMY_DATABASE_URI"], poolclass=sa.NullPool)
    with pytest.MonkeyPatch.context() as patch, engine.connect() as connection, connection.begin() as outer:
        patch.setattr(RequestSession, "get_bind", lambda *args, **kwargs: connection)
        patch.setitem(db.session.session_factory.kw, "join_transaction_mode", "create_savepoint")
        patch.setitem(app.extensions, "one_statement", lambda: savepoint(connection))
        yield app
        outer.rollback()


@contextmanager
def savepoint(connection: Connection) -> Iterator[Connection]:
    """What `extensions.run` gets instead of a connection of its own: a savepoint in the test's transaction."""
    with connection.begin_nested():
        yield connection


def _empty(app: Flask) -> None:
    with app.app_context():
        db.session.execute(db.text("truncate notes restart identity"))
        db.session.commit()


@pytest.fixture
def client(app: Flask) -> FlaskClient:
    return app.test_client()


@pytest.fixture
def runner(app: Flask) -> FlaskCliRunner:
    return app.test_cli_runner()


@pytest.fixture
def plain_environ(tmp_path: Path) -> dict[str, str]:
    """The least that production accepts, with a database that nobody connects to."""
    return {
        "APP_ENV": "production",
        "DATABASE_URL": "postgresql://somebody:hunter2@db.invalid/somewhere",
        "SECRET_KEY": secrets.token_hex(32),
    }
