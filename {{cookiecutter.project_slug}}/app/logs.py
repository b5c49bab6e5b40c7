"""Logs: one JSON object a line in production, plain lines elsewhere, and the request id on both.

python-json-logger, because it is a formatter for the logging module that everything here already uses (gunicorn and
SQLAlchemy too), where structlog would be a second way to log.
"""

import logging
import os
from collections.abc import Callable
from typing import Any

import msgspec
from flask import has_request_context, request

from app.config import Environment
from app.observe import REQUEST_ID, AccessLine

PLAIN = "%(asctime)s %(levelname)-7s %(name)s [%(request_id)s] %(message)s"
JSON = "%(levelname)s %(name)s %(process)d %(request_id)s %(message)s"

AccessLog = Callable[[AccessLine], None]


class RequestIdFilter(logging.Filter):
    """Puts the id of the current request on each record that has none yet."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not hasattr(record, "request_id"):
            record.request_id = request.environ.get(REQUEST_ID, "-") if has_request_context() else "-"
        return True


def access_log(environment: Environment) -> AccessLog | None:
    """What writes the line of a request; tests have none.

    Not through the logging module: a record, its handlers and its formatter cost several times what the line does,
    for each request, and a handler's lock is held while it formats and writes. This is one write, and takes no lock.
    """
    return {Environment.PRODUCTION: _write_json, Environment.DEVELOPMENT: _write_plain}.get(environment)


def _write_json(line: AccessLine) -> None:
    _write(msgspec.json.encode(line))


def _write_plain(line: AccessLine) -> None:
    text = (
        f"{line.timestamp.astimezone():%Y-%m-%d %H:%M:%S} {line.level:7} {line.name} [{line.request_id}] "
        f"{line.method} {line.path} {line.status} in {line.duration_ms} ms from {line.remote_address}"
    )
    _write(text.encode(errors="replace"))


def _write(line: bytes) -> None:
    try:  # noqa: SIM105  # contextlib.suppress costs more, for each request
        os.write(2, line + b"\n")
    except OSError:  # a line that cannot be written fails no request
        pass


def config_for(environment: Environment) -> dict[str, Any]:
    """A `dictConfig` for this app and for gunicorn alike."""
    in_production = environment is Environment.PRODUCTION
    plain = {"format": PLAIN}
    as_json = {
        "()": "pythonjsonlogger.json.JsonFormatter",
        "fmt": JSON,
        "rename_fields": {"levelname": "level"},
        "timestamp": True,
    }
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"request_id": {"()": RequestIdFilter}},
        "formatters": {"line": as_json if in_production else plain},
        "handlers": {
            "stderr": {"class": "logging.StreamHandler", "formatter": "line", "filters": ["request_id"]},
        },
        "root": {"level": "INFO", "handlers": ["stderr"]},
        "loggers": {
            "gunicorn.error": {"level": "INFO", "propagate": True, "handlers": []},
            "alembic": {"level": "WARNING"},
        },
    }
