"""WSGI middlewares that measure each request and watch its progress, and a check that refuses requests if there is no
plan."""

import io
import logging
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from flask import Flask, current_app
from gunicorn.http.errors import ParseException
from werkzeug.exceptions import ClientDisconnected, ServiceUnavailable
from werkzeug.wsgi import FileWrapper

from flask_pooling import process, watchdog
from flask_pooling.metrics import metrics

log = logging.getLogger(__name__)

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
# Bytes after which progress is noted, of a request's body and of an answer's.
RECEIVED = 1024
SENT = 64 * 1024


def refuse_without_the_plan() -> None:
    """Refuse requests if another server runs the app: it may have any number of workers, which no plan has counted."""
    if current_app.testing or process.has_the_plan(current_app.extensions["flask_pooling"].process):
        return
    how = "start `gunicorn` in the folder of gunicorn.conf.py, without naming an app"
    log.error("this server was not started with gunicorn.conf.py, and has no plan: %s", how)
    raise ServiceUnavailable(f"This server was not started with gunicorn.conf.py: {how}.")


class Measured:
    """Measures the time until an answer begins. It is around the Flask app, so that it sees every answer."""

    def __init__(self, app: Flask) -> None:
        self.app: WSGIApplication = app.wsgi_app
        self.views = app.view_functions

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        started = time.perf_counter()

        def answer(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            # By endpoint, not by path, and by known methods only: a client must not be able to create time series.
            request = environ.get("werkzeug.request")
            endpoint = (request and request.endpoint) or "none"
            method = environ["REQUEST_METHOD"]
            method = method if method in METHODS else "other"
            metrics().requests_of(method, endpoint, int(status[:3])).observe(time.perf_counter() - started)
            return start_response(status, headers, *error)

        outside = watchdog.in_flight.get(threading.get_ident())
        if outside and outside.views is None:  # a middleware around the app may have given it another environ
            outside.environ, outside.views = environ, self.views
        return self.app(environ, answer)


class Watched:
    """Notes which thread serves which request, and its progress. It is around everything that gunicorn calls, other
    middlewares and mounted apps included."""

    def __init__(self, app: WSGIApplication) -> None:
        self.app = app

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        thread, request = threading.get_ident(), watchdog.Request(environ)
        environ["wsgi.file_wrapper"] = FileWrapper  # gunicorn's sends a file past us, without visible progress
        if int(environ.get("CONTENT_LENGTH") or 0) > RECEIVED or "HTTP_TRANSFER_ENCODING" in environ:
            environ["wsgi.input"] = io.BufferedReader(Input(environ["wsgi.input"], request), RECEIVED)
        watchdog.in_flight[thread] = request
        try:
            body = self.app(environ, start_response)
        except BaseException:
            watchdog.in_flight.pop(thread, None)
            raise
        return Body(body, request, thread)


class Input(io.RawIOBase):
    """A request's body. A request whose body still arrives makes progress, however slowly."""

    def __init__(self, stream: Any, request: watchdog.Request) -> None:
        self.stream, self.request = stream, request

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            part = self.stream.read(min(len(buffer), RECEIVED))
        except (OSError, ParseException) as error:  # a client that went away, or a malformed chunk: 400
            raise ClientDisconnected from error
        self.request.moved = time.monotonic()
        buffer[: len(part)] = part
        return len(part)


class Body:
    """An answer's body. A stream makes progress while it sends, and may pause between two parts."""

    def __init__(self, body: Iterable[bytes], request: watchdog.Request, thread: int) -> None:
        self.body, self.request, self.thread = body, request, thread

    def __iter__(self) -> Iterator[bytes]:
        for part in self.body:
            self.request.pauses = False
            for begin in range(0, len(part), SENT) or (0,):
                self.request.moved = time.monotonic()
                yield part[begin : begin + SENT] if len(part) > SENT else part
            self.request.pauses = True
        self.request.pauses = False  # the code after the last part may hang

    def close(self) -> None:
        try:
            if hasattr(self.body, "close"):
                self.body.close()
        finally:
            watchdog.in_flight.pop(self.thread, None)
