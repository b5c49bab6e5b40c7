"""The engines: what Postgres is asked for, connections that die or grow old or are inherited, and pools not counted."""

import os
import select
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from sqlalchemy.exc import DBAPIError, IntegrityError

import flask_pooling
from flask_pooling import SettingsError, engine, run
from flask_pooling.engine import engine_options
from scripts import postgres
from tests.library.conftest import engine_of, superuser
from tests.library.plain import NAME, Elsewhere, Item, Settings, db
from tests.library.test_run import messages
from tests.serving import ROOT, environment, free_port

MakePlain = Callable[..., Flask]
PID = sa.text("select pg_backend_pid()")


# --- what Postgres is asked for --------------------------------------------------------------------------------------


@pytest.mark.sqlite  # nobody connects: once is enough
@pytest.mark.usefixtures("production")
class TestArguments:
    """The driver's arguments."""

    def of(self, process: str = flask_pooling.WEB, more: str = "") -> dict[str, Any]:
        settings = Settings.load()
        url = settings.database_url.update_query_string(more)
        arguments: dict[str, Any] = engine_options(settings, url, process=process)["connect_args"]
        return arguments

    def test_every_wait_on_the_network_is_limited(self) -> None:
        """A host may vanish while a connection is opened, is idle, or is waiting: each has a limit of its own."""
        given = self.of()
        assert given["connect_timeout"] == 3
        assert given["tcp_user_timeout"] < 10_000
        assert given["keepalives_idle"] + given["keepalives_interval"] * given["keepalives_count"] < 10

    def test_options_in_the_url_are_kept(self) -> None:
        """A search_path in DATABASE_URL is not lost to ours."""
        options = self.of(more="options=-c search_path%3Dtenant")["options"]
        assert "-c statement_timeout=15000" in options
        assert options.endswith(" -c search_path=tenant")

    def test_behind_a_pooler_nothing_belongs_to_the_session(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """No prepared statements and no startup options: the next client would get them."""
        monkeypatch.setenv("DB_POOLER", "pgbouncer")
        given = self.of()
        assert given["prepare_threshold"] is None
        assert "options" not in given

    @pytest.mark.parametrize("process", ["web", "cli"])
    def test_the_server_hears_the_same_limits(self, process: str) -> None:
        """It would keep the connections of a dead host for hours. The URL's own word counts on both sides."""
        assert (
            "-c tcp_user_timeout=4000 -c tcp_keepalives_idle=3 -c tcp_keepalives_interval=1"
            in self.of(process)["options"]
        )
        options = self.of(process, more="keepalives_idle=30&tcp_user_timeout=60000")["options"]
        assert "-c tcp_user_timeout=60000 -c tcp_keepalives_idle=30 " in options

    def test_options_are_not_shared_between_engines(self) -> None:
        """SQLAlchemy changes connect_args in place."""
        first, second = self.of(), self.of()
        assert first == second
        assert first is not second


@pytest.mark.postgres
@pytest.mark.direct
@pytest.mark.parametrize("pooler", ["none", "pgbouncer"])
def test_the_time_limits_reach_the_server(make_plain: MakePlain, pooler: str) -> None:
    """As startup options, or inside the transaction where a pooler is in between; for `run` and the session alike."""
    with make_plain(DB_POOLER=pooler).app_context():
        for name, value in {
            "statement_timeout": "15s",
            "lock_timeout": "10s",
            "idle_in_transaction_session_timeout": "15s",
        }.items():
            show = sa.text(f"show {name}")
            assert (run(show)[0][0], db.session.scalar(show)) == (value, value)
            db.session.rollback()


@pytest.mark.postgres
@pytest.mark.direct
def test_a_dead_host_leaves_no_connections(make_plain: MakePlain, tmp_path: Path) -> None:
    """The server itself ends those whose other side is silent, within ten seconds, if it is across a network."""
    names = ["tcp_keepalives_idle", "tcp_keepalives_interval", "tcp_keepalives_count", "tcp_user_timeout"]
    columns = ", ".join(f"current_setting('{name}')" for name in names)
    settings = {"listen_addresses": "127.0.0.1", "port": str(free_port())}
    with postgres.running(tmp_path / "data", "plain", settings=settings) as on_a_socket:
        across = on_a_socket.partition("?")[0].replace("@/", f"@127.0.0.1:{settings['port']}/")
        for url, expected in (across, ("3", "1", "3", "4000")), (on_a_socket, ("0", "0", "0", "0")):
            with engine_of(make_plain(DATABASE_URL=url)).connect() as connection:
                assert connection.execute(sa.text(f"select {columns}")).one() == expected


@pytest.mark.postgres
@pytest.mark.parametrize("kind", [{"web": False}, {"job": "worker", "APP_JOBS": "worker=1x1"}])
def test_outside_web_workers_nothing_is_limited(make_plain: MakePlain, kind: dict[str, Any]) -> None:
    """A migration builds an index; a job reads, computes for longer than a statement may take, and writes."""
    with make_plain(**kind).app_context():
        for name in ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"):
            assert db.session.scalar(sa.text(f"show {name}")) == "0"


@pytest.mark.postgres
def test_a_transaction_left_idle_is_ended_and_the_pool_survives(plain: Flask) -> None:
    """`idle in transaction` for ever would hold a connection and every row it locked."""
    pool = engine_of(plain)
    with pool.connect() as connection:
        connection.execute(sa.text("set local idle_in_transaction_session_timeout = 20"))
        raw: Any = connection.connection.dbapi_connection
        assert select.select([raw], [], [], 10)[0]  # the server's last word
        with pytest.raises(DBAPIError, match="idle-in-transaction timeout"):
            connection.execute(sa.text("select 1"))
    assert plain.test_client().get("/items").status_code == 200
    assert pool.pool.checkedout() == 0  # type: ignore[attr-defined]


@pytest.mark.sqlite
def test_sqlite_enforces_foreign_keys_on_every_connection(plain: Flask) -> None:
    """SQLite forgets the pragma with each connection."""
    with plain.app_context():
        for _ in range(2):
            with db.engine.begin() as connection:
                connection.exec_driver_sql("create table if not exists parent (id integer primary key)")
                connection.exec_driver_sql("create table if not exists child (parent_id references parent (id))")
            with db.engine.connect() as connection, pytest.raises(IntegrityError):
                connection.exec_driver_sql("insert into child values (7)")
        assert db.session.scalar(sa.text("pragma journal_mode")) == "wal"


@pytest.mark.sqlite
@pytest.mark.parametrize("how", ["", "?mode=ro&uri=true"])
def test_another_sqlite_database_is_left_as_it_is(make_plain: Callable[..., Flask], tmp_path: Path, how: str) -> None:
    """It may be somebody else's, or not to be written."""
    file = tmp_path / "other.db"
    with closing(sqlite3.connect(file)) as other:
        other.execute("create table items (id integer primary key, name text)")
    app = make_plain(binds={"other": f"sqlite:///file:{file}{how}" if how else f"sqlite:///{file}"})
    with app.app_context():
        assert db.session.scalars(sa.select(Elsewhere)).all() == []
    with closing(sqlite3.connect(file)) as other:
        assert other.execute("pragma journal_mode").fetchone() == ("delete",)


# --- ordinary transactions -------------------------------------------------------------------------------------------


@pytest.mark.postgres
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_view_may_do_what_any_flask_sqlalchemy_view_may(plain: Flask, method: str) -> None:
    """Savepoints, a setting for the transaction, rows one by one, a lock; whatever the method is."""

    def view() -> list[Any]:
        with db.session.begin_nested():
            db.session.add(Item(name="kept"))
        with pytest.raises(ZeroDivisionError), db.session.begin_nested():
            db.session.add(Item(name="not kept"))
            db.session.flush()
            raise ZeroDivisionError
        db.session.execute(sa.text("select set_config('app.tenant', 'one', true)"))
        db.session.execute(sa.text("set local work_mem = '5MB'"))
        tenant = db.session.scalar(sa.text("select current_setting('app.tenant')"))
        names = [item.name for item in db.session.scalars(sa.select(Item).execution_options(yield_per=1))]
        db.session.scalars(sa.select(Item).with_for_update()).all()
        return [tenant, names, db.session.scalar(sa.text("show work_mem")), run(sa.text("show work_mem"))[0][0]]

    plain.add_url_rule("/view", view_func=view, methods=["GET", "POST"])
    answer = plain.test_client().open("/view", method=method).get_json()
    assert answer == ["one", ["kept"], "5MB", "5MB"]
    assert plain.test_client().get("/items").get_json() == []  # nobody has committed


@pytest.mark.postgres
@pytest.mark.direct
def test_a_setting_goes_with_its_transaction(plain: Flask) -> None:
    """`SET search_path` in one request is undone with the request's transaction, and the next one does not see it."""

    def tenant() -> str:
        db.session.execute(sa.text("set search_path = tenant"))
        return ""

    plain.add_url_rule("/tenant", view_func=tenant)
    for _ in range(8):
        assert plain.test_client().get("/tenant").status_code == 200
        with plain.app_context():
            assert run(sa.text("show search_path"))[0][0] == '"$user", public'


# --- connections that die, grow old, or are inherited ----------------------------------------------------------------


@pytest.mark.postgres
def test_the_liveness_check_costs_no_message(plain: Flask, tmp_path: Path) -> None:
    """Taking a connection out of the pool and putting it back says nothing to the server."""
    pool = engine_of(plain)
    with pool.connect():
        pass
    with messages(pool, tmp_path / "trace") as sent, pool.connect():
        pass
    assert sent == []


@pytest.mark.postgres
@pytest.mark.direct
@pytest.mark.parametrize("bind", [None, "other"])
def test_a_connection_that_the_server_closed_is_not_handed_out(two: Flask, own_postgres: str, bind: str | None) -> None:
    """After a restart or a failover no request meets a dead connection, in no database, and no ping was paid for it."""
    pool = engine_of(two, bind)
    with superuser(own_postgres) as admin:
        for _ in range(3):
            with pool.connect() as connection:
                pid = connection.scalar(PID)
            admin.execute("select pg_terminate_backend(%s, 5000)", [pid])
            with pool.connect() as connection:
                assert connection.scalar(PID) != pid


@pytest.mark.postgres
def test_a_notice_is_not_a_death(plain: Flask) -> None:
    """Readable is no proof: a message that waits to be read is read, and the connection stays."""
    pool = engine_of(plain)
    with pool.connect() as connection:
        first = connection.scalar(PID)
        connection.rollback()
        raw: Any = connection.connection.dbapi_connection
        raw.autocommit = True
        raw.execute("listen something")
        raw.autocommit = False
    other = sa.create_engine(pool.url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    with other.connect() as connection:
        connection.execute(sa.text("notify something"))
    time.sleep(0.05)
    with pool.connect() as connection:
        assert connection.scalar(PID) == first


@pytest.mark.postgres
@pytest.mark.direct
def test_a_connection_does_not_outlive_its_time(make_plain: MakePlain) -> None:
    """And the times of connections that were opened together differ."""
    pool = engine_of(make_plain(DB_MAX_LIFETIME=0.1))
    pids = set()
    for wait in (0.11, 0):
        with pool.connect() as connection:
            pids.add(connection.scalar(PID))
        time.sleep(wait)
    assert len(pids) == 2

    guard, lifetimes = engine.ConnectionGuard(1000), set()
    unpooled = sa.create_engine(pool.url, poolclass=sa.NullPool)
    for _ in range(10):
        with unpooled.connect() as connection:
            record = connection.connection._connection_record
            guard.connected(connection.connection.dbapi_connection, record)  # type: ignore[arg-type]
            lifetimes.add(round(record.info["expires"]))
    assert len(lifetimes) > 5


@pytest.mark.postgres
def test_a_connection_in_autocommit_is_not_lent(plain: Flask) -> None:
    """An interrupt at the wrong moment may leave one so, which would keep what a transaction rolls back. One whose
    engine is told to be in AUTOCOMMIT is lent."""
    pool = engine_of(plain)
    with pool.connect() as connection:
        left: Any = connection.connection.dbapi_connection
        left.autocommit = True
    with pool.connect() as connection:
        lent: Any = connection.connection.dbapi_connection
        assert lent is not left
        assert (left.closed, lent.autocommit) == (True, False)
    told = sa.create_engine(pool.url, isolation_level="AUTOCOMMIT")
    engine.watch(told, plain.extensions["flask_pooling"].settings, "web")
    for _ in range(2):
        with told.connect() as connection:
            assert connection.connection.dbapi_connection.autocommit  # type: ignore[union-attr]
    assert told.pool.checkedin() == 1  # type: ignore[attr-defined]
    told.dispose()


@pytest.mark.postgres
def test_a_server_that_became_read_only_is_left(plain: Flask) -> None:
    """After a failover the old primary still answers. Its refusal of a write counts as a disconnect."""
    pool = engine_of(plain)
    with pool.connect() as connection:
        before = connection.scalar(PID)
        connection.execute(sa.text("set default_transaction_read_only = on"))
        connection.commit()
    with pool.connect() as connection, pytest.raises(DBAPIError) as caught:
        connection.execute(sa.insert(Item).values(name="x"))
    assert caught.value.connection_invalidated
    with pool.begin() as connection:
        connection.execute(sa.insert(Item).values(name="x"))
        assert connection.scalar(PID) != before


@pytest.mark.postgres
@pytest.mark.parametrize("bind", [None, "other"])
def test_a_forked_child_shares_no_connection(two: Flask, bind: str | None) -> None:
    """Parent and child read at the same time, and each only ever sees its own rows. It takes no hook of gunicorn's."""
    pool = engine_of(two, bind)

    def own_rows(mark: str) -> bool:
        for _ in range(100):
            with pool.connect() as connection:
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


# --- pools that the plan does not count ------------------------------------------------------------------------------


@pytest.mark.postgres
def test_a_bind_that_is_counted_is_in_the_sum(two: Flask) -> None:
    """Every worker has two pools."""
    plan = two.extensions["flask_pooling"].settings.plan
    assert plan.connections_per_worker == 2 * plan.pool_size
    assert "x 2 databases" in plan.sum


@pytest.mark.sqlite
def test_a_dead_key_in_the_apps_config_is_refused(make_plain: MakePlain) -> None:
    """Flask-SQLAlchemy ignores it there, too."""
    app = Flask("dead")
    app.config["SQLALCHEMY_POOL_SIZE"] = 20
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite:///dead.db"
    with pytest.raises(SettingsError, match=r"SQLALCHEMY_POOL_SIZE=20: .*set DB_POOL_SIZE"):
        flask_pooling.init_app(app, db, make_plain().extensions["flask_pooling"].settings)


@pytest.mark.postgres
def test_a_shell_may_have_any_bind(make_plain: MakePlain, other_database: str) -> None:
    """It is in nobody's plan."""
    url = sa.make_url(other_database).set(drivername="postgresql+psycopg")
    assert make_plain(web=False, binds={"other": {"url": url}})


# --- what a process is -----------------------------------------------------------------------------------------------

CHILD = """
from app import create_app
print(create_app().extensions["flask_pooling"].process)
"""


@pytest.mark.postgres
def test_a_child_of_a_web_worker_is_not_one(environ: dict[str, str]) -> None:
    """Whatever it inherits: gunicorn's own variables are in its environment."""
    inherited = environment(SERVER_SOFTWARE="gunicorn/27", GUNICORN_PID="1")
    done = subprocess.run(
        [sys.executable, "-c", CHILD], env=inherited, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "cli\n"


@pytest.mark.postgres
@pytest.mark.direct
def test_the_servers_list_says_who_is_who(make_plain: MakePlain, own_postgres: str) -> None:
    """By application_name."""
    with (
        engine_of(make_plain()).connect(),
        engine_of(make_plain(web=False)).connect(),
        superuser(own_postgres) as admin,
    ):
        rows = admin.execute("select application_name from pg_stat_activity where usename = 'app'").fetchall()
    assert {NAME, f"{NAME}/cli"} <= {name for (name,) in rows}
