"""Logs and request ids."""

import io
import json
import logging
import logging.config

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
