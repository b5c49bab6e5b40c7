"""Errors that are not the database's trouble are left to the app; what a client is told of the others."""

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from flask import Flask, Response, got_request_exception
from sqlalchemy.exc import DBAPIError, InternalError, OperationalError
from werkzeug.exceptions import BadRequest, HTTPException

import flask_pooling
from tests.library.conftest import engine_of, superuser
from tests.serving import wait_until
from tests.test_errors import operational, raising


def view_with(error: DBAPIError) -> Any:
    def view() -> None:
        raise error

    return view


ERRORS = {
    "table": OperationalError("", {}, psycopg.errors.UndefinedTable()),
    "aborted": InternalError("", {}, psycopg.errors.InFailedSqlTransaction()),
    "gone": OperationalError(None, {}, psycopg.OperationalError()),
}


@pytest.mark.sqlite  # no database in it: once is enough
@pytest.mark.parametrize("has_another", [False, True])
def test_other_handlers_of_the_app_get_them(has_another: bool) -> None:
    """As Flask's manual has it: one for all exceptions. Without one, the error is raised as if nobody had looked."""
    app = Flask(__name__)
    flask_pooling.answer_errors(app)
    if has_another:
        app.register_error_handler(Exception, lambda error: (type(error).__name__, 418))
    for name, error in ERRORS.items():
        app.add_url_rule(f"/{name}", name, view_with(error))
    answers = [app.test_client().get(f"/{name}") for name in ERRORS]
    assert [answer.status_code for answer in answers] == ([418, 418, 503] if has_another else [500, 500, 503])
    assert not has_another or [answer.text for answer in answers[:2]] == ["OperationalError", "InternalError"]


@pytest.mark.sqlite
def test_the_answer_is_plain_text_or_the_apps(caplog: pytest.LogCaptureFixture) -> None:
    """A client is told when to ask again, and not what the server said; that is in the log."""
    for answer in (None, lambda error: (f"{type(error).__name__}!", 503, flask_pooling.retry_after())):
        app = Flask(__name__)
        flask_pooling.answer_errors(app, answer)
        app.add_url_rule("/", "gone", view_with(OperationalError(None, {}, psycopg.OperationalError("gone: secret"))))
        got = app.test_client().get("/")
        assert (got.status_code, got.headers["Retry-After"]) == (503, "1")
        said = ("The database did not serve this request.", "text/plain") if answer is None else (
            "OperationalError!", "text/html"
        )  # fmt: skip
        assert (got.text, got.mimetype) == said
    assert "gone: secret" in caplog.text


@pytest.mark.postgres
@pytest.mark.direct
@pytest.mark.parametrize(
    ("statements", "transient"),
    [
        (["set statement_timeout = 100", "select pg_sleep(10)"], False),
        (["set idle_in_transaction_session_timeout = 100", "select 1", None, "select 1"], False),
        ([sa.select(sa.literal(1)).where(sa.literal(1).in_(range(65_536)))], False),
        (["select * from generate_series(1, 500000) order by 1 desc"], False),  # past temp_file_limit
        (["select pg_terminate_backend(pg_backend_pid())"], True),
        (["set lock_timeout = 100", "lock table items"], True),
    ],
)
def test_what_the_real_server_says(plain: Flask, statements: list[Any], transient: bool) -> None:
    """An error that would be the same next time is the app's mistake, even if it costs the connection."""
    engine = engine_of(plain)
    with superuser(engine.url.render_as_string(hide_password=False)) as admin:
        admin.execute(f"alter role {engine.url.username} set temp_file_limit = '1MB'")
        engine.dispose()  # a connection that is open does not have it
        admin.autocommit = False
        admin.execute("lock table items")
        try:
            with pytest.raises(DBAPIError) as raised, engine.connect() as connection:
                for statement in statements:
                    if statement is None:
                        wait_until(lambda: is_gone(admin, connection))
                    else:
                        connection.execute(sa.text(statement) if isinstance(statement, str) else statement)
        finally:
            admin.rollback()
            admin.autocommit = True
            admin.execute(f"alter role {engine.url.username} reset temp_file_limit")
    assert flask_pooling.is_transient(raised.value) is transient, raised.value


def is_gone(admin: "psycopg.Connection[Any]", connection: sa.Connection) -> bool:
    driver: Any = connection.connection.dbapi_connection
    admin.execute("select pg_stat_clear_snapshot()")  # in a transaction it would see the same for ever
    row = admin.execute("select 1 from pg_stat_activity where pid = %s", [driver.info.backend_pid]).fetchone()
    return row is None


@pytest.mark.sqlite
def test_an_outage_is_signalled_each_time_and_logged_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    """The log gets the first error with its traceback, and later one line with the number of those since."""
    app, told = Flask(__name__), []
    error = OperationalError(None, {}, psycopg.OperationalError("gone"))
    with got_request_exception.connected_to(lambda sender, exception: told.append(exception), app), app.app_context():
        for _ in range(10):
            flask_pooling.report(error)
        app.extensions["flask_pooling.errors"]["next"] = 0
        flask_pooling.report(error)
    assert told == [error] * 11
    assert [record.levelname for record in caplog.records] == ["ERROR"] * 2
    assert [record.getMessage().partition("gone")[2] for record in caplog.records] == [
        "", " (and 9 more since the last line)"
    ]  # fmt: skip
    assert all(record.exc_info for record in caplog.records)


@pytest.mark.sqlite
def test_a_database_that_takes_no_writes_is_named_as_the_reason(app: Flask) -> None:
    """A client cannot know otherwise why its reads go on to work."""
    read_only = psycopg.errors.ReadOnlySqlTransaction("cannot execute INSERT in a read-only transaction")
    assert "read-only" in raising(app, lambda: operational(read_only, invalidated=True), "POST")[2]


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (lambda: BadRequest(ValueError("words")), 400),  # type: ignore[arg-type]
        (lambda: BadRequest({"title": "words"}), 400),  # type: ignore[arg-type]
        (lambda: type("Unknown", (HTTPException,), {"code": 460})("words"), 460),
    ],
)
def test_whatever_a_view_aborts_with(app: Flask, error: Callable[[], Exception], status: int) -> None:
    """A client that takes JSON gets the status that a browser would get."""
    got, _, body = raising(app, error)
    assert got == status
    assert "words" in body


@pytest.mark.sqlite
def test_trouble_outside_of_a_view_is_503(app: Flask, caplog: pytest.LogCaptureFixture) -> None:
    """In a hook after the view, and where the session is loaded. There is one line in the log, and all headers."""
    app.config["PROPAGATE_EXCEPTIONS"] = False

    @app.after_request
    def fail(response: Response) -> Response:
        raise operational(psycopg.OperationalError("gone"), sent=None)

    with caplog.at_level("INFO", "app.access"):
        response = app.test_client().get("/livez")
    assert response.status_code == 503
    assert len(response.headers.getlist("X-Request-ID")) == 1
    assert [record.status for record in caplog.records if record.name == "app.access"] == [503]  # type: ignore[attr-defined]
