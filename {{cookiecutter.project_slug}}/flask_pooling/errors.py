"""Which errors of the database may be gone in a moment, and whether the request may be sent again."""

import sqlite3
from collections.abc import Callable
from typing import Any

import psycopg
from flask import current_app, g, has_request_context, request
from flask.typing import ResponseReturnValue
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

READ_ONLY_SQL_TRANSACTION = "25006"
# The beginnings of SQLSTATEs that may be gone in a moment: connection, conflict of transactions, resources, operator
# (which has the timeouts), object in use, lock not available, system and I/O error. Anything else, as a row that is too
# long for its index (54000), would be the same next time.
TRANSIENT = ("08", "40", "53", "57", "55006", "55P03", "58000", "58030")
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
    if not isinstance(error.orig, psycopg.OperationalError):
        return False
    # None: it was not the server who said it, but libpq, which got no connection or no answer.
    return error.orig.sqlstate is None or error.orig.sqlstate.startswith(TRANSIENT)


def next_handler(error: Exception, ours: Callable[..., Any]) -> ResponseReturnValue:
    """Flask chose our handler, since it is for the nearest class. If the app has one for a wider class, call that; else
    raise the error again."""
    handlers = current_app.error_handler_spec[None][None]
    for kind in type(error).__mro__:
        if kind in handlers and handlers[kind] is not ours:
            answer: ResponseReturnValue = current_app.ensure_sync(handlers[kind])(error)
            return answer
    raise error


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
