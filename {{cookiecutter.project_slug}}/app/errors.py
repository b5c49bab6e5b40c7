"""Errors as `application/problem+json` (RFC 9457). A browser gets Flask's page, except for 422 and the database's 503,
which are JSON for all clients.

The answer is 503 if the same request may work in a moment: the pool stays full, the server is gone or restarts, a lock
was held for too long. No view is run a second time. Flask handles any other error as usual (signal, log, debugger,
`app.testing`), and the answer is a 500. A statement past DB_STATEMENT_TIMEOUT is such an error.
"""

from http import HTTPStatus
from typing import Any, TypeVar

from flask import Flask, Response, abort, jsonify, request
from flask.json.provider import DefaultJSONProvider
from flask.typing import ResponseReturnValue
from pydantic import BaseModel, ValidationError
from werkzeug.exceptions import HTTPException
from werkzeug.http import HTTP_STATUS_CODES

import flask_pooling

Model = TypeVar("Model", bound=BaseModel)


class Json(DefaultJSONProvider):
    def loads(self, s: str | bytes, **kwargs: Any) -> Any:
        try:
            return super().loads(s, **kwargs)
        except RecursionError as error:  # the client's fault, as text that is no JSON: 400
            raise ValueError("nested too deeply") from error


def init_app(app: Flask) -> None:
    app.json = Json(app)
    app.register_error_handler(HTTPException, http_problem)
    flask_pooling.answer_errors(app, unavailable)


def problem(status: int, detail: Any, headers: dict[str, str] | None = None, **members: Any) -> Response:
    """Make a problem document; `members` are its own extensions."""
    title = HTTP_STATUS_CODES.get(status, "Unknown Error")
    response = jsonify(type="about:blank", title=title, status=status, detail=detail, **members)
    response.status_code = status
    response.mimetype = "application/problem+json"
    response.headers.update(headers or {})
    return response


def http_problem(error: HTTPException) -> ResponseReturnValue | HTTPException:
    """Answer 404, 405, 413, 415, 500 and the rest, with the headers that belong to them (Allow on a 405)."""
    if error.response is not None or error.code is None or error.code < HTTPStatus.BAD_REQUEST:
        return error  # a redirect, or a response made by hand
    if (unexpected := getattr(error, "original_exception", None)) and flask_pooling.is_transient(unexpected):
        return unavailable(unexpected)  # raised in a hook or the session; Flask has reported it
    if request.accept_mimetypes.best_match(["application/json", "text/html"]) == "text/html":
        return error
    headers = {name: value for name, value in error.get_headers(request.environ) if name != "Content-Type"}
    detail = error.description or ""
    return problem(error.code, detail if isinstance(detail, str | dict | list) else str(detail), headers)


def valid(model: type[Model], sent: Any) -> Model:
    """Return the client's data as a model. If the data does not fit, end the request with a 422 that says why.

    A ValidationError that is raised anywhere else is not the client's fault, and is a 500 like any other error.
    """
    try:
        return model.model_validate(sent)
    except ValidationError as error:
        errors: dict[str, list[str]] = {}
        for found in error.errors(include_url=False, include_input=False):
            errors.setdefault(".".join(map(str, found["loc"])), []).append(found["msg"].removeprefix("Value error, "))
        abort(problem(422, "The request does not fit the schema.", errors=errors))


def unavailable(error: Exception) -> Response:
    # Without Retry-After if the request may have written something.
    return problem(503, flask_pooling.reason(error), flask_pooling.retry_after())
