"""The project's docs/connection-pooling.md is true: its blocks are run, and its errors are made to happen.

tests/test_guide.py runs this in an installed project, by that project's pytest, since it needs what the project needs.

A block prints what stands in the document, where `…` is any text. Of times, which is longer has to hold.
"""

import os
import re
import select
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from functools import cache
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa

from app import create_app
from app.config import Settings
from app.extensions import db
from flask_pooling.cli import AFTERWARDS
from scripts import postgres

ROOT = Path.cwd()
NAMES = {name.upper() for name in Settings.model_fields}
TEXT = (ROOT / "docs" / "connection-pooling.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
ERRORS = re.findall(
    r"^\| [`*](.+?)[`*] \| .+ \| .+ \|$", TEXT.partition("\n## When an error appears\n")[2], re.MULTILINE
)

# These need PgBouncer or TLS, and neither is in a wheel. The template that this project was made from provokes them
# with a real PgBouncer, against this same document.
PROVOKED_BY_THE_TEMPLATE = {
    "SSL error: decryption failed or bad record mac",
    "unsupported startup parameter: options",
    "query_wait_timeout",
    "no more connections allowed (max_client_conn)",
}


# --- running what the document shows ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def own_postgres() -> Iterator[str]:
    """A Postgres that may be filled, limited and crashed."""
    with (
        tempfile.TemporaryDirectory() as folder,
        postgres.running(Path(folder) / "data", "test", settings={"fsync": "off"}) as url,
    ):
        yield url


@pytest.fixture
def reader(own_postgres: str) -> dict[str, str]:
    """The environment of somebody who tries the document's examples."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {"PATH": path, "APP_ENV": "development", "PYTHONPATH": str(ROOT)}


def run_python(code: str, folder: Path, environ: dict[str, str]) -> str:
    """Run a block as the only file of a folder."""
    (folder / "example.py").write_text(code)
    return run([sys.executable, "example.py"], folder, environ)


def run_command(line: str, environ: dict[str, str]) -> str:
    """Run a command line at the root of the project."""
    return run(["sh", "-c", line], ROOT, environ)


def run(command: list[str], folder: Path, environ: dict[str, str]) -> str:
    done = subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, timeout=60, check=False)
    return done.stdout + done.stderr


def in_child(action: Callable[[], object], folder: Path) -> None:
    """Run something in a forked process, which has the connections that we have."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(0)
    os.waitpid(child, 0)


def assert_prints(shown: str, printed: str) -> None:
    """Compare by the document's own rules."""
    milliseconds = r"[0-9]+\.[0-9]+(?= ms)"
    pattern = "".join(
        r"(?:.*\n)*?" if line == "…\n" else re.escape(line).replace("…", ".*?")
        for line in re.sub(milliseconds, "…", shown).splitlines(keepends=True)
    )
    assert re.fullmatch(pattern, printed), f"the document shows\n{shown}\nbut this is printed\n{printed}"
    in_document, in_fact = ([float(ms) for ms in re.findall(milliseconds, text)] for text in (shown, printed))
    assert [ms for _, ms in sorted(zip(in_document, in_fact, strict=True))] == sorted(in_fact), printed


def blocks(kind: str) -> list[Any]:
    return [
        pytest.param(code, id=f"block {number}")
        for number, (language, code) in enumerate(BLOCKS, 1)
        if language == kind
    ]


def needs_postgres(code: str) -> bool:
    return bool(re.search(r"DATABASE_URL\"\]|create_app\(\)$|pool check$", code, re.MULTILINE))


def with_database(code: str, reader: dict[str, str], url: str) -> dict[str, str]:
    return reader | ({"DATABASE_URL": url} if needs_postgres(code) else {})


@pytest.mark.parametrize("code", blocks("python"))
def test_python_blocks(code: str, tmp_path: Path, reader: dict[str, str], own_postgres: str) -> None:
    """Each is a whole program, and prints what its comments say."""
    expected = re.findall(r"^# prints: (.*)$", code, re.MULTILINE)
    assert expected
    assert_prints("\n".join(expected) + "\n", run_python(code, tmp_path, with_database(code, reader, own_postgres)))


@pytest.mark.parametrize("session", blocks("console"))
def test_console_blocks(session: str, reader: dict[str, str], own_postgres: str) -> None:
    """Each command prints the lines that follow it."""
    for command, shown in re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", session, re.MULTILINE):
        assert_prints(shown, run_command(command, with_database(session, reader, own_postgres)))


def test_no_block_is_left_out() -> None:
    """Those that are neither Python nor a command are PgBouncer's, and what `flask pool limit` prints for it."""
    assert {language for language, _ in BLOCKS} == {"python", "console", "ini", "sql"}
    assert [code.splitlines()[0] for language, code in BLOCKS if language == "ini"] == ["[pgbouncer]"]
    (limits,) = (code for language, code in BLOCKS if language == "sql")
    assert limits.rstrip().endswith(AFTERWARDS)
    assert TEXT.count("```") == 2 * len(BLOCKS)


# --- the errors ------------------------------------------------------------------------------------------------------

ANY_ERROR = (psycopg.Error, sqlite3.Error, sa.exc.SQLAlchemyError, TypeError)

# Makes an error happen, on a Postgres or in a folder, and returns its text.
Provoke = Callable[[str, Path], str]
PROVOKED: dict[str, Any] = {}


def provokes(message: str, *, on: str = "postgres") -> Callable[[Provoke], Provoke]:
    def register(provoke: Provoke) -> Provoke:
        PROVOKED[message] = pytest.param(message, provoke, on, id=message)
        return provoke

    return register


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(ANY_ERROR) as caught:
        action()
    return str(caught.value)


@pytest.fixture(scope="module")
def own_server(own_postgres: str) -> str:
    """A Postgres that may be filled, limited and crashed."""
    with psycopg.connect(own_postgres) as connection:
        connection.execute("create table if not exists notes (title text)")  # else it is the app's
    return own_postgres


def as_superuser(url: str) -> str:
    return url.replace("//app@", "//postgres@")


@provokes("QueuePool limit of size … overflow … reached, connection timed out, timeout …", on="sqlite")
def two_from_a_pool_of_one(url: str, folder: Path) -> str:
    engine = sa.create_engine(f"sqlite:///{folder}/test.db", pool_size=1, max_overflow=0, pool_timeout=0.02)
    with engine.connect():
        text = error_of(engine.connect)
    engine.dispose()
    return text


@cache
def fill(url: str) -> tuple[str, str]:
    """Open connections until an ordinary role can have no more, and then until nobody can."""
    with ExitStack() as stack:

        def error(url: str) -> str:
            return error_of(lambda: [stack.enter_context(psycopg.connect(url)) for _ in range(101)])

        return error(url), error(as_superuser(url))


@provokes("remaining connection slots are reserved for …")
def ordinary_slots_taken(url: str, folder: Path) -> str:
    return fill(url)[0]


@provokes("sorry, too many clients already")
def all_slots_taken(url: str, folder: Path) -> str:
    return fill(url)[1]


def limited(url: str, what: str) -> str:
    with psycopg.connect(as_superuser(url), autocommit=True) as superuser:
        superuser.execute(f"alter {what} connection limit 0".encode())
        try:
            return error_of(lambda: psycopg.connect(url))
        finally:
            superuser.execute(f"alter {what} connection limit -1".encode())


@provokes('too many connections for role "…"')
def role_limited(url: str, folder: Path) -> str:
    return limited(url, "role app")


@provokes('too many connections for database "…"')
def database_limited(url: str, folder: Path) -> str:
    return limited(url, "database test")


def wait_for_word(connection: "psycopg.Connection[Any]") -> None:
    """Wait until the server says something unasked, such as that it ends this connection."""
    assert select.select([connection], [], [], 10)[0], "the server says nothing"


@provokes("terminating connection due to administrator command")
def terminated(url: str, folder: Path) -> str:
    with psycopg.connect(url) as connection, psycopg.connect(url) as other:
        other.execute("select pg_terminate_backend(%s)", [connection.info.backend_pid])
        wait_for_word(connection)
        return error_of(lambda: connection.execute("select 1"))


@provokes("server closed the connection unexpectedly")
def killed(url: str, folder: Path) -> str:
    """Kill the process, as the kernel does when memory is short. Postgres restarts after that."""
    with psycopg.connect(url) as connection, psycopg.connect(url) as other:
        os.kill(connection.info.backend_pid, signal.SIGKILL)
        text = error_of(lambda: connection.execute("select pg_sleep(5)"))
        error_of(lambda: other.execute("select pg_sleep(5)"))  # the restart ends this one too: now it has begun
    for _ in range(500):
        try:
            psycopg.connect(url).close()
        except psycopg.OperationalError:
            time.sleep(0.02)
        else:
            return text
    raise AssertionError("the server does not come back")


def stopped(url: str, setting: str, statement: str) -> str:
    """Return the error of a statement on a connection with a setting."""
    with psycopg.connect(url, options=f"-c {setting}") as connection:
        return error_of(lambda: connection.execute(statement.encode()))


def stopped_while_idle(url: str, setting: str, *, in_transaction: bool) -> str:
    """Return the error of the first statement after the server has ended a connection with a setting."""
    with psycopg.connect(url, options=f"-c {setting}") as connection:
        if in_transaction:
            connection.execute("select 1")
        wait_for_word(connection)
        return error_of(lambda: connection.execute("select 1"))


@provokes("terminating connection due to idle-session timeout")
def idle(url: str, folder: Path) -> str:
    return stopped_while_idle(url, "idle_session_timeout=20", in_transaction=False)


@provokes("terminating connection due to idle-in-transaction timeout")
def idle_in_transaction(url: str, folder: Path) -> str:
    return stopped_while_idle(url, "idle_in_transaction_session_timeout=20", in_transaction=True)


@provokes("canceling statement due to statement timeout")
def slow(url: str, folder: Path) -> str:
    return stopped(url, "statement_timeout=20", "select pg_sleep(5)")


@provokes("canceling statement due to lock timeout")
def locked_out(url: str, folder: Path) -> str:
    with psycopg.connect(url) as other:
        other.execute("lock table notes")
        return stopped(url, "lock_timeout=20", "select * from notes")


@provokes("cannot execute INSERT in a read-only transaction")
def read_only(url: str, folder: Path) -> str:
    return stopped(url, "default_transaction_read_only=on", "insert into notes (title) values ('x')")


@provokes("server is in hot standby mode")
def a_replica(url: str, folder: Path) -> str:
    """Ask a server that only replays what another one has written."""
    with tempfile.TemporaryDirectory() as elsewhere:
        data = Path(elsewhere) / "replica"
        with postgres.running(data, "test"):
            pass
        (data / "standby.signal").touch()
        with postgres.running(data, "test") as replica:
            return error_of(lambda: psycopg.connect(replica, target_session_attrs="primary"))


@provokes("session is read-only")
def no_server_takes_writes(url: str, folder: Path) -> str:
    options = "-c default_transaction_read_only=on"
    return error_of(lambda: psycopg.connect(url, options=options, target_session_attrs="read-write"))


@provokes("another request's rows, and no error")
def rows_of_another(url: str, folder: Path) -> str:
    """Ask in one process, which ends before it has read the answer; the other process reads it as its own."""
    with psycopg.connect(url, autocommit=True) as connection:
        in_child(lambda: connection.pgconn.send_query(b"select 'another request''s rows'"), folder)
        (row,) = connection.execute("select 'mine'").fetchone() or ("none",)
        return f"{row}, and no error"


@provokes("lost synchronization with server")
def answer_read_in_parts(url: str, folder: Path) -> str:
    with psycopg.connect(url, autocommit=True) as connection:
        connection.pgconn.send_query(b"select repeat('x', 5000) from generate_series(1, 2000)")
        select.select([connection.pgconn.socket], [], [])
        in_child(connection.pgconn.consume_input, folder)
        result = connection.pgconn.get_result()
        return result.error_message.decode() if result else "no answer"


@provokes('prepared statement "_pg3_0" already exists')
def prepared_twice(url: str, folder: Path) -> str:
    with psycopg.connect(url, autocommit=True) as connection:
        in_child(lambda: connection.execute("select 1", prepare=True), folder)
        return error_of(lambda: connection.execute("select 1", prepare=True))


MERGED = "Invalid argument(s) 'pool_size','max_overflow' sent to create_engine(), using configuration …/NullPool/Engine"


@provokes(MERGED, on="sqlite")
def options_merged(url: str, folder: Path) -> str:
    return error_of(lambda: sa.create_engine("sqlite:///test.db", poolclass=sa.NullPool, pool_size=5, max_overflow=0))


@provokes("no such table: …", on="sqlite")
def memory_in_two_connections(url: str, folder: Path) -> str:
    engine = sa.create_engine("sqlite:///:memory:", poolclass=sa.NullPool)
    with engine.begin() as connection:
        connection.execute(sa.text("create table notes (title text)"))
    with engine.begin() as connection:
        return error_of(lambda: connection.execute(sa.text("select * from notes")))


@provokes("database is locked", on="sqlite")
def two_writers(url: str, folder: Path) -> str:
    file = folder / "test.db"
    with closing(sqlite3.connect(file)) as one, closing(sqlite3.connect(file, timeout=0.02)) as other:
        one.execute("begin immediate")
        return error_of(lambda: other.execute("begin immediate"))


@pytest.mark.parametrize(("message", "provoke", "on"), [*PROVOKED.values()])
def test_errors(message: str, provoke: Provoke, on: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """The document quotes the very words of the server, the driver or SQLAlchemy."""
    text = provoke(request.getfixturevalue("own_server") if on == "postgres" else "", tmp_path)
    assert re.search(re.escape(message).replace("…", ".+?"), text), text


def test_no_error_is_left_out() -> None:
    """Each error of the document is provoked, and each that is provoked stands in it."""
    assert len(ERRORS) == len(set(ERRORS))
    assert set(ERRORS) == PROVOKED.keys() | PROVOKED_BY_THE_TEMPLATE


# --- what the text says beside ---------------------------------------------------------------------------------------


def test_names_and_figures() -> None:
    """The settings and the metric that it names exist, and the time limits are the defaults."""
    assert set(re.findall(r"\b(?:APP|DB|WEB)_[A-Z_]+", TEXT)) <= NAMES
    assert "db_connection_hold_seconds" in (ROOT / "flask_pooling" / "metrics.py").read_text()
    limits = Settings(_env_file=None)
    assert (
        f"connect {limits.db_connect_timeout}, wait for the pool {limits.db_pool_timeout:g}, for a lock"
        f" {limits.lock_timeout:g}, run a statement {limits.db_statement_timeout:g}, a request {limits.web_timeout}."
    ) in " ".join(TEXT.split())


@pytest.mark.parametrize(("pool_size", "status"), [(1, 503), (2, 200)])
def test_a_request_with_two_connections(
    pool_size: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A context inside a request is a second session. With threads + 1 connections one thread cannot block itself."""
    environ = {
        "APP_ENV": "development",
        "DATABASE_URL": f"sqlite:///{tmp_path}/test.db",
        "DB_MAX_CONNECTIONS": "100",
        "APP_INSTANCES": "2",
        "WEB_CONCURRENCY": "2",
        "WEB_THREADS": "1",
        "DB_POOL_SIZE": str(pool_size),
        "DB_CONNECT_TIMEOUT": "2",
        "DB_POOL_TIMEOUT": "2",
    }
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("flask_pooling.process.in_gunicorn", True)
    app = create_app()

    def two() -> str:
        db.session.execute(sa.select(1))
        with app.app_context():
            db.session.execute(sa.select(1))
        return ""

    app.add_url_rule("/two", view_func=two)
    response = app.test_client().get("/two")
    assert response.status_code == status
    assert ("Retry-After" in response.headers) == (status == 503)
    with app.app_context():
        db.engine.dispose()


def test_connections_that_were_idle_too_long_are_replaced_unseen(
    own_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's idle_session_timeout is shorter than the pool keeps connections."""
    monkeypatch.setenv("APP_ENV", "development")
    monkeypatch.setenv("DATABASE_URL", f"{own_server}&options=-c%20idle_session_timeout%3D250")
    app = create_app()
    with app.app_context():
        pids = set()
        for _ in range(2):
            with db.engine.connect() as connection:
                pids.add(connection.scalar(sa.text("select pg_backend_pid()")))
                raw: Any = connection.connection.dbapi_connection
            wait_for_word(raw)
        assert len(pids) == 2
        db.engine.dispose()
