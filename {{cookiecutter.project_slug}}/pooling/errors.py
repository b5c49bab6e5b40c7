"""Which errors of the database may be gone in a moment, and whether the request may be sent again."""

import sqlite3

import psycopg
from flask import g, has_request_context, request
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

READ_ONLY_SQL_TRANSACTION = "25006"
SQLITE_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})


def is_transient(error: Exception) -> bool:
    """Whether it was the database's state and not the statement: a pool that stayed full, a server that is gone or
    restarting, a statement or a lock that took too long."""
    if isinstance(error, PoolTimeoutError):
        return True
    if not isinstance(error, DBAPIError):
        return False
    if error.connection_invalidated:
        return True
    if isinstance(error.orig, sqlite3.Error):
        return getattr(error.orig, "sqlite_errorcode", None) in SQLITE_BUSY
    return isinstance(error.orig, psycopg.OperationalError)


def reason(error: Exception) -> str:
    """What a client may be told."""
    if getattr(getattr(error, "orig", None), "sqlstate", None) == READ_ONLY_SQL_TRANSACTION:
        return "The database is read-only at the moment: nothing was written, and reads are served."
    return "The database did not serve this request."


def may_have_written() -> bool:
    """Whether the current request may have changed something, so that nobody should be asked to send it again. It
    cannot have if its method is safe, nor if it never got a connection."""
    return request.method not in SAFE_METHODS and bool(g.get("pooling_connected"))


def note_a_connection() -> None:
    """The current request, if there is one, has had a connection."""
    if has_request_context():
        g.pooling_connected = True
