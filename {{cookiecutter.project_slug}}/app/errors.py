"""Every error as `application/problem+json` (RFC 9457), and which of them are the database's, to be tried again.

A pool that stays full, a server that is gone or restarting, a statement that took too long: all are 503 with
Retry-After, never a bare 500, since the same request will work in a moment.
"""

import logging
import sqlite3
from http import HTTPStatus
from typing import Any

import psycopg
from flask import Flask, Response, current_app, g, jsonify, request
from marshmallow import ValidationError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from werkzeug.exceptions import HTTPException

from app.extensions import db
from app.metrics import pool_timeouts
from app.pools import reading

RETRY_AFTER_SECONDS = 1
SQLITE_BUSY = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED}

log = logging.getLogger(__name__)


def init_app(app: Flask) -> None:
    app.register_error_handler(HTTPException, http_problem)
    app.register_error_handler(ValidationError, validation_problem)
    app.register_error_handler(PoolTimeoutError, pool_problem)
    app.register_error_handler(DBAPIError, database_problem)
    app.register_error_handler(Exception, unexpected_problem)


def problem(status: int, detail: str, headers: dict[str, str] | None = None, **members: Any) -> Response:
    """A problem document; `members` are extensions of its own."""
    response = jsonify(type="about:blank", title=HTTPStatus(status).phrase, status=status, detail=detail, **members)
    response.status_code = status
    response.mimetype = "application/problem+json"
    response.headers.update(headers or {})
    return response


def http_problem(error: HTTPException) -> Response:
    """404, 405, 413, 415 and the rest, with the headers that belong to them (Allow on a 405)."""
    if error.response is not None or error.code is None or error.code < HTTPStatus.BAD_REQUEST:
        return error.get_response()  # type: ignore[return-value]  # a redirect, or a response made by hand
    headers = {name: value for name, value in error.get_headers(request.environ) if name != "Content-Type"}
    return problem(error.code, error.description or "", headers)


def validation_problem(error: ValidationError) -> Response:
    return problem(422, "The request does not fit the schema.", errors=error.messages_dict)


def pool_problem(error: PoolTimeoutError) -> Response:
    pool_timeouts.inc()
    log.warning("no database connection was free in time: %s", error)
    return try_again("No database connection was free in time.")


def database_problem(error: DBAPIError) -> Response:
    db.session.rollback()
    if not is_transient(error):
        return unexpected_problem(error)
    if error.connection_invalidated and reading() and not g.get("tried_again"):
        # The connection died under a read, so nothing has been changed: once more, on a new connection.
        g.tried_again = True
        return once_more()
    log.warning("the database did not serve this request: %s", error.orig)
    return try_again("The database did not serve this request.")


def once_more() -> Response:
    try:
        return current_app.make_response(current_app.dispatch_request())
    except Exception as error:  # noqa: BLE001  # whatever it is goes where it would have gone the first time
        return current_app.make_response(current_app.handle_user_exception(error))


def is_transient(error: DBAPIError) -> bool:
    """Whether the same request may succeed in a moment: it was the database's state, not the statement."""
    if error.connection_invalidated:
        return True
    if isinstance(error.orig, sqlite3.Error):
        return getattr(error.orig, "sqlite_errorcode", None) in SQLITE_BUSY
    return isinstance(error.orig, psycopg.OperationalError)


def unexpected_problem(error: Exception) -> Response:
    """Log what happened and tell the client nothing of it."""
    log.error("unhandled error", exc_info=error)
    return problem(500, "The server made a mistake. It has been logged under the request id.")


def try_again(detail: str, **members: Any) -> Response:
    return problem(503, detail, {"Retry-After": str(RETRY_AFTER_SECONDS)}, **members)
