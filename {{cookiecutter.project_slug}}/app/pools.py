"""The pools: which one an environment gets, how its engine is configured, and what its connections are watched for.

Each pool renders one whole set of engine options; sets are never merged, because a `pool_size` that reaches a NullPool
is a TypeError, and a dict shared between two apps leaks one driver's arguments into the other.
"""

import os
import random
import select
import time
import weakref
from dataclasses import dataclass
from typing import Any

import psycopg
import sqlalchemy as sa
from flask import Flask, current_app, has_request_context, request
from flask_sqlalchemy.session import Session
from sqlalchemy import event, exc
from sqlalchemy.engine import Connection, Engine, ExceptionContext
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from app import defaults
from app.config import Environment, Settings

READ_METHODS = frozenset({"GET", "HEAD"})
READ_ONLY_SQL_TRANSACTION = "25006"
SQLITE_BUSY_SECONDS = 5

# A vanished host must be noticed within ten seconds, whatever a connection was doing: idle in the pool
# (tcp_user_timeout), waiting for an answer (keepalives), or being opened (connect_timeout). Each covers one case only.
TCP_USER_TIMEOUT_MS = 4000
KEEPALIVES = {"keepalives": 1, "keepalives_idle": 3, "keepalives_interval": 1, "keepalives_count": 3}
# How soon the server notices that the client of a running statement has gone (Postgres 14 and newer).
CLIENT_CONNECTION_CHECK_MS = 1000


@dataclass(frozen=True)
class NullPool:
    """A connection for each use: tests, and processes that are not web workers."""

    def engine_options(self) -> dict[str, Any]:
        return {"poolclass": sa.NullPool}


@dataclass(frozen=True, kw_only=True)
class QueuePool:
    """Connections that are kept: one for each thread of a web worker. The most recently used goes out first (LIFO), so
    that the ones a quiet hour does not need grow old and are closed."""

    size: int
    max_overflow: int
    timeout_seconds: float

    def engine_options(self) -> dict[str, Any]:
        return {
            "poolclass": sa.QueuePool,
            "pool_size": self.size,
            "max_overflow": self.max_overflow,
            "pool_timeout": self.timeout_seconds,
            "pool_use_lifo": True,
        }


def pool_for(settings: Settings, *, web: bool) -> NullPool | QueuePool:
    """The pool of this process. On Postgres only web workers keep connections: a shell, a cron job or a migration that
    pooled would hold a share of the budget for as long as it lives."""
    if settings.environment is Environment.TESTING or (settings.on_postgres and not web):
        return NullPool()
    return QueuePool(
        size=settings.plan.pool_size, max_overflow=settings.plan.max_overflow, timeout_seconds=settings.db_pool_timeout
    )


def engine_options(settings: Settings, *, web: bool) -> dict[str, Any]:
    """One fresh and whole set of options for `create_engine`."""
    options = pool_for(settings, web=web).engine_options()
    if settings.plan.pooler == "none" or not settings.on_postgres:
        # What most requests need is the state that connections rest in, so that nothing has to be switched for it.
        options |= {"isolation_level": "AUTOCOMMIT", "skip_autocommit_rollback": True}
    options["connect_args"] = _postgres_arguments(settings, web=web) if settings.on_postgres else _sqlite_arguments()
    return options


def _sqlite_arguments() -> dict[str, Any]:
    return {"timeout": SQLITE_BUSY_SECONDS}


def _postgres_arguments(settings: Settings, *, web: bool) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "application_name": defaults.SERVICE_NAME if web else f"{defaults.SERVICE_NAME}/cli",
        "connect_timeout": settings.db_connect_timeout,
        "tcp_user_timeout": TCP_USER_TIMEOUT_MS,
        "target_session_attrs": "read-write",
        **KEEPALIVES,
    }
    if settings.plan.pooler == "pgbouncer":
        # A statement prepared on one server connection is unknown to the next one that the pooler hands out, and
        # startup options are refused (before 1.20) or would belong to whoever gets the server connection.
        arguments["prepare_threshold"] = None
        return arguments
    from_url = settings.database_url.query.get("options", "")
    timeouts = _timeouts(settings, web=web) | {"client_connection_check_interval": CLIENT_CONNECTION_CHECK_MS}
    arguments["options"] = " ".join(
        [str(from_url), *(f"-c {name}={value}" for name, value in timeouts.items())]
    ).strip()
    return arguments


def _timeouts(settings: Settings, *, web: bool) -> dict[str, int]:
    """In milliseconds. Outside web workers a statement may run long: migrations build indexes."""
    limits = {
        "idle_in_transaction_session_timeout": settings.db_statement_timeout,
        "lock_timeout": settings.lock_timeout,
    }
    if web:
        limits["statement_timeout"] = settings.db_statement_timeout
    return {name: round(seconds * 1000) for name, seconds in limits.items()}


class RequestSession(Session):
    """A session that sends reads without a transaction.

    BEGIN, SELECT, ROLLBACK are three round trips; at READ COMMITTED a request that only reads gains nothing from the
    first and the last. So in GET and HEAD requests the session uses the engine in AUTOCOMMIT, and refuses
    to flush and to execute an INSERT, UPDATE or DELETE: what is written there could not be rolled back.
    """

    def get_bind(self, *args: Any, **kwargs: Any) -> Engine | Connection:
        bind = super().get_bind(*args, **kwargs)
        if not reading():
            return bind
        if getattr(kwargs.get("clause"), "is_dml", False):
            raise _must_not_write()
        statements: Engine = current_app.extensions["statements"]
        return statements

    def flush(self, objects: Any = None) -> None:
        if reading() and (self.new or self.dirty or self.deleted):
            raise _must_not_write()
        super().flush(objects)


def _must_not_write() -> RuntimeError:
    return RuntimeError(f"a {request.method} request must not write: it runs without a transaction")


def reading() -> bool:
    """Whether the current request, if any, is one that only reads."""
    return has_request_context() and request.method in READ_METHODS


def watch(app: Flask, engine: Engine, settings: Settings, *, web: bool) -> Engine:
    """Attach what has to happen at connect, checkout, begin, error and fork. Call it once for each engine.

    :return: the engine for transactions. It is the same one, with the same pool: on `engine` itself, which
        `extensions.run` uses, each statement is a transaction of its own.
    """
    _engines.add(engine)
    app.extensions["statements"] = engine
    app.extensions["one_statement"] = engine.connect  # there is nothing to begin and to commit
    _listen(engine, settings, web=web)
    if settings.plan.pooler != "none" and settings.on_postgres:
        app.extensions["one_statement"] = engine.begin  # the timeouts reach the server inside a transaction only
        return engine
    return engine.execution_options(isolation_level="READ COMMITTED" if settings.on_postgres else "SERIALIZABLE")


def _listen(engine: Engine, settings: Settings, *, web: bool) -> None:
    if not settings.on_postgres:
        event.listen(engine, "connect", _prepare_sqlite)
        return
    event.listen(engine, "handle_error", _disconnect_when_read_only)
    if settings.plan.pooler == "pgbouncer":
        set_local = "; ".join(f"SET LOCAL {name} = {value}" for name, value in _timeouts(settings, web=web).items())
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(set_local))
    if isinstance(pool_for(settings, web=web), QueuePool):
        guard = ConnectionGuard(settings.db_max_lifetime)
        event.listen(engine, "connect", guard.connected)
        event.listen(engine, "checkout", guard.checked_out)


class ConnectionGuard:
    """Never hand out a connection that the server has closed, nor one that is too old. Costs no round trip.

    An idle connection has nothing to say; once the server has closed it (restart, failover, idle timeout,
    pg_terminate_backend) its socket is readable. Readable is no proof, since TLS and notices leave bytes too, so only
    then a ping decides. A host that vanished without a word is left to the TCP limits above.
    """

    def __init__(self, max_lifetime: float) -> None:
        self.max_lifetime = max_lifetime

    def connected(self, connection: "psycopg.Connection[Any]", record: ConnectionPoolEntry) -> None:
        poller = select.poll()
        poller.register(connection.fileno(), select.POLLIN)
        record.info["readable"] = poller.poll
        # Connections are opened together, at a start or a restart: without jitter they would expire together.
        record.info["expires"] = time.monotonic() + self.max_lifetime * random.uniform(0.5, 1)  # noqa: S311

    def checked_out(
        self, connection: "psycopg.Connection[Any]", record: ConnectionPoolEntry, proxy: PoolProxiedConnection
    ) -> None:
        if record.info["readable"](0) and not _answers(connection):
            raise exc.DisconnectionError("the server closed this connection while it was idle")
        if time.monotonic() > record.info["expires"]:
            raise exc.DisconnectionError("this connection has reached DB_MAX_LIFETIME")


def _answers(connection: "psycopg.Connection[Any]") -> bool:
    try:
        before, connection.autocommit = connection.autocommit, True  # or the ping would leave a transaction open
        connection.execute("")
        connection.autocommit = before
    except psycopg.Error:
        return False
    return True


def _disconnect_when_read_only(context: ExceptionContext) -> None:
    """After a failover the old primary accepts connections and refuses writes, for ever. Treat that as a disconnect:
    the pool reconnects, and target_session_attrs finds the server that takes writes."""
    if getattr(context.original_exception, "sqlstate", None) == READ_ONLY_SQL_TRANSACTION:
        context.is_disconnect = True


def _prepare_sqlite(connection: DBAPIConnection, record: ConnectionPoolEntry) -> None:
    """SQLite forgets both for each connection that is opened, and NullPool opens one for each use."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA foreign_keys = ON")
    cursor.execute("PRAGMA journal_mode = WAL")
    cursor.close()


_engines: "weakref.WeakSet[Engine]" = weakref.WeakSet()


def _empty_pools() -> None:
    """Two processes on one socket read each other's rows. Every forked child therefore starts with empty pools; the
    connections stay open (`close=False`), since the parent still uses them. This covers gunicorn's workers with a
    preloaded app, where a fork hook of its own would need an app context, and any other fork as well."""
    for engine in list(_engines):
        engine.dispose(close=False)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_empty_pools)
