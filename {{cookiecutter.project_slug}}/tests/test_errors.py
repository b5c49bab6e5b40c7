"""Errors: a problem document, and 503 where the same request may work in a moment."""

import sqlite3
from collections.abc import Callable

import psycopg
import pytest
import sqlalchemy as sa
from flask import Flask, got_request_exception, request
from pydantic import BaseModel
from sqlalchemy.exc import DBAPIError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from app.errors import valid
from app.extensions import db


class Sent(BaseModel):
    title: str


@pytest.mark.sqlite  # no database in it: once is enough
@pytest.mark.parametrize(
    ("method", "options", "status"),
    [
        ("GET", {}, 404),
        ("PATCH", {}, 405),
        ("POST", {"data": "x" * (1024 * 1024 + 1), "content_type": "application/json"}, 413),
        ("POST", {"data": "title=x"}, 415),
        ("POST", {"data": '{"title"', "content_type": "application/json"}, 400),
        ("POST", {"data": b"\xff\xfe", "content_type": "application/json"}, 400),
        ("POST", {"data": "[" * 200_000, "content_type": "application/json"}, 400),
        ("POST", {"json": {}}, 422),
    ],
)
def test_errors_are_problem_documents(app: Flask, method: str, options: dict[str, object], status: int) -> None:
    """RFC 9457: the media type, and `status` and `title` that agree with the status line. A browser gets Flask's page,
    except for 422."""
    app.add_url_rule("/title", view_func=lambda: valid(Sent, request.get_json()).title, methods=["POST"])
    path = "/nowhere" if status == 404 else "/title"
    page = app.test_client().open(path, method=method, headers={"Accept": "text/html"}, **options)  # type: ignore[arg-type]
    assert page.mimetype == ("application/problem+json" if status == 422 else "text/html")
    response = app.test_client().open(path, method=method, **options)  # type: ignore[arg-type]
    assert response.status_code == status
    assert response.mimetype == "application/problem+json"
    problem = response.get_json()
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    assert ("POST" in response.headers.get("Allow", "")) is (status == 405)


def raising(app: Flask, error: Callable[[], Exception], method: str = "GET") -> tuple[int, str | None, str]:
    """Add a route that raises, call it, and return the status, Retry-After and the body."""

    def fail() -> str:
        raise error()

    app.config["PROPAGATE_EXCEPTIONS"] = False  # a test's app would raise what ends as a 500
    app.add_url_rule("/raises", view_func=fail, methods=["GET", "POST"])
    response = app.test_client().open("/raises", method=method)
    assert response.mimetype == "application/problem+json"
    return response.status_code, response.headers.get("Retry-After"), response.text


def operational(original: Exception, *, invalidated: bool = False, sent: str | None = "select 1") -> DBAPIError:
    kind = OperationalError if isinstance(original, psycopg.OperationalError | sqlite3.Error) else InternalError
    return kind(sent, {}, original, connection_invalidated=invalidated)


def busy() -> sqlite3.OperationalError:
    error = sqlite3.OperationalError("database is locked")
    error.sqlite_errorcode = sqlite3.SQLITE_BUSY
    return error


@pytest.mark.sqlite
@pytest.mark.parametrize(
    "error",
    [
        lambda: PoolTimeoutError("QueuePool limit of size 4 overflow 0 reached"),
        lambda: operational(psycopg.OperationalError("connection refused"), sent=None),
        lambda: operational(psycopg.OperationalError("server closed the connection"), invalidated=True),
        lambda: operational(psycopg.errors.TooManyConnections("remaining connection slots are reserved")),
        lambda: operational(psycopg.errors.LockNotAvailable("canceling statement due to lock timeout")),
        lambda: operational(psycopg.errors.ReadOnlySqlTransaction("read-only"), invalidated=True),
        lambda: operational(busy()),
    ],
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_the_databases_troubles_are_503(
    app: Flask, error: Callable[[], Exception], method: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With Retry-After, since this request never had a connection. The log and Flask's signal (Sentry) are told."""
    told: list[Exception] = []
    with got_request_exception.connected_to(lambda sender, exception: told.append(exception), app):
        status, retry_after, body = raising(app, error, method)
    assert (status, retry_after) == (503, "1")
    assert "select 1" not in body
    assert len(told) == 1
    assert [record.levelname for record in caplog.records if record.exc_info] == ["ERROR"]
    page = app.test_client().open("/raises", method=method, headers={"Accept": "text/html"})
    assert page.mimetype == "application/problem+json"


@pytest.mark.sqlite
@pytest.mark.parametrize(
    "error",
    [
        lambda: ZeroDivisionError("secret detail"),
        lambda: operational(psycopg.errors.UndefinedTable("secret detail")),
        lambda: operational(psycopg.errors.QueryCanceled("secret detail: statement timeout")),
        lambda: operational(psycopg.errors.IdleInTransactionSessionTimeout("secret detail"), invalidated=True),
        lambda: operational(psycopg.OperationalError("secret detail: 65536 parameters")),
        lambda: operational(sqlite3.OperationalError("no such table: secret detail")),
        lambda: operational(psycopg.errors.ProgramLimitExceeded("secret detail: too long for an index")),
        lambda: operational(psycopg.errors.ObjectNotInPrerequisiteState("secret detail: currval of a new sequence")),
        lambda: operational(psycopg.errors.UndefinedFile("secret detail: an extension that is not installed")),
    ],
)
def test_our_own_mistakes_are_500_and_stay_inside(
    app: Flask, error: Callable[[], Exception], caplog: pytest.LogCaptureFixture
) -> None:
    """The client is told nothing of it. The log is told all, and so are listeners to Flask's signal (Sentry)."""
    told: list[Exception] = []
    with got_request_exception.connected_to(lambda sender, exception: told.append(exception), app):
        status, retry_after, body = raising(app, error)
    assert (status, retry_after) == (500, None)
    assert "secret detail" not in body
    assert "secret detail" in caplog.text
    assert "secret detail" in str(told[0])


def test_who_may_have_written_is_not_told_to_send_it_again(app: Flask) -> None:
    """A POST that had sent something before the trouble came: 503 without Retry-After."""

    def fail() -> str:
        db.session.execute(sa.text("create temporary table if not exists written (id integer)"))
        raise PoolTimeoutError("QueuePool limit")

    app.add_url_rule("/fail", view_func=fail, methods=["GET", "POST"])
    for method, retry_after in (("POST", None), ("GET", "1")):
        response = app.test_client().open("/fail", method=method)
        assert (response.status_code, response.headers.get("Retry-After")) == (503, retry_after)


@pytest.mark.postgres
def test_a_connection_that_dies_is_a_503_and_the_next_request_works(app: Flask) -> None:
    """The view is not run once more behind its back."""
    calls = []

    def dies() -> str:
        calls.append(1)
        db.session.execute(sa.text("select pg_terminate_backend(pg_backend_pid())"))
        return ""

    app.add_url_rule("/dies", view_func=dies, methods=["GET", "POST"])
    for method in ("GET", "POST"):
        assert app.test_client().open("/dies", method=method).status_code == 503
        assert app.test_client().get("/readyz").status_code == 200
    assert len(calls) == 2
