"""Logs, by the logging module: one JSON object a line in production, plain lines elsewhere; the request id on both."""

import fcntl
import logging
import os
import re
import sys
from datetime import UTC, datetime
from typing import Any, TextIO
from urllib.parse import quote

from flask import has_request_context, request
from pythonjsonlogger.json import JsonEncoder, JsonFormatter

from app.config import Environment

PLAIN = "%(asctime)s %(levelname)-7s %(name)s [%(request_id)s] %(message)s"
JSON = "%(levelname)s %(name)s %(process)d %(request_id)s %(message)s"

COLOURS = {"WARNING": 33, "ERROR": 31, "CRITICAL": 31}
IN_COLOUR = sys.stderr.isatty() and not os.environ.get("NO_COLOR")


class RequestIdFilter(logging.Filter):
    """Puts the id of the current request on each record."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not hasattr(record, "request_id"):  # else it was given to the logger
            record.request_id = request.environ.get("REQUEST_ID", "-") if has_request_context() else "-"
        return True


ENCODER = JsonEncoder()


class JsonLines(JsonFormatter):
    """For machines. The parent would make an encoder for each line, and have it write the time."""

    def add_fields(self, log_data: dict[str, Any], record: logging.LogRecord, message_dict: dict[str, Any]) -> None:
        super().add_fields(log_data, record, message_dict)
        log_data["timestamp"] = datetime.fromtimestamp(record.created, UTC).isoformat()

    def jsonify_log_record(self, log_data: dict[str, Any]) -> str:
        return ENCODER.encode(log_data)


class PlainFormatter(logging.Formatter):
    """For people. What a client sent cannot begin a line or move the cursor: further lines of a record are indented,
    and what is not printable is shown as an escape."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.name == "app.access":
            of = vars(record)
            path = quote(of["path"])
            text += f" {of['method']} {path} {of['status']} in {of['duration_ms']} ms from {of['remote_address']}"
        text = text.replace("\n", "\n    ")
        text = "".join(each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in text)
        colour = COLOURS.get(record.levelname) if IN_COLOUR else None
        return f"\033[{colour}m{text}\033[0m" if colour else text


class NoiseFilter(logging.Filter):
    """Leaves out what gunicorn says of its own doings each time it starts, reloads and stops."""

    NOISE = re.compile(
        "Starting|Listening|Using worker|Booting|Reloader is|Handling|Worker exiting|Worker .*SIG(INT|QUIT)"
    )

    def filter(self, record: logging.LogRecord) -> bool:
        return not self.NOISE.match(record.getMessage())


class WholeLines(logging.StreamHandler[TextIO]):
    """A pipe takes 4096 bytes at once, so longer lines of two workers would be mixed: one writes while others wait."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            fcntl.lockf(self.stream, fcntl.LOCK_EX)
        except OSError:  # not a file
            super().emit(record)
            return
        try:
            super().emit(record)
        finally:
            fcntl.lockf(self.stream, fcntl.LOCK_UN)


def config_for(environment: Environment) -> dict[str, Any]:
    """A `dictConfig` for this app and for gunicorn alike."""
    plain = {"()": PlainFormatter, "fmt": PLAIN}
    as_json = {"()": JsonLines, "fmt": JSON, "rename_fields": {"levelname": "level"}}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"request_id": {"()": RequestIdFilter}, "noise": {"()": NoiseFilter}},
        "formatters": {"line": as_json if not environment.is_local else plain},
        "handlers": {"stderr": {"()": WholeLines, "formatter": "line", "filters": ["request_id"]}},
        "root": {"level": "INFO", "handlers": ["stderr"]},
        "loggers": {
            "gunicorn.error": {
                "level": "INFO",
                "propagate": True,
                "handlers": [],
                "filters": ["noise"] if environment.is_local else [],
            },
            "alembic": {"level": "WARNING"},
        },
    }
