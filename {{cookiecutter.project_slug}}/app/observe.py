"""What surrounds every request: its id, the security headers, the access line, the metrics.

A WSGI middleware, since it then sees every answer, whatever Flask did to make it.
"""

import os
import random
import re
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import msgspec

from app import metrics

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

REQUEST_ID = "app.request_id"
VALID_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

# What suits an API: nothing is framed, sniffed, leaked in a referrer or loaded from elsewhere.
SECURITY = (
    ("X-Content-Type-Options", "nosniff"),
    ("X-Frame-Options", "DENY"),
    ("Referrer-Policy", "no-referrer"),
    ("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"),
)


def _now() -> datetime:
    return datetime.now(UTC)


class AccessLine(msgspec.Struct, kw_only=True):
    """What the log says of a request, in this order."""

    timestamp: datetime = msgspec.field(default_factory=_now)
    level: str = "INFO"
    name: str = "app.access"
    process: int = msgspec.field(default_factory=os.getpid)
    request_id: str
    method: str
    path: str
    status: int
    duration_ms: float
    remote_address: str | None


class Observed:
    """The app, observed; `log`, if any, is given the line of each request."""

    def __init__(self, app: "WSGIApplication", log: Callable[[AccessLine], None] | None) -> None:
        self.app = app
        self.log = log

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        started = time.perf_counter()
        request_id = environ.get("HTTP_X_REQUEST_ID")
        # Only what is safe to repeat in a log and a header; anything else is replaced.
        if not request_id or not VALID_REQUEST_ID.fullmatch(request_id):
            request_id = random.randbytes(16).hex()  # noqa: S311  # no secret
        environ[REQUEST_ID] = request_id

        def answer(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            names = [name for name, _ in headers]
            headers += [header for header in SECURITY if header[0] not in names]
            headers.append(("X-Request-ID", request_id))
            self.record(environ, int(status[:3]), time.perf_counter() - started)
            return start_response(status, headers, *error)

        return self.app(environ, answer)

    def record(self, environ: "WSGIEnvironment", status: int, seconds: float) -> None:
        # By endpoint, not by path, and by known methods: a client must not be able to make up new time series.
        request = environ.get("werkzeug.request")
        endpoint = (request and request.endpoint) or "none"
        method = environ["REQUEST_METHOD"]
        metrics.requests_of(method if method in METHODS else "other", endpoint, status).observe(seconds)
        if self.log:
            line = AccessLine(
                request_id=environ[REQUEST_ID],
                method=method,
                path=request.path if request else environ["PATH_INFO"],
                status=status,
                duration_ms=int(seconds * 100_000) / 100,  # round() would cost as much as the whole encoding
                remote_address=environ.get("REMOTE_ADDR"),
            )
            self.log(line)
