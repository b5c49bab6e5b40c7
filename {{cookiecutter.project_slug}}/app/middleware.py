"""The WSGI middleware around every request: it adds the request id, the security headers and the line in the log."""

import contextlib
import ipaddress
import logging
import re
import secrets
import time
from collections.abc import Iterable
from typing import Any
from wsgiref.types import StartResponse, WSGIEnvironment

from flask import Flask

VALID_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")
# To a browser, `//host` and `/\host` are another host, and `..` is another path.
PLAIN_PATH = re.compile(r"(?:/(?!\.{1,2}(?:/|\Z))[A-Za-z0-9._~-]+)+/?")
# Platforms ask for these by the address of an instance, which WEB_TRUSTED_HOSTS does not have.
PROBES = frozenset({"/livez", "/readyz"})

# Pages may load what this service serves, and nothing else: no inline script or style, no `onclick=`, no other host. A
# view may set the header itself. docs/deploy.md shows how to relax it for an extension whose page stays blank.
SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # Not "no-referrer": over HTTPS, protection against forged forms (CSRF) looks at the Referer.
    "Referrer-Policy": "strict-origin-when-cross-origin",
}

LOST_COOKIE = (
    "a Secure cookie was set in answer to a request over HTTP: browsers drop it, so logins do not last. Serve over"
    " HTTPS; if a proxy does so, set WEB_TRUSTED_PROXIES"
)

log = logging.getLogger("app.access")


def init_app(app: Flask) -> None:
    app.wsgi_app = Middleware(app)  # type: ignore[method-assign]


class Middleware:
    """Wraps the app. Hooks in the app would not do: one that fails, or that answers, keeps others from running."""

    def __init__(self, app: Flask) -> None:
        self.app, self.config = app.wsgi_app, app.config
        self.has_warned = False

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        began = time.perf_counter()
        undo_what_leads_elsewhere(environ)
        if (trusted := self.config["TRUSTED_HOSTS"]) and environ.get("PATH_INFO") in PROBES:
            environ["HTTP_HOST"] = trusted[0].lstrip(".")
        given = environ.get("HTTP_X_REQUEST_ID", "")
        # An id that is not safe in a log or a header is replaced.
        environ["REQUEST_ID"] = request_id = given if VALID_REQUEST_ID.fullmatch(given) else secrets.token_hex(16)

        def answer(status: str, headers: list[tuple[str, str]], *error: Any) -> Any:
            there = {name.lower() for name, _ in headers}
            if not self.has_warned and environ["wsgi.url_scheme"] == "http" and "set-cookie" in there:
                self.has_warned = any(n.lower() == "set-cookie" and "; secure" in v.lower() for n, v in headers)
                if self.has_warned:
                    log.warning(LOST_COOKIE)
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


def undo_what_leads_elsewhere(environ: WSGIEnvironment) -> None:
    """Accept only http or https, a plain path and an IP address from a proxy. ProxyFix takes any text for each, and
    many proxies pass on what the client sent."""
    if before := environ.get("werkzeug.proxy_fix.orig"):
        if environ["wsgi.url_scheme"] not in {"http", "https"}:
            environ["wsgi.url_scheme"] = before["wsgi.url_scheme"]
        if not PLAIN_PATH.fullmatch(environ.get("SCRIPT_NAME", "")):
            environ["SCRIPT_NAME"] = before["SCRIPT_NAME"] or ""
        environ["REMOTE_ADDR"] = address(environ["REMOTE_ADDR"]) or before["REMOTE_ADDR"]


def address(text: str) -> str | None:
    """Return the IP address in an entry of X-Forwarded-For, without the port that Azure adds; None if there is none."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(text)
        return text if "%" not in text else None
    return None
