"""The middleware around every request: its id, the headers, the line in the log."""

import io
import json
import logging
import os
from collections.abc import Callable, Iterator
from datetime import datetime

import pytest
from flask import Flask, request
from flask.testing import FlaskClient

from app import logs
from app.config import Environment, Settings

pytestmark = pytest.mark.sqlite  # no database in it: once is enough


@pytest.mark.parametrize("given", ["abc-123", "0" * 128, "a/b=c+d:e_f.g"])
def test_a_good_request_id_is_kept(client: FlaskClient, given: str) -> None:
    """So that one id goes through all services."""
    assert client.get("/livez", headers={"X-Request-ID": given}).headers["X-Request-ID"] == given


@pytest.mark.parametrize("given", ["", "has space", "0" * 129, 'quote"', "ü"])
def test_a_bad_request_id_is_replaced(client: FlaskClient, given: str) -> None:
    """An id that is not safe in a log or a header is not repeated."""
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


TOLD = {"X-Forwarded-Proto": "https", "X-Forwarded-Host": "evil.example", "X-Forwarded-Prefix": "/svc"}


@pytest.mark.parametrize(
    ("proxies", "sent", "seen"),
    [
        (0, TOLD, "http://localhost/ 127.0.0.1"),
        (1, TOLD | {"X-Forwarded-For": "6.6.6.6, 9.9.9.9:5678"}, "https://localhost/svc/ 9.9.9.9"),
        (1, {"X-Forwarded-Prefix": "//evil.example"}, "http://localhost/ 127.0.0.1"),
        (1, {"X-Forwarded-Prefix": "@evil.example", "X-Forwarded-For": "unknown"}, "http://localhost/ 127.0.0.1"),
        (1, {"X-Forwarded-Proto": "javascript"}, "http://localhost/ 127.0.0.1"),
    ],
)
def test_of_a_proxy_only_what_leads_nowhere_else_is_believed(
    make_app: Callable[..., Flask], proxies: int, sent: dict[str, str], seen: str
) -> None:
    """Anybody can send X-Forwarded-*; they count only where a proxy is known, and a host never does."""
    app = make_app(WEB_TRUSTED_PROXIES=proxies)
    app.add_url_rule("/where", "where", lambda: f"{request.root_url} {request.remote_addr}")
    assert app.test_client().get("/where", headers=sent).text == seen


def test_only_trusted_hosts_are_served(make_app: Callable[..., Flask]) -> None:
    """A link in an e-mail leads to no other host. Platforms ask for the probes by address."""
    client = make_app(WEB_TRUSTED_HOSTS="notes.example.org").test_client()
    for host, status in (("notes.example.org", 200), ("evil.example", 400)):
        assert client.get("/", headers={"Host": host}).status_code == status
    assert client.get("/livez", headers={"Host": "10.1.2.3"}).status_code == 200


# --- logs ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(request: pytest.FixtureRequest) -> Iterator[Callable[[], list[str]]]:
    """A function that returns the lines that are written with the logging of an environment, as a job sets it up."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    logs.init_app(Settings.model_construct(app_env=request.param))
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
