"""Logs and request ids."""

import json
import logging
import logging.config
import os
import re
import threading
from datetime import UTC, datetime
from typing import Any

import pytest
from flask import Flask
from flask.testing import FlaskClient

from app import logs, observe
from app.config import Environment


def line_of(path: str) -> observe.AccessLine:
    return observe.AccessLine(
        request_id="one", method="GET", path=path, status=200, duration_ms=1.5, remote_address="127.0.0.1"
    )


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


def test_production_writes_one_json_line_a_request(make_app: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """With the request id, the status and the duration as fields of their own."""
    app = make_app()
    app.wsgi_app.log = logs.access_log(Environment.PRODUCTION)
    before = datetime.now(UTC)
    app.test_client().get("/livez", headers={"X-Request-ID": "one"})
    (line,) = capfd.readouterr().err.splitlines()
    entry = json.loads(line)
    assert before <= datetime.fromisoformat(entry.pop("timestamp")) <= datetime.now(UTC)
    assert entry.pop("duration_ms") >= 0
    assert entry == {
        "level": "INFO",
        "name": "app.access",
        "process": os.getpid(),
        "request_id": "one",
        "method": "GET",
        "path": "/livez",
        "status": 200,
        "remote_address": "127.0.0.1",
    }


def test_development_writes_one_plain_line_a_request(make_app: Any, capfd: pytest.CaptureFixture[str]) -> None:
    """For a person; a path that is no text stops nobody."""
    app = make_app()
    app.wsgi_app.log = logs.access_log(Environment.DEVELOPMENT)
    app.test_client().get("/nowhere", headers={"X-Request-ID": "one"})
    (line,) = capfd.readouterr().err.splitlines()
    assert re.search(r"INFO +app\.access \[one\] GET /nowhere 404 in [\d.]+ ms from 127\.0\.0\.1$", line)
    app.wsgi_app.log(line_of("\ud800"))
    assert " ? " in capfd.readouterr().err


def test_other_lines_have_the_same_fields(app: Flask) -> None:
    """Whoever collects the lines finds when, how bad, who and which request in the same place in all of them."""
    config = logs.config_for(Environment.PRODUCTION)
    formatter = logging.config.DictConfigurator(config).configure_formatter(config["formatters"]["line"])
    record = logging.makeLogRecord({"msg": "hello", "levelname": "WARNING", "name": "app.x", "extra_field": 3})
    with app.test_request_context(environ_overrides={observe.REQUEST_ID: "one"}):
        assert logs.RequestIdFilter().filter(record)
    entry = json.loads(formatter.format(record))
    assert datetime.fromisoformat(entry.pop("timestamp")).tzinfo is not None
    assert entry == {
        "level": "WARNING",
        "name": "app.x",
        "process": os.getpid(),
        "request_id": "one",
        "message": "hello",
        "extra_field": 3,
    }


@pytest.mark.parametrize("environment", list(Environment))
def test_the_logging_config_is_valid(environment: Environment) -> None:
    """gunicorn is given the same one."""
    config = logs.config_for(environment)
    for name, formatter in config["formatters"].items():
        assert logging.config.DictConfigurator(config).configure_formatter(dict(formatter)), name


def test_threads_do_not_tear_each_others_lines(capfd: pytest.CaptureFixture[str]) -> None:
    """Though no lock is taken."""
    write = logs.access_log(Environment.PRODUCTION)
    assert write
    line = line_of("long " * 500)
    threads = [threading.Thread(target=lambda: [write(line) for _ in range(50)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = capfd.readouterr().err.splitlines()
    assert [json.loads(line)["path"] for line in lines] == ["long " * 500] * 200


def test_a_line_that_cannot_be_written_fails_no_request(make_app: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever reads the logs may have gone."""
    app = make_app()
    app.wsgi_app.log = logs.access_log(Environment.PRODUCTION)
    reader, writer = os.pipe()
    os.close(reader)
    write = os.write
    monkeypatch.setattr(os, "write", lambda _, line: write(writer, line))
    assert app.test_client().get("/livez").status_code == 200
    os.close(writer)
