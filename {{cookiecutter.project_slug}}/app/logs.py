"""Logs: one JSON object a line in production, plain lines elsewhere, and the request id on both.

python-json-logger, because it is a formatter for the logging module that everything here already uses (gunicorn and
SQLAlchemy too), where structlog would be a second way to log.
"""

import logging
import os
from typing import Any

from flask import has_request_context, request

from app.config import Environment
from app.observe import REQUEST_ID

# No line shows these, and each costs something for every record.
logging.logThreads = logging.logMultiprocessing = False

PLAIN = "%(asctime)s %(levelname)-7s %(name)s [%(request_id)s] %(message)s"
JSON = "%(asctime)s %(levelname)s %(name)s %(process)d %(request_id)s %(message)s"


class RequestIdFilter(logging.Filter):
    """Puts the id of the current request on each record that has none yet."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not hasattr(record, "request_id"):
            record.request_id = request.environ.get(REQUEST_ID, "-") if has_request_context() else "-"
        return True


class Stderr(logging.Handler):
    """A line is one write to stderr, and takes no lock: a StreamHandler's is held while the line is formatted and
    written, and the threads of a worker, which log each request, would queue up for it."""

    def createLock(self) -> None:  # noqa: N802  # logging's name
        self.lock = None

    def handle(self, record: logging.LogRecord) -> bool:
        wanted = bool(self.filter(record))
        if wanted:
            self.emit(record)
        return wanted

    def emit(self, record: logging.LogRecord) -> None:
        try:
            os.write(2, f"{self.format(record)}\n".encode(errors="backslashreplace"))
        except Exception:  # noqa: BLE001  # as in all handlers: a line that cannot be written fails no request
            self.handleError(record)


def config_for(environment: Environment) -> dict[str, Any]:
    """A `dictConfig` for this app and for gunicorn alike."""
    in_production = environment is Environment.PRODUCTION
    plain = {"format": PLAIN}
    as_json = {"()": "pythonjsonlogger.json.JsonFormatter", "fmt": JSON, "rename_fields": {"levelname": "level"}}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"request_id": {"()": RequestIdFilter}},
        "formatters": {"line": as_json if in_production else plain},
        "handlers": {
            "stderr": {"()": Stderr, "formatter": "line", "filters": ["request_id"]},
        },
        "root": {"level": "INFO", "handlers": ["stderr"]},
        "loggers": {
            "gunicorn.error": {"level": "INFO", "propagate": True, "handlers": []},
            "alembic": {"level": "WARNING"},
        },
    }
