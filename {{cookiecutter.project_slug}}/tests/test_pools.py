"""The pools, asserted on the live engine: what is configured is what is in force."""

import os
import re
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from serving import wait_until
from sqlalchemy.engine import Connection, Engine, make_url
from sqlalchemy.exc import DBAPIError, IntegrityError

from app import create_app, defaults, pools
from app.config import Settings, SettingsError
from app.extensions import db
from app.models import Note
from app.pools import RequestSession

ROOM = {"DB_MAX_CONNECTIONS": "100", "APP_INSTANCES": "2"}  # whatever was baked


def engine_of(app: Flask) -> Engine:
    with app.app_context():
        return db.engine


@contextmanager
def superuser(url: str) -> Iterator[Connection]:
    engine = sa.create_engine(
        make_url(url).set(drivername="postgresql+psycopg", username="postgres"),
        poolclass=sa.NullPool,
        isolation_level="AUTOCOMMIT",
    )
    with engine.connect() as connection:
        yield connection


# --- which pool, per environment -------------------------------------------------------------------------------------


@pytest.mark.sqlite
def test_testing_has_a_null_pool_on_a_file(make_app: Any) -> None:
    """A real NullPool: on an in-memory database SQLAlchemy would silently put a StaticPool in its place."""
    engine = engine_of(make_app())
    assert type(engine.pool) is sa.NullPool
    assert engine.url.database
    assert Path(engine.url.database).is_file()


@pytest.mark.sqlite
@pytest.mark.parametrize("web", [True, False])
def test_development_has_a_queue_pool_of_the_plan(tmp_path: Path, web: bool) -> None:
    """On SQLite too: a thread a connection, and none over."""
    environ = ROOM | {"APP_ENV": "development", "DATABASE_URL": f"sqlite:///{tmp_path}/dev.db", "WEB_THREADS": "3"}
    engine = engine_of(create_app(Settings.from_env(environ), web=web))
    assert type(engine.pool) is sa.QueuePool
    assert (engine.pool.size(), engine.pool._max_overflow) == (3, 0)


def test_a_production_web_worker_has_a_queue_pool_of_the_plan(plain_environ: dict[str, str]) -> None:
    """As many connections as threads, no overflow, the last one used goes out first."""
    settings = Settings.from_env(plain_environ)
    pool = engine_of(create_app(settings, web=True)).pool
    assert type(pool) is sa.QueuePool
    assert (pool.size(), pool._max_overflow) == (settings.plan.threads, 0)
    assert (pool._timeout, pool._pool.use_lifo, pool._pre_ping) == (5, True, False)


def test_anything_else_in_production_has_a_null_pool(plain_environ: dict[str, str]) -> None:
    """A shell or a cron job must not keep connections that the web workers were promised."""
    assert type(engine_of(create_app(Settings.from_env(plain_environ))).pool) is sa.NullPool
    assert type(engine_of(create_app(Settings.from_env(plain_environ), web=False)).pool) is sa.NullPool


def test_gunicorn_is_recognised(plain_environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """gunicorn says who it is in the environment before it loads the app."""
    monkeypatch.setenv("SERVER_SOFTWARE", "gunicorn/27.0.1")
    assert type(engine_of(create_app(Settings.from_env(plain_environ))).pool) is sa.QueuePool


def test_the_guides_numbers_work(plain_environ: dict[str, str]) -> None:
    """20 and 0, in force on the live pool."""
    environ = plain_environ | ROOM | {"DB_POOL_SIZE": "20", "DB_MAX_OVERFLOW": "0"}
    pool = engine_of(create_app(Settings.from_env(environ), web=True)).pool
    assert isinstance(pool, sa.QueuePool)
    assert (pool.size(), pool._max_overflow) == (20, 0)


def test_the_guides_numbers_are_refused_where_they_do_not_fit(plain_environ: dict[str, str]) -> None:
    """With the sum that shows it."""
    environ = plain_environ | {"DB_POOL_SIZE": "20", "DB_MAX_OVERFLOW": "0", "APP_INSTANCES": "5"}
    with pytest.raises(SettingsError, match=r"5 instances x 20 connections .* = 100 > "):
        Settings.from_env(environ | {"DB_MAX_CONNECTIONS": "100"})


def test_options_are_not_shared_between_apps(plain_environ: dict[str, str]) -> None:
    """SQLAlchemy changes connect_args in place: SQLite's would reach Postgres, which could not connect any more."""
    settings = Settings.from_env(plain_environ)
    first, second = (pools.engine_options(settings, web=True) for _ in range(2))
    assert first == second
    assert first is not second
    assert first["connect_args"] is not second["connect_args"]


# --- what Postgres is asked for --------------------------------------------------------------------------------------


def arguments(environ: dict[str, str], *, web: bool = True) -> dict[str, Any]:
    given: dict[str, Any] = pools.engine_options(Settings.from_env(environ), web=web)["connect_args"]
    return given


def test_every_wait_on_the_network_is_limited(plain_environ: dict[str, str]) -> None:
    """A host may vanish while a connection is opened, is idle, or is waiting: each has a limit of its own."""
    given = arguments(plain_environ)
    assert given["connect_timeout"] == 3
    assert given["tcp_user_timeout"] < 10_000
    assert given["keepalives_idle"] + given["keepalives_interval"] * given["keepalives_count"] < 10
    assert given["target_session_attrs"] == "read-write"


def test_options_in_the_url_are_kept(plain_environ: dict[str, str]) -> None:
    """A search_path in DATABASE_URL is not lost to ours."""
    url = plain_environ["DATABASE_URL"] + "?options=-c%20search_path%3Dtenant"
    assert arguments(plain_environ | {"DATABASE_URL": url})["options"].startswith("-c search_path=tenant -c ")


def test_behind_a_pooler_nothing_belongs_to_the_session(plain_environ: dict[str, str]) -> None:
    """No prepared statements and no startup options: the next client would get them."""
    given = arguments(plain_environ | {"DB_POOLER": "pgbouncer"})
    assert given["prepare_threshold"] is None
    assert "options" not in given


# --- SQLite that does not lie ----------------------------------------------------------------------------------------


@pytest.mark.sqlite
def test_foreign_keys_are_enforced_on_every_connection(app: Flask) -> None:
    """NullPool opens a connection for each use, and SQLite forgets the pragma with each."""
    with app.app_context():
        for _ in range(2):
            with db.engine.begin() as connection:
                connection.exec_driver_sql("create table if not exists parent (id integer primary key)")
                connection.exec_driver_sql("create table if not exists child (parent_id references parent (id))")
            with db.engine.connect() as connection, pytest.raises(IntegrityError):
                connection.exec_driver_sql("insert into child values (7)")
        assert db.session.scalar(sa.text("pragma journal_mode")) == "wal"


@pytest.mark.live
def test_threads_see_each_others_commits_only(app: Flask) -> None:
    """Four threads, ten rows each, forty rows at the end; and nobody sees what is not committed."""
    seen: list[int] = []

    def write() -> None:
        for _ in range(10):
            with app.app_context():
                db.session.add(Note(title="x"))
                db.session.commit()

    with app.app_context():
        db.session.add(Note(title="uncommitted"))
        with app.app_context():  # another session, so another connection
            seen.append(len(db.session.scalars(sa.select(Note)).all()))
        db.session.rollback()
    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [0]
    with app.app_context():
        assert db.session.scalar(sa.select(sa.func.count()).select_from(Note)) == 40


# --- reads in one round trip -----------------------------------------------------------------------------------------


@contextmanager
def messages(engine: Engine, log: Path) -> Iterator[list[str]]:
    """What libpq sends to the server meanwhile, one entry a message that asks for an answer."""
    sent: list[str] = []
    with log.open("w") as file:
        traced: list[Any] = []

        def trace(connection: Any, *_: Any) -> None:
            connection.pgconn.trace(file.fileno())
            traced.append(connection)

        sa.event.listen(engine, "checkout", trace)
        yield sent
        sa.event.remove(engine, "checkout", trace)
        for connection in traced:
            connection.pgconn.untrace()
    lines = log.read_text().splitlines()
    sent += [line for line in lines if re.search(r"\tF\t\d+\t(Query|Sync)\b", line)]


@pytest.mark.postgres
@pytest.mark.direct
@pytest.mark.live
@pytest.mark.parametrize(
    ("method", "path", "body", "round_trips"),
    [
        ("GET", "/api/notes/1", None, 1),
        ("HEAD", "/api/notes/1", None, 1),
        ("GET", "/api/notes", None, 1),
        ("POST", "/api/notes", {"title": "x"}, 1),
        ("PUT", "/api/notes/1", {"title": "x"}, 1),
        ("DELETE", "/api/notes/1", None, 1),
        ("GET", "/livez", None, 0),
        ("GET", "/", None, 0),
    ],
)
def test_round_trips(  # noqa: PLR0917
    app: Flask, tmp_path: Path, method: str, path: str, body: object, round_trips: int
) -> None:
    """Counted in libpq: a read costs the statement alone, a write a transaction, liveness nothing."""
    client = app.test_client()
    client.post("/api/notes", json={"title": "x"})
    client.open(path, method=method, json=body)  # the first time may prepare
    with messages(engine_of(app), tmp_path / "trace") as sent:
        status = client.open(path, method=method, json=body).status_code
    assert status in {200, 201, 404}  # what is deleted is not there the second time
    assert len(sent) == round_trips, sent


@pytest.mark.live
def test_a_read_that_writes_is_refused(app: Flask) -> None:
    """What a GET wrote could not be rolled back, so the session refuses to send it."""

    def write() -> str:
        db.session.add(Note(title="x"))
        db.session.commit()
        return ""

    app.add_url_rule("/writes", view_func=write)
    assert app.test_client().get("/writes").status_code == 500
    with app.app_context():
        assert db.session.scalar(sa.select(sa.func.count()).select_from(Note)) == 0


@pytest.mark.live
def test_a_write_that_fails_leaves_nothing_behind(app: Flask) -> None:
    """Other methods run in a transaction, which goes with the request."""

    def write() -> str:
        db.session.add(Note(title="x"))
        db.session.flush()
        raise ZeroDivisionError

    app.add_url_rule("/fails", view_func=write, methods=["POST"])
    assert app.test_client().post("/fails").status_code == 500
    with app.app_context():
        assert db.session.scalar(sa.select(sa.func.count()).select_from(Note)) == 0


# --- connections that die, grow old, or are inherited ----------------------------------------------------------------


@pytest.mark.postgres
@pytest.mark.direct
@pytest.mark.live
def test_a_connection_that_the_server_closed_is_not_handed_out(app: Flask, postgres_url: str) -> None:
    """After a restart or a failover no request meets a dead connection, and no ping was paid for that."""
    client = app.test_client()
    ours, name = "from pg_stat_activity where application_name = :name", {"name": defaults.SERVICE_NAME}
    with superuser(postgres_url) as connection:
        for _ in range(3):
            assert client.get("/api/notes").status_code == 200
            assert connection.scalars(sa.text(f"select pg_terminate_backend(pid) {ours}"), name).all()
            wait_until(lambda: not connection.scalar(sa.text(f"select count(*) {ours}"), name))
            write = client.post("/api/notes", json={"title": "a write is not repeated, so it must not fail"})
            assert write.status_code == 201


@pytest.mark.postgres
@pytest.mark.live
def test_the_liveness_check_costs_no_message(app: Flask, tmp_path: Path) -> None:
    """Taking a connection out of the pool and putting it back says nothing to the server."""
    engine = engine_of(app)
    with engine.connect():
        pass
    with messages(engine, tmp_path / "trace") as sent, engine.connect():
        pass
    assert sent == []


@pytest.mark.postgres
@pytest.mark.live
def test_a_notice_is_not_a_death(app: Flask) -> None:
    """Readable is no proof: a message that waits to be read is read, and the connection stays."""
    engine = engine_of(app)
    with engine.connect() as connection:
        first = connection.scalar(sa.text("select pg_backend_pid()"))
        connection.rollback()
        raw: Any = connection.connection.dbapi_connection
        raw.autocommit = True
        raw.execute("listen something")
        raw.autocommit = False
    other = sa.create_engine(engine.url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    with other.connect() as connection:
        connection.execute(sa.text("notify something"))
    time.sleep(0.05)
    with engine.connect() as connection:
        assert connection.scalar(sa.text("select pg_backend_pid()")) == first


@pytest.mark.postgres
@pytest.mark.direct
@pytest.mark.live
def test_a_connection_does_not_outlive_its_time(make_app: Any) -> None:
    """And the times of connections that were opened together differ."""
    engine = engine_of(make_app(DB_MAX_LIFETIME="0.1"))
    pids = set()
    for wait in (0.11, 0):
        with engine.connect() as connection:
            pids.add(connection.scalar(sa.text("select pg_backend_pid()")))
        time.sleep(wait)
    assert len(pids) == 2

    lifetimes = set()
    guard = pools.ConnectionGuard(1000)
    unpooled = sa.create_engine(engine.url, poolclass=sa.NullPool)
    for _ in range(10):
        with unpooled.connect() as connection:
            record = connection.connection._connection_record
            guard.connected(connection.connection.dbapi_connection, record)  # type: ignore[arg-type]
            lifetimes.add(round(record.info["expires"]))
    assert len(lifetimes) > 5


@pytest.mark.postgres
@pytest.mark.live
def test_a_server_that_became_read_only_is_left(app: Flask, postgres_url: str) -> None:
    """After a failover the old primary still answers. Its refusal of a write counts as a disconnect."""
    engine = engine_of(app)
    client = app.test_client()
    assert client.post("/api/notes", json={"title": "x"}).status_code == 201
    with engine.connect() as connection:
        before = connection.scalar(sa.text("select pg_backend_pid()"))
        connection.execute(sa.text("set default_transaction_read_only = on"))
        connection.commit()
    assert client.post("/api/notes", json={"title": "x"}).status_code == 503
    assert client.post("/api/notes", json={"title": "x"}).status_code == 201
    with engine.connect() as connection:
        assert connection.scalar(sa.text("select pg_backend_pid()")) != before


@pytest.mark.postgres
@pytest.mark.live
def test_a_forked_child_shares_no_connection(app: Flask) -> None:
    """Parent and child read at the same time, and each only ever sees its own rows. It takes no hook of gunicorn's."""
    engine = engine_of(app)

    def own_rows(mark: str) -> bool:
        for _ in range(100):
            with engine.connect() as connection:
                if connection.scalar(sa.text("select :mark"), {"mark": mark}) != mark:
                    return False
        return True

    assert own_rows("before the fork")
    child = os.fork()
    if child == 0:
        right = False
        try:
            right = own_rows("child")
        finally:
            os._exit(0 if right else 1)
    with killed_after(20, child):  # where they do share one, each may wait for ever for what the other has read
        assert own_rows("parent")
        assert os.waitpid(child, 0)[1] == 0


@contextmanager
def killed_after(seconds: int, child: int) -> Iterator[None]:
    def ring(number: int, frame: object) -> None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise TimeoutError(f"not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# --- limits of the server --------------------------------------------------------------------------------------------


@pytest.mark.postgres
@pytest.mark.direct
@pytest.mark.live
@pytest.mark.parametrize("pooler", ["none", "pgbouncer"])
def test_the_timeouts_reach_the_server(make_app: Any, pooler: str) -> None:
    """As startup options, or inside the transaction where a pooler is in between."""
    app = make_app(DB_POOLER=pooler)
    with app.test_request_context(method="POST"):
        for name, value in {
            "statement_timeout": "15s",
            "lock_timeout": "10s",
            "idle_in_transaction_session_timeout": "15s",
        }.items():
            assert db.session.scalar(sa.text(f"show {name}")) == value


@pytest.mark.postgres
@pytest.mark.live
def test_outside_web_workers_a_statement_may_take_long(make_app: Any) -> None:
    """A migration builds an index."""
    with make_app(web=False).app_context():
        assert db.session.scalar(sa.text("show statement_timeout")) == "0"


@pytest.mark.postgres
@pytest.mark.live
def test_a_transaction_left_idle_is_ended_and_the_pool_survives(make_app: Any) -> None:
    """`idle in transaction` for ever would hold a connection and every row it locked."""
    app = make_app()
    engine = engine_of(app)
    with engine.connect() as connection:
        connection.execute(sa.text("set local idle_in_transaction_session_timeout = 20"))
        raw: Any = connection.connection.dbapi_connection
        assert select.select([raw], [], [], 10)[0]  # the server's last word
        with pytest.raises(DBAPIError, match="idle-in-transaction timeout"):
            connection.execute(sa.text("select 1"))
    assert app.test_client().get("/api/notes").status_code == 200
    assert engine.pool.checkedout() == 0  # type: ignore[attr-defined]


def test_the_session_is_ours(app: Flask) -> None:
    """A session of another class would read in transactions again."""
    with app.app_context():
        assert isinstance(db.session(), RequestSession)
