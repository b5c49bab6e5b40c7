"""Logs and request ids."""

import io
import json
import logging
import logging.config
import threading

import pytest
from flask import Flask
from flask.testing import FlaskClient

from app import logs, observe
from app.config import Environment


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


def test_production_writes_one_json_line_a_request(app: Flask) -> None:
    """With the request id, the status and the duration as fields of their own."""
    config = logs.config_for(Environment.PRODUCTION)
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.config.DictConfigurator(config).configure_formatter(config["formatters"]["line"]))
    handler.addFilter(logs.RequestIdFilter())
    observe.access.addHandler(handler)
    disabled, observe.access.disabled = observe.access.disabled, False
    level = observe.access.level
    observe.access.setLevel("INFO")
    try:
        app.test_client().get("/livez", headers={"X-Request-ID": "one"})
    finally:
        observe.access.removeHandler(handler)
        observe.access.disabled = disabled
        observe.access.setLevel(level)
    (line,) = stream.getvalue().splitlines()
    entry = json.loads(line)
    assert (entry["request_id"], entry["method"], entry["path"], entry["status"]) == ("one", "GET", "/livez", 200)
    assert entry["duration_ms"] >= 0


@pytest.mark.parametrize("environment", list(Environment))
def test_the_logging_config_is_valid(environment: Environment) -> None:
    """gunicorn is given the same one."""
    config = logs.config_for(environment)
    for name, formatter in config["formatters"].items():
        assert logging.config.DictConfigurator(config).configure_formatter(dict(formatter)), name


def test_threads_do_not_tear_each_others_lines(capfd: pytest.CaptureFixture[str]) -> None:
    """Though no lock is taken. What cannot be encoded is escaped, and what cannot be formatted stops nobody."""
    handler = logs.Stderr()
    handler.setFormatter(logging.Formatter("<%(message)s>"))
    texts = ["long " * 500, "half a pair \ud800"]

    def write() -> None:
        for text in texts * 50:
            handler.handle(logging.makeLogRecord({"msg": text}))

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = capfd.readouterr().err.splitlines()
    assert {line: lines.count(line) for line in set(lines)} == {f"<{texts[0]}>": 200, "<half a pair \\ud800>": 200}
    handler.handle(logging.makeLogRecord({"msg": "%d", "args": ("no number",)}))
    assert "Traceback" in capfd.readouterr().err  # logging's own way to say so
