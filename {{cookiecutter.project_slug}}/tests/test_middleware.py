"""What happens around every request: its id, the headers, the access line."""

import io
import json
import logging
import logging.config
import os
from collections.abc import Callable, Iterator
from datetime import datetime

import pytest
from flask import Flask, redirect, request, url_for
from flask.testing import FlaskClient

from app import logs
from app.config import Environment

pytestmark = pytest.mark.sqlite  # no database in it: once is enough


@pytest.mark.parametrize("given", ["abc-123", "0" * 128, "a/b=c+d:e_f.g"])
def test_a_good_request_id_is_kept(client: FlaskClient, given: str) -> None:
    """So that one id goes through all services."""
    assert client.get("/livez", headers={"X-Request-ID": given}).headers["X-Request-ID"] == given


@pytest.mark.parametrize("given", ["", "has space", "0" * 129, 'quote"', "ü"])
def test_a_bad_request_id_is_replaced(client: FlaskClient, given: str) -> None:
    """What is not safe to repeat in a log or a header is not repeated."""
    made = client.get("/livez", headers={"X-Request-ID": given}).headers["X-Request-ID"]
    assert made != given
    assert len(made) == 32


def test_what_a_view_sets_itself_wins(app: Flask) -> None:
    """There is no second one beside it."""
    own = {"content-security-policy": "default-src *", "x-request-id": "of-the-view", "X-Frame-Options": "SAMEORIGIN"}
    app.add_url_rule("/own", view_func=lambda: ("", own))
    headers = app.test_client().get("/own").headers
    assert {name: headers.getlist(name) for name in own} == {name: [value] for name, value in own.items()}


@pytest.mark.parametrize("path", ["/", "/nowhere", "/api/notes", "/static/style.css"])
def test_security_headers_are_on_every_answer(client: FlaskClient, path: str) -> None:
    """Each of them once."""
    response = client.get(path)
    headers = response.headers
    response.close()  # a file, for one of them
    for name, value in {
        "X-Content-Type-Options": "nosniff",
        "X-Frame-Options": "DENY",
        "Referrer-Policy": "strict-origin-when-cross-origin",
    }.items():
        assert headers.getlist(name) == [value]
    assert len(headers.getlist("Content-Security-Policy")) == 1
    assert "default-src 'self'" in headers["Content-Security-Policy"]


@pytest.mark.parametrize(("proxies", "seen"), [(0, "http://localhost/"), (1, "https://localhost/svc/")])
def test_forwarded_headers_count_only_behind_known_proxies(
    make_app: Callable[..., Flask], proxies: int, seen: str
) -> None:
    """Anybody can send X-Forwarded-*; they are believed only when told how many proxies set them. A host never is."""
    app = make_app(WEB_TRUSTED_PROXIES=proxies)
    app.add_url_rule("/where", "where", lambda: request.root_url)
    app.add_url_rule("/away", "away", lambda: redirect(url_for("home.home")))
    forwarded = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "evil.example", "X-Forwarded-Prefix": "/svc"}
    assert app.test_client().get("/where", headers=forwarded).text == seen
    assert app.test_client().get("/away", headers=forwarded).headers["Location"] == ("/svc/" if proxies else "/")


# --- logs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(request: pytest.FixtureRequest) -> Iterator[Callable[[], list[str]]]:
    """A function that returns the lines that are written with the logging of an environment."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    logging.config.dictConfig(logs.config_for(request.param))
    (handler,) = root.handlers
    assert isinstance(handler, logging.StreamHandler)
    stream = io.StringIO()
    handler.setStream(stream)
    yield lambda: stream.getvalue().splitlines()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.mark.parametrize("written", [Environment.PRODUCTION], indirect=True)
def test_production_writes_one_json_line_a_request(client: FlaskClient, written: Callable[[], list[str]]) -> None:
    """With the request id, the status and the duration as fields of their own."""
    client.get("/livez", headers={"X-Request-ID": "one"})
    (line,) = written()
    entry = json.loads(line)
    assert datetime.fromisoformat(entry.pop("timestamp")).tzinfo is not None
    assert entry.pop("duration_ms") >= 0
    assert entry == {
        "level": "INFO",
        "name": "app.access",
        "process": os.getpid(),
        "request_id": "one",
        "message": "request",
        "method": "GET",
        "path": "/livez",
        "status": 200,
        "remote_address": "127.0.0.1",
    }


@pytest.mark.parametrize("written", [Environment.DEVELOPMENT], indirect=True)
@pytest.mark.parametrize("path", ["/a%0aINFO forged", "/a%1b[31m", "/a%e2%80%a8b", "/a%0d%0ab", "/%c2%85"])
def test_a_path_forges_no_line(client: FlaskClient, written: Callable[[], list[str]], path: str) -> None:
    """Whatever a client puts into a path is on the line of its request, as an escape."""
    client.get(path, headers={"X-Request-ID": "one"})
    (line,) = written()
    assert "[one]" in line
    assert " 404 in " in line
    assert line.isprintable()
