"""Errors: always a problem document, and 503 where the same request will work in a moment."""

import sqlite3
from collections.abc import Callable

import psycopg
import pytest
import sqlalchemy as sa
from flask import Flask
from flask.testing import FlaskClient
from sqlalchemy.exc import DBAPIError, OperationalError, ProgrammingError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from app.config import MAX_BODY_BYTES
from app.extensions import db


@pytest.mark.sqlite  # no database in it: once is enough
@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("GET", "/nowhere", {}, 404),
        ("PATCH", "/api/notes/1", {}, 405),
        ("POST", "/api/notes", {"data": "x" * (MAX_BODY_BYTES + 1), "content_type": "application/json"}, 413),
        ("POST", "/api/notes", {"data": "title=x"}, 415),
        ("POST", "/api/notes", {"data": '{"title"', "content_type": "application/json"}, 400),
        ("POST", "/api/notes", {"data": b"\xff\xfe", "content_type": "application/json"}, 400),
        ("POST", "/api/notes", {"json": {}}, 422),
    ],
)
def test_errors_are_problem_documents(
    client: FlaskClient, method: str, path: str, options: dict[str, object], status: int
) -> None:
    """RFC 9457: the media type, and `status` and `title` that agree with the status line."""
    response = client.open(path, method=method, **options)  # type: ignore[arg-type]
    assert response.status_code == status
    assert response.mimetype == "application/problem+json"
    problem = response.get_json()
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    assert response.headers["X-Request-ID"]
    assert response.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.sqlite  # no database in it: once is enough
def test_405_says_what_is_allowed(client: FlaskClient) -> None:
    """The Allow header of the original error is kept."""
    assert "GET" in client.patch("/api/notes/1").headers["Allow"]


def raising(app: Flask, error: Callable[[], Exception], method: str = "GET") -> tuple[int, str | None, str]:
    """Add a route that raises, call it, and return the status, Retry-After and the body."""

    def fail() -> str:
        raise error()

    app.add_url_rule("/raises", view_func=fail, methods=["GET", "POST"])
    response = app.test_client().open("/raises", method=method)
    assert response.mimetype == "application/problem+json"
    return response.status_code, response.headers.get("Retry-After"), response.text


def operational(original: Exception, *, invalidated: bool = False) -> DBAPIError:
    kind = OperationalError if isinstance(original, psycopg.OperationalError | sqlite3.Error) else ProgrammingError
    return kind("select 1", {}, original, connection_invalidated=invalidated)


def busy() -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("database is locked")
    error.sqlite_errorcode = sqlite3.SQLITE_BUSY
    return error


@pytest.mark.sqlite  # no database in it: once is enough
@pytest.mark.parametrize(
    "error",
    [
        lambda: PoolTimeoutError("QueuePool limit of size 4 overflow 0 reached"),
        lambda: operational(psycopg.OperationalError("connection refused")),
        lambda: operational(psycopg.errors.TooManyConnections("remaining connection slots are reserved")),
        lambda: operational(psycopg.errors.QueryCanceled("canceling statement due to statement timeout")),
        lambda: operational(psycopg.errors.LockNotAvailable("canceling statement due to lock timeout")),
        lambda: operational(psycopg.errors.ReadOnlySqlTransaction("read-only"), invalidated=True),
        lambda: operational(busy()),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_databases_troubles_are_503(app: Flask, error: Callable[[], Exception], method: str) -> None:
    """With Retry-After, and without a word of the database's own."""
    status, retry_after, body = raising(app, error, method)
    assert (status, retry_after) == (503, "1")
    assert "select 1" not in body


@pytest.mark.sqlite  # no database in it: once is enough
@pytest.mark.parametrize(
    "error",
    [
        lambda: ZeroDivisionError("secret detail"),
        lambda: operational(psycopg.errors.UndefinedTable("secret detail")),
        lambda: operational(sqlite3.OperationalError("no such table: secret detail")),
    ],
)
def test_our_own_mistakes_are_500_and_stay_inside(
    app: Flask, error: Callable[[], Exception], caplog: pytest.LogCaptureFixture
) -> None:
    """The client is told nothing of it; the log is told all."""
    status, retry_after, body = raising(app, error)
    assert (status, retry_after) == (500, None)
    assert "secret detail" not in body
    assert "secret detail" in caplog.text


@pytest.mark.postgres
@pytest.mark.live
def test_a_read_whose_connection_dies_is_tried_once_more(app: Flask) -> None:
    """The client of a GET sees nothing of it; a POST is not repeated, since it may have been carried out."""
    calls = []

    def dies() -> str:
        calls.append(1)
        if len(calls) == 1:
            db.session.execute(sa.text("select pg_terminate_backend(pg_backend_pid())"))
        return str(db.session.scalar(sa.text("select 42")))

    app.add_url_rule("/dies", view_func=dies, methods=["GET", "POST"])
    assert app.test_client().get("/dies").text == "42"
    assert len(calls) == 2
    calls.clear()
    assert app.test_client().post("/dies").status_code == 503
    assert len(calls) == 1


@pytest.mark.postgres
@pytest.mark.live
def test_a_read_is_tried_once_more_but_not_for_ever(app: Flask) -> None:
    """The second death is a 503."""
    calls = []

    def dies() -> str:
        calls.append(1)
        return str(db.session.execute(sa.text("select pg_terminate_backend(pg_backend_pid())")))

    app.add_url_rule("/dies", view_func=dies)
    assert app.test_client().get("/dies").status_code == 503
    assert len(calls) == 2
