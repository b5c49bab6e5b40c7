"""Logs, by the logging module: JSON lines in production, plain text elsewhere. Both have the request id."""

import fcntl
import logging
import logging.config
from typing import Any, TextIO
from urllib.parse import quote

from flask import has_request_context, request

from app.config import Settings

PLAIN = "%(asctime)s %(levelname)-7s %(name)s [%(request_id)s] %(message)s"
JSON = "%(levelname)s %(name)s %(process)d %(request_id)s %(message)s"


def init_app(settings: Settings) -> None:
    """Set logging up in a job or a command as gunicorn does in a web worker, unless it is set up already."""
    if not logging.root.handlers:
        logging.config.dictConfig(dict_config(settings))
    logging.captureWarnings(True)  # the standard library's


class RequestIdFilter(logging.Filter):
    """Puts the id of the current request on each record."""

    def filter(self, record: logging.LogRecord) -> bool:
        if not hasattr(record, "request_id"):  # else it was passed with `extra`
            record.request_id = request.environ.get("REQUEST_ID", "-") if has_request_context() else "-"
        return True


def is_not_werkzeugs_access_line(record: logging.LogRecord) -> bool:
    """Leave out the line of `flask run` for each request: app/middleware.py writes one."""
    return " - - [" not in record.getMessage()


class PlainFormatter(logging.Formatter):
    """Plain text for people. A client's text cannot begin a line: more lines are indented, odd characters escaped."""

    def format(self, record: logging.LogRecord) -> str:
        if record.name == "werkzeug":  # of `flask run`, which writes for a terminal
            return record.getMessage()
        text = super().format(record)
        if record.name == "app.access":
            of = vars(record)
            path = quote(of["path"])
            text += f" {of['method']} {path} {of['status']} in {of['duration_ms']} ms from {of['remote_address']}"
        text = text.replace("\n", "\n    ")
        return "".join(each if each.isprintable() or each in "\n\t" else ascii(each)[1:-1] for each in text)


class WholeLines(logging.StreamHandler[TextIO]):
    """Lets one process write at a time. A pipe takes 4096 bytes at once, so longer lines of two workers would mix."""

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


def dict_config(settings: Settings) -> dict[str, Any]:
    """Return the configuration for `logging.config.dictConfig`, the same for gunicorn and every other process."""
    lines: dict[str, Any] = {"()": PlainFormatter, "fmt": PLAIN}
    if settings.in_production:
        lines = {
            "()": "pythonjsonlogger.json.JsonFormatter",
            "fmt": JSON,
            "timestamp": True,
            "rename_fields": {"levelname": "level"},
        }
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "filters": {"request_id": {"()": RequestIdFilter}, "once": {"()": lambda: is_not_werkzeugs_access_line}},
        "formatters": {"lines": lines},
        "handlers": {"stderr": {"()": WholeLines, "formatter": "lines", "filters": ["request_id"]}},
        "root": {"level": settings.log_level, "handlers": ["stderr"]},
        "loggers": {
            "gunicorn.error": {"level": "INFO", "propagate": True, "handlers": []},
            "werkzeug": {"filters": ["once"]},
            "alembic": {"level": "WARNING"},
        },
    }
