"""Errors that are not the database's trouble are left to the app."""

from typing import Any

import psycopg
import pytest
from flask import Flask
from sqlalchemy.exc import DBAPIError, InternalError, OperationalError

import flask_pooling


def raising(error: DBAPIError) -> Any:
    def view() -> None:
        raise error

    return view


ERRORS = {
    "table": OperationalError("", {}, psycopg.errors.UndefinedTable()),
    "aborted": InternalError("", {}, psycopg.errors.InFailedSqlTransaction()),
    "gone": OperationalError("", {}, psycopg.OperationalError()),
}


@pytest.mark.sqlite  # no database in it: once is enough
@pytest.mark.parametrize("has_another", [False, True])
def test_other_handlers_of_the_app_get_them(has_another: bool) -> None:
    """As Flask's manual has it: one for all exceptions. Without one, the error is raised as if nobody had looked."""

    def busy(error: Exception) -> Any:
        return ("busy", 503) if flask_pooling.is_transient(error) else flask_pooling.next_handler(error, busy)

    app = Flask(__name__)
    app.register_error_handler(DBAPIError, busy)
    if has_another:
        app.register_error_handler(Exception, lambda error: (type(error).__name__, 418))
    for name, error in ERRORS.items():
        app.add_url_rule(f"/{name}", name, raising(error))
    answers = [app.test_client().get(f"/{name}") for name in ERRORS]
    assert [answer.status_code for answer in answers] == ([418, 418, 503] if has_another else [500, 500, 503])
    assert not has_another or [answer.text for answer in answers[:2]] == ["OperationalError", "InternalError"]
