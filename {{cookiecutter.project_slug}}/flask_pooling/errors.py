"""Tell transient errors of the database from the app's mistakes, and report them."""

import logging
import sqlite3
import time
from collections.abc import Callable
from typing import Any

import psycopg
from flask import Flask, Response, current_app, got_request_exception, has_request_context, request
from flask.typing import ResponseReturnValue
from sqlalchemy.exc import DBAPIError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

log = logging.getLogger(__name__)

READ_ONLY_SQL_TRANSACTION = "25006"
# SQLSTATEs that begin so may be gone in a moment: connection, conflict of transactions, resources, operator, object in
# use, lock not available, system and I/O error. Any other, such as a row that is too long for its index (54000), would
# be the same next time.
TRANSIENT = ("08", "40", "53", "57", "55006", "55P03", "58000", "58030")
# These would be the same next time as well: the limit of a temporary file, a statement past DB_STATEMENT_TIMEOUT, a
# transaction that was idle for as long, one past transaction_timeout. For some the server closes the connection.
THE_APPS = frozenset({"53400", "57014", "25P03", "25P04"})
SQLITE_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
CONNECTED = "flask_pooling.connected"  # in the request's environ; `g` may last for several requests of a test
# An outage fails every request, so the log gets one line in so many seconds.
LOG_EVERY_SECONDS = 5


def answer_errors(app: Flask, answer: Callable[[Exception], ResponseReturnValue] | None = None) -> None:
    """Answer transient errors of the database with 503, and report them. The app's mistakes go the way that they went
    before.

    :param answer: makes the answer from the error. Without it, the answer is plain text.
    """

    def handle(error: Exception) -> ResponseReturnValue:
        if not is_transient(error):
            return next_handler(error, handle)
        report(error)
        return (answer or _plain)(error)

    for kind in (PoolTimeoutError, OperationalError, InterfaceError, InternalError):  # IntegrityError is the app's
        app.register_error_handler(kind, handle)


def _plain(error: Exception) -> Response:
    return Response(reason(error), 503, retry_after(), mimetype="text/plain")


def is_transient(error: Exception) -> bool:
    """Return whether the database's state was the cause, and not the statement: a pool that stayed full, a server that
    is gone or restarting, a lock that was held too long."""
    if isinstance(error, PoolTimeoutError):
        return True
    if not isinstance(error, DBAPIError) or (sqlstate := getattr(error.orig, "sqlstate", None)) in THE_APPS:
        return False
    if error.connection_invalidated:
        return True
    if isinstance(error.orig, sqlite3.Error):
        return getattr(error.orig, "sqlite_errorcode", None) in SQLITE_BUSY
    if not isinstance(error.orig, psycopg.OperationalError):
        return False
    # Without an SQLSTATE libpq failed, and not the server. If there was a statement, the connection is not lost: libpq
    # refused the statement, as it does with 65,536 parameters.
    return error.statement is None if sqlstate is None else sqlstate.startswith(TRANSIENT)


def report(error: Exception) -> None:
    """Report a transient error to `got_request_exception`, where error trackers listen, and to the log: the first one,
    and then one in LOG_EVERY_SECONDS, with the number of those that were left out."""
    app: Flask = current_app._get_current_object()  # type: ignore[attr-defined]  # as Flask does it for its signals
    got_request_exception.send(app, _async_wrapper=app.ensure_sync, exception=error)
    seen, now = app.extensions.setdefault("flask_pooling.errors", {"next": 0.0, "left_out": 0}), time.monotonic()
    if now < seen["next"]:
        seen["left_out"] += 1
        return
    left_out = f" (and {seen['left_out']} more since the last line)" if seen["left_out"] else ""
    seen.update(next=now + LOG_EVERY_SECONDS, left_out=0)
    reason = getattr(error, "orig", error)
    log.error("the database did not serve this request: %s%s", reason, left_out, exc_info=error)


def next_handler(error: Exception, ours: Callable[..., Any]) -> ResponseReturnValue:
    """Call the app's handler for a wider class, if it has one; else raise the error again. Flask has chosen ours,
    since its class is the nearest."""
    handlers = current_app.error_handler_spec[None][None]
    for kind in type(error).__mro__:
        if kind in handlers and handlers[kind] is not ours:
            answer: ResponseReturnValue = current_app.ensure_sync(handlers[kind])(error)
            return answer
    raise error


def reason(error: Exception) -> str:
    """Return what a client may be told."""
    if getattr(getattr(error, "orig", None), "sqlstate", None) == READ_ONLY_SQL_TRANSACTION:
        return "The database is read-only at the moment: nothing was written, and reads are served."
    return "The database did not serve this request."


def retry_after() -> dict[str, str]:
    """Return the header that asks the client to repeat this request; none if the request may have written something.
    It cannot have written if its method is safe, or if it never got a connection."""
    may_have_written = request.method not in SAFE_METHODS and CONNECTED in request.environ
    return {} if may_have_written else {"Retry-After": "1"}


def note_a_connection() -> None:
    """Note that the current request, if there is one, has had a connection."""
    if has_request_context():
        request.environ[CONNECTED] = True
