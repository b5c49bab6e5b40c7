"""Fixtures. The suite runs twice: `--database sqlite` with testing's settings (a SQLite file, NullPool), and
`--database postgres` with production's (a real server, a web worker's QueuePool). `make test` has both runs at once.

No fixture keeps an app context open around the client: the session would be shared between requests and a test would
see what no request sees.
"""

import gc
import itertools
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask.testing import FlaskClient, FlaskCliRunner
from flask_migrate import upgrade
from sqlalchemy.engine import Connection, Engine, make_url

from app import create_app
from app.config import Settings
from app.extensions import db
from app.pools import RequestSession
from scripts import postgres

KINDS = ("sqlite", "postgres")
# What TEST_DATABASE_URL leads through: "pgbouncer", or nothing.
POOLER = os.environ.get("TEST_DB_POOLER", "")
OWN_POSTGRES = pytest.StashKey[Future[str]]()
SHARED_MEMORY = Path("/dev/shm")
ENOUGH_BYTES = 1 << 30


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--database", choices=KINDS, default="sqlite", help="what to run the suite on")


def pytest_configure(config: pytest.Config) -> None:
    for kind in KINDS:
        config.addinivalue_line("markers", f"{kind}: runs with --database {kind} only")
    config.addinivalue_line("markers", "direct: of connections to the server itself, so not run behind TEST_DB_POOLER")
    config.addinivalue_line("markers", "live: commits for real, on connections of its own; cleaned up afterwards")
    gc.disable()  # until all is imported
    if config.getoption("--database") == "postgres" and not config.option.collectonly:
        _start_postgres(config)


def _start_postgres(config: pytest.Config) -> None:
    """Start one of our own while pytest imports and collects, in a thread that is gone when the first test forks."""
    stack = ExitStack()

    def start() -> str:
        # Not below pytest's folder, which each run of pytest locks again for others: as root, Postgres runs as nobody.
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir=in_memory()))
        # It is thrown away. Commits are still written, since test_docs.py crashes it.
        return stack.enter_context(postgres.running(Path(folder) / "data", "test", settings={"fsync": "off"}))

    def stop() -> None:
        started.exception()  # waits until there is something to stop
        stack.close()

    with_one_thread = ThreadPoolExecutor(1)
    started = config.stash[OWN_POSTGRES] = with_one_thread.submit(start)
    with_one_thread.shutdown(wait=False)
    config.add_cleanup(stop)


def in_memory() -> str | None:
    """Where a database that is thrown away is quick: in memory, if there is room, else wherever temporary files are."""
    roomy = os.access(SHARED_MEMORY, os.W_OK) and shutil.disk_usage(SHARED_MEMORY).free > ENOUGH_BYTES
    return str(SHARED_MEMORY) if roomy else None


def pytest_collection_finish() -> None:
    """What is imported by now stays until the end, so the collector need not look at it again and again."""
    gc.freeze()
    gc.enable()


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
def own_postgres(pytestconfig: pytest.Config) -> str:
    """A real Postgres of our own for the length of the run. It may be filled, limited and crashed."""
    return pytestconfig.stash[OWN_POSTGRES].result()


@pytest.fixture(scope="session")
def postgres_url(request: pytest.FixtureRequest) -> str:
    """The real Postgres of this run: TEST_DATABASE_URL, or our own."""
    given = os.environ.get("TEST_DATABASE_URL")
    if not given:
        return str(request.getfixturevalue("own_postgres"))
    if "test" not in (make_url(given).database or ""):
        pytest.exit("TEST_DATABASE_URL must name a database with 'test' in its name: its tables are emptied", 2)
    return given


@pytest.fixture(scope="session")
def sqlite_files() -> Iterator[Iterator[Path]]:
    """One name after the other for files that are not there yet."""
    with tempfile.TemporaryDirectory(dir=in_memory()) as folder:
        yield (Path(folder) / f"{number}.db" for number in itertools.count())


@pytest.fixture(scope="session")
def environ_for(database_kind: str, request: pytest.FixtureRequest) -> Any:
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

    files = request.getfixturevalue("sqlite_files")
    migrated = next(files)
    _migrate({"APP_ENV": "testing", "DATABASE_URL": f"sqlite:///{migrated}"})

    def sqlite(**more: str) -> dict[str, str]:
        file = next(files)
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
    """The test's own app, which it may change. On Postgres all that it does is one transaction, rolled back at the end,
    unless the test is marked `live`; then the tables are emptied. On SQLite each test has a file of its own."""
    app: Flask = make_app()
    if database_kind == "sqlite":
        yield app
    elif request.node.get_closest_marker("live"):
        yield app
        _empty(app)
    else:
        with _in_one_transaction(app, request.getfixturevalue("aside")):
            yield app


@pytest.fixture(scope="session")
def aside(postgres_url: str) -> Iterator[Engine]:
    """A connection for the transactions around tests: the app's pool, which may be of one, is left to the app."""
    url = make_url(postgres_url).set(drivername="postgresql+psycopg")
    engine = sa.create_engine(url, pool_size=1, pool_pre_ping=True, connect_args={"prepare_threshold": None})
    yield engine
    engine.dispose()


@contextmanager
def _in_one_transaction(app: Flask, aside: Engine) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, aside.connect() as connection, connection.begin() as outer:
        patch.setattr(RequestSession, "get_bind", lambda *args, **kwargs: connection)
        patch.setitem(db.session.session_factory.kw, "join_transaction_mode", "create_savepoint")
        patch.setitem(app.extensions, "one_statement", lambda: savepoint(connection))
        yield
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


@pytest.fixture(scope="session")
def app_of_all(environ_for: Any) -> Flask:
    return create_app(Settings.from_env(environ_for()), web=True)


@pytest.fixture
def shared_app(
    app_of_all: Flask, database_kind: str, environ_for: Any, request: pytest.FixtureRequest
) -> Iterator[Flask]:
    """An app that many tests share, for those that change nothing about it: to make one takes longer than most of them.
    Its database is empty in each."""
    with ExitStack() as stack:
        if database_kind == "postgres":
            stack.enter_context(_in_one_transaction(app_of_all, request.getfixturevalue("aside")))
        else:
            empty = Path(make_url(environ_for()["DATABASE_URL"]).database or "")
            empty.replace(app_of_all.config["SQLALCHEMY_DATABASE_URI"].database)
        yield app_of_all
    with app_of_all.app_context():
        db.engine.dispose()


@pytest.fixture
def client(shared_app: Flask) -> FlaskClient:
    return shared_app.test_client()


@pytest.fixture
def runner(shared_app: Flask) -> FlaskCliRunner:
    return shared_app.test_cli_runner()


@pytest.fixture
def plain_environ() -> dict[str, str]:
    """The least that production accepts, with a database that nobody connects to."""
    return {
        "APP_ENV": "production",
        "DATABASE_URL": "postgresql://somebody:hunter2@db.invalid/somewhere",
        "SECRET_KEY": secrets.token_hex(32),
    }
