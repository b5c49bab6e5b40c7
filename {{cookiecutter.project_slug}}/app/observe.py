"""What surrounds every request: its id, the security headers, the access line, the metrics.

A WSGI middleware, since it then sees every answer, whatever Flask did to make it.
"""

import random
import re
import time
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from app import metrics

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

REQUEST_ID = "app.request_id"
VALID_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})

# What suits an API: nothing is framed, sniffed, leaked in a referrer or loaded from elsewhere.
SECURITY = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'",
}


class Observed:
    """The app, observed; `log`, if any, is given what the line of each request says."""

    def __init__(self, app: "WSGIApplication", log: Callable[[dict[str, Any]], None] | None) -> None:
        self.app = app
        self.log = log

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        started = time.perf_counter()
        given = environ.get("HTTP_X_REQUEST_ID", "")
        # Only what is safe to repeat in a log and a header; anything else is replaced.
        made = given if VALID_REQUEST_ID.fullmatch(given) else f"{random.getrandbits(128):032x}"  # no secret
        environ[REQUEST_ID] = made

        def answer(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            present = {name for name, _ in headers}
            headers += [header for header in SECURITY.items() if header[0] not in present]
            headers.append(("X-Request-ID", made))
            self.record(environ, int(status[:3]), time.perf_counter() - started)
            return start_response(status, headers, *error)

        return self.app(environ, answer)

    def record(self, environ: "WSGIEnvironment", status: int, seconds: float) -> None:
        # By endpoint, not by path, and by known methods: a client must not be able to make up new time series.
        request = environ.get("werkzeug.request")
        endpoint = (request and request.endpoint) or "none"
        method = environ["REQUEST_METHOD"]
        metrics.count(method if method in METHODS else "other", endpoint, status, seconds)
        if self.log:
            fields = {
                "request_id": environ[REQUEST_ID],
                "method": method,
                "path": request.path if request else environ["PATH_INFO"],
                "status": status,
                "duration_ms": round(seconds * 1000, 2),
                "remote_address": environ.get("REMOTE_ADDR"),
            }
            self.log(fields)
