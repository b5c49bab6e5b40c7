"""What is added to every request: its id, the security headers, the access line in the log."""

import logging
import re
import secrets
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from flask import Flask

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

VALID_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")

# Pages may load what this service serves, and nothing else. A view that needs more sets the header itself, and wins.
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not "no-referrer": over HTTPS, protection against forged forms (CSRF) looks at the Referer.
    "Referrer-Policy": "strict-origin-when-cross-origin",
}

log = logging.getLogger("app.access")


def init_app(app: Flask) -> None:
    app.wsgi_app = Middleware(app.wsgi_app)  # type: ignore[method-assign]


class Middleware:
    """Around the app, and not hooks in it: a hook that fails, or that answers by itself, keeps others from running."""

    def __init__(self, app: "WSGIApplication") -> None:
        self.app = app

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        began = time.perf_counter()
        given = environ.get("HTTP_X_REQUEST_ID", "")
        # Only what is safe to repeat in a log and a header; anything else is replaced.
        environ["REQUEST_ID"] = request_id = given if VALID_REQUEST_ID.fullmatch(given) else secrets.token_hex(16)

        def answer(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            there = {name.lower() for name, _ in headers}
            ours = {**SECURITY_HEADERS, "X-Request-ID": request_id}
            headers = [*headers, *((name, value) for name, value in ours.items() if name.lower() not in there)]
            line = {
                "request_id": request_id,
                "method": environ["REQUEST_METHOD"],
                "path": environ.get("PATH_INFO", "").encode("latin-1", "replace").decode(errors="replace"),
                "status": int(status[:3]),
                "duration_ms": round((time.perf_counter() - began) * 1000, 2),
                "remote_address": environ.get("REMOTE_ADDR"),
            }
            log.info("request", extra=line)
            return start_response(status, headers, *error)

        return self.app(environ, answer)
