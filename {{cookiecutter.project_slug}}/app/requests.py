"""What is added to every request: its id, the security headers, the access line in the log."""

import logging
import re
import secrets
import time

from flask import Flask, Response, g, request

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
    app.before_request(begin)
    app.after_request(end)  # registered first, so it runs last, and sees what others have set


def begin() -> None:
    g.began = time.perf_counter()
    given = request.headers.get("X-Request-ID", "")
    # Only what is safe to repeat in a log and a header; anything else is replaced.
    g.request_id = given if VALID_REQUEST_ID.fullmatch(given) else secrets.token_hex(16)
    request.environ["REQUEST_ID"] = g.request_id


def end(response: Response) -> Response:
    if "request_id" not in g:  # somebody else's hook answered before ours was asked
        begin()
    for name, value in SECURITY_HEADERS.items():
        if name not in response.headers:
            response.headers.add(name, value)
    response.headers["X-Request-ID"] = g.request_id
    duration_ms = round((time.perf_counter() - g.began) * 1000, 2)
    line = {"request_id": g.request_id, "method": request.method, "path": request.path, "status": response.status_code}
    log.info("request", extra=line | {"duration_ms": duration_ms, "remote_address": request.remote_addr})
    return response
