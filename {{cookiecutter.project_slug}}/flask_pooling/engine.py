"""The pools: the options of an engine, and the checks of its connections.

Each pool renders one whole set of engine options. Sets are never merged: a `pool_size` that reaches a NullPool is a
TypeError, and a dict shared between two engines leaks one driver's arguments into the other.
"""

import functools
import inspect
import os
import random
import select
import time
import weakref
from collections.abc import Callable
from typing import Any

import psycopg
import sqlalchemy as sa
from sqlalchemy import event, exc
from sqlalchemy.engine import URL, Engine, ExceptionContext
from sqlalchemy.engine.default import DefaultDialect as Dialect
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from flask_pooling import metrics, urls
from flask_pooling.errors import READ_ONLY_SQL_TRANSACTION
from flask_pooling.process import CLI, WEB
from flask_pooling.settings import Settings

SQLITE_BUSY_SECONDS = 5

# A vanished host must be noticed within ten seconds, whatever a connection does: it is idle in the pool
# (tcp_user_timeout), waits for an answer (keepalives), or is being opened (connect_timeout).
TCP_USER_TIMEOUT_MS = 4000
KEEPALIVES = {"keepalives": 1, "keepalives_idle": 3, "keepalives_interval": 1, "keepalives_count": 3}
# The server has to notice a vanished client as well: the connections of a dead host are missing for the instance that
# replaces it. By default the server keeps them for two hours. It gets the values of the client's side, those in the URL
# included. The second setting is how soon it notices that the client of a running statement has gone (Postgres 14 and
# newer).
SERVER_SIDE = {"tcp_user_timeout": "tcp_user_timeout"} | {
    f"tcp_{name}": name for name in KEEPALIVES if name != "keepalives"
}
CLIENT_CONNECTION_CHECK_MS = 1000
# The settings that a new connection has: the role's in the database, or else the server's.
DEFAULTS = "select name, reset_val from pg_settings where name = any(%s)"
LONGEST_APPLICATION_NAME = 63  # Postgres cuts it there
SKIPS_ROLLBACK = "skip_autocommit_rollback" in inspect.signature(Dialect.__init__).parameters  # since SQLAlchemy 2.0.43


class NullPool:
    """A connection for each use: tests, and processes that the plan does not count."""

    @staticmethod
    def engine_options(settings: Settings, process: str) -> dict[str, Any]:
        return {"poolclass": sa.NullPool}


class QueuePool:
    """Connections that are kept: one for each thread of a web worker, or a job's share. The one that was used last is
    lent first (LIFO). One that is older than DB_MAX_LIFETIME is replaced when it is lent again."""

    @staticmethod
    def engine_options(settings: Settings, process: str) -> dict[str, Any]:
        """Return the pool that the plan gives to this kind of process."""
        job = settings.app_jobs.get(process)
        return {
            "poolclass": metrics.QueuePool,
            "pool_size": job.connections if job else settings.plan.pool_size,
            "max_overflow": 0 if job else settings.plan.max_overflow,
            "pool_timeout": settings.db_pool_timeout,
            "pool_use_lifo": True,
        }


def engine_options(
    settings: Settings, url: str | URL, *, process: str = CLI, pool: type[NullPool] | type[QueuePool] | None = None
) -> dict[str, Any]:
    """Return a new and whole set of options for one engine: SQLALCHEMY_ENGINE_OPTIONS, or a bind's.

    :param process: `web`, a job's name, or `cli` for anything else.
    :param pool: by default a QueuePool for web workers and jobs, and a NullPool for anything else.
    """
    if pool is None:
        pool = NullPool if process == CLI else QueuePool
    options = pool.engine_options(settings, process)
    url = sa.make_url(url)
    if url.get_backend_name() == "postgresql":
        options["connect_args"] = _postgres_arguments(settings, url, process)
        # `run` sends single statements in AUTOCOMMIT; without this each would be followed by a ROLLBACK of nothing.
        if SKIPS_ROLLBACK:
            options["skip_autocommit_rollback"] = True
    else:
        options["connect_args"] = {"timeout": SQLITE_BUSY_SECONDS}
    return options


def _postgres_arguments(settings: Settings, url: URL, process: str) -> dict[str, Any]:
    said = urls.said(url)
    hosts = url.query.get("host") or url.host or said.get("host") or ""
    has_several_hosts = "," in hosts if isinstance(hosts, str) else len(hosts) > 1
    arguments: dict[str, Any] = {
        "client_encoding": "utf8",  # a database in SQL_ASCII would make psycopg answer in bytes
        "connect_timeout": settings.db_connect_timeout,
        "tcp_user_timeout": TCP_USER_TIMEOUT_MS,
        # Never a standby. A provider makes a primary read-only when its disk is full: another server that takes writes
        # is used then, and if there is no other, reads are still served.
        "target_session_attrs": "read-write" if has_several_hosts else "primary",
        **KEEPALIVES,
    }
    if "db_connect_timeout" in settings.model_fields_set and "connect_timeout" not in url.query:
        said.pop("connect_timeout", None)  # DB_CONNECT_TIMEOUT is for this service, PGCONNECT_TIMEOUT for every client
    arguments |= {name: said[name] for name in arguments.keys() & said.keys()}
    arguments["application_name"] = name_of(process, said.get("application_name") or settings.service_name)
    if settings.db_pooler == "pgbouncer":
        # A statement that was prepared on one server connection is unknown to the next one. Startup options are refused
        # (before PgBouncer 1.20), or would apply to the next client of the server connection.
        arguments["prepare_threshold"] = None
        return arguments
    limits = time_limits(settings) if process == WEB else {}
    limits |= {"client_connection_check_interval": CLIENT_CONNECTION_CHECK_MS}
    limits |= {server_side: arguments[name] for server_side, name in SERVER_SIDE.items()}
    ours = " ".join(f"-c {name}={value}" for name, value in limits.items())
    arguments["options"] = f"{ours} {said.get('options', '')}".strip()  # of two, Postgres takes the last
    return arguments


def name_of(process: str, name: str) -> str:
    """Return the application_name of a process. One that is no web worker adds its kind: `service/worker`."""
    return (name if process == WEB else f"{name}/{process}")[:LONGEST_APPLICATION_NAME]


def time_limits(settings: Settings) -> dict[str, int]:
    """Return the limits of a web worker, in milliseconds. Other processes have none: a migration builds indexes, and a
    job may compute for as long as it likes between two statements."""
    limits = {
        "statement_timeout": settings.db_statement_timeout,
        "lock_timeout": settings.lock_timeout,
        "idle_in_transaction_session_timeout": settings.db_statement_timeout,
    }
    return {name: round(seconds * 1000) for name, seconds in limits.items()}


def empty_at_fork(engine: Engine) -> None:
    """Empty this engine's pool in every forked child."""
    _engines.add(engine)


def watch(engine: Engine, settings: Settings, process: str, *, is_own: bool = True) -> None:
    """Attach what has to happen at connect, checkout, begin and error. Call it once for each engine.

    :param is_own: it is the service's own database. Another SQLite file may belong to somebody else, or be read-only.
    """
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _pragma("foreign_keys = ON"))
        if is_own:  # readers do not wait for a writer; SQLite keeps this mode in the file
            event.listen(engine, "connect", _pragma("journal_mode = WAL"))
    if engine.dialect.name != "postgresql":
        return
    event.listen(engine, "handle_error", _disconnect_when_read_only)
    if settings.db_pooler == "pgbouncer":
        limits = _pooled[engine.dialect] = PooledLimits(settings, process)
        event.listen(engine, "connect", limits.connected)
        event.listen(engine, "begin", limits.begun)
    if isinstance(engine.pool, sa.QueuePool):
        guard = ConnectionGuard(settings.db_max_lifetime)
        event.listen(engine, "connect", guard.connected)
        event.listen(engine, "checkout", guard.checked_out)


class PooledLimits:
    """The time limits behind a pooler, which takes no startup options.

    If the role has them in the database (`flask pool limit` sets that), each connection of the server has them, and
    none is sent. Otherwise each transaction sends them. A process that is no web worker takes its role's limits off in
    the same way. Each connection that is opened asks for the role's limits, and the last answer counts for all: nobody
    knows which server connection the pooler lends next.
    """

    def __init__(self, settings: Settings, process: str) -> None:
        self.limits, self.process = time_limits(settings), process
        self.set_local: str | None = None  # not asked yet

    def connected(self, connection: "psycopg.Connection[Any]", record: ConnectionPoolEntry) -> None:
        before, connection.autocommit = connection.autocommit, True
        given = dict(connection.execute(DEFAULTS, [list(self.limits)]).fetchall())
        connection.autocommit = before
        is_web = self.process == WEB
        wrong = {name: limit for name, limit in self.limits.items() if (given[name] != str(limit)) == is_web}
        self.set_local = "; ".join(f"SET LOCAL {name} = {limit if is_web else 0}" for name, limit in wrong.items())

    def begun(self, connection: sa.Connection) -> None:
        if self.set_local:
            connection.exec_driver_sql(self.set_local)


def needs_transactions(engine: Engine) -> bool:
    """Return whether statements need a transaction, for their time limits or for the sake of a listener for `begin`."""
    limits = _pooled.get(engine.dialect)
    has_limits = limits is None or limits.set_local == ""
    return not has_limits or any(limits is None or each != limits.begun for each in engine.dispatch.begin)


class ConnectionGuard:
    """Never lend a connection that the server has closed, that is too old, or that was left in AUTOCOMMIT. The check
    costs no round trip.

    Nothing arrives on an idle connection. Once the server has closed it (restart, failover, idle timeout,
    pg_terminate_backend), its socket is readable. TLS and notices leave bytes as well, so a ping then decides. The TCP
    limits above notice a host that has vanished.
    """

    def __init__(self, max_lifetime: float) -> None:
        self.max_lifetime = max_lifetime

    def connected(self, connection: "psycopg.Connection[Any]", record: ConnectionPoolEntry) -> None:
        poller = select.poll()
        poller.register(connection.fileno(), select.POLLIN)
        record.info["readable"] = poller.poll
        record.info["autocommit"] = connection.autocommit
        # Connections are opened together at a start: without jitter they would expire together.
        record.info["expires"] = time.monotonic() + self.max_lifetime * random.uniform(0.5, 1)  # noqa: S311

    def checked_out(
        self, connection: "psycopg.Connection[Any]", record: ConnectionPoolEntry, proxy: PoolProxiedConnection
    ) -> None:
        if record.info["readable"](0) and not _answers(connection):
            raise exc.DisconnectionError("the server closed this connection while it was idle")
        if time.monotonic() > record.info["expires"]:
            raise exc.DisconnectionError("this connection has reached DB_MAX_LIFETIME")
        if connection.autocommit != record.info["autocommit"]:
            # An interrupt has stopped SQLAlchemy after it had set this for `run`, and before it noted the reset.
            raise exc.DisconnectionError("this connection was left in AUTOCOMMIT")


def _answers(connection: "psycopg.Connection[Any]") -> bool:
    try:
        before, connection.autocommit = connection.autocommit, True  # or the ping would leave a transaction open
        connection.execute("")
        connection.autocommit = before
    except psycopg.Error:
        return False
    return True


def _disconnect_when_read_only(context: ExceptionContext) -> None:
    """Treat a refused write as a disconnect: after a failover the old primary accepts connections and refuses writes
    for ever. The pool reconnects, to the server that takes writes. If it is no standby but a primary that is read-only,
    only this connection is replaced, and readers keep theirs."""
    if getattr(context.original_exception, "sqlstate", None) != READ_ONLY_SQL_TRANSACTION or not context.connection:
        return
    driver: Any = context.connection.connection.dbapi_connection
    # What the server has reported without being asked (since Postgres 14).
    standby, read_only = map(driver.info.parameter_status, ("in_hot_standby", "default_transaction_read_only"))
    if (standby, read_only) == ("off", "off"):
        return  # the server takes writes: the app had begun a read-only transaction
    context.is_disconnect = True
    context.invalidate_pool_on_disconnect = standby != "off"


def _pragma(setting: str) -> Callable[[Any, ConnectionPoolEntry], None]:
    """Set it on each new connection: SQLite does not keep it, and NullPool opens a connection for each use."""
    return lambda connection, record: connection.execute(f"PRAGMA {setting}").close()


_engines: "weakref.WeakSet[Engine]" = weakref.WeakSet()
# By the dialect, which an engine shares with those that are made from it by execution_options.
_pooled: "weakref.WeakKeyDictionary[Any, PooledLimits]" = weakref.WeakKeyDictionary()


def empty_pools(*, close: bool) -> None:
    """Start every forked child with empty pools: two processes on one socket read each other's rows. The connections
    stay open (`close=False`), since the parent still uses them. This covers gunicorn's workers and any other fork."""
    for engine in list(_engines):
        engine.dispose(close=close)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=functools.partial(empty_pools, close=False))
