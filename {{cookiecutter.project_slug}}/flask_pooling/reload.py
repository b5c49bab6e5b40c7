"""In development: an app that cannot be loaded answers with the error, until the mistake is mended.

gunicorn's own reload does so for a syntax error alone; after any other error its workers cannot start, and it ends.
"""

import logging
import sys
import threading
import traceback
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from gunicorn.util import import_app  # the one that reads `wsgi_app`
from prometheus_client import REGISTRY

from flask_pooling.gunicorn import finish_on_ctrl_c

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIEnvironment

log = logging.getLogger(__name__)


def or_error(wsgi_app: str) -> str:
    """The `wsgi_app` for gunicorn.conf.py that loads this one, or shows why it cannot."""
    return f"flask_pooling.reload:Reloaded({wsgi_app!r})"


class Reloaded:
    """A WSGI app. gunicorn starts a worker anew when a file changes that was loaded. It does not watch a file that
    failed to load, so each request tries again."""

    def __init__(self, wsgi_app: str) -> None:
        self.wsgi_app, self.error, self.lock = wsgi_app, "", threading.Lock()
        self.app: Any = None
        finish_on_ctrl_c()  # also while the worker is only starting
        self.load()

    def load(self) -> None:
        forget(self.wsgi_app.partition(":")[0])
        before = collectors()
        try:
            self.app = import_app(self.wsgi_app)
        except (Exception, SystemExit) as reason:  # whatever the owner's code does
            if isinstance(reason, SystemExit) and not reason.code:
                raise  # gunicorn stops this worker
            for each in collectors() - before:  # a metric of the app's own would be there twice after the next try
                REGISTRY.unregister(each)
            error, self.error = self.error, traceback.format_exc()
            if error != self.error:
                log.error("the app cannot be loaded:\n%s", self.error)

    def __call__(self, environ: "WSGIEnvironment", start_response: "StartResponse") -> Iterable[bytes]:
        with self.lock:
            if self.app is None:
                self.load()
        if self.app is not None:
            answer: Iterable[bytes] = self.app(environ, start_response)
            return answer
        start_response("500 Internal Server Error", [("Content-Type", "text/plain; charset=utf-8")])
        return [f"The app cannot be loaded. Fix this error and reload the page.\n\n{self.error}".encode()]


def collectors() -> set[Any]:
    """There is no public way to ask for them."""
    return set(REGISTRY._collector_to_names)


def forget(package: str) -> None:
    """Let the next import read the files of a package anew."""
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
