"""WEB_TIMEOUT for a request: a request that hangs is logged, and a worker whose threads all hang is replaced.

gunicorn's timeout watches the heartbeat of a worker's main loop, and a gthread worker beats on while all its threads
hang. Here it beats while one of its threads is free, or has made progress within half of WEB_TIMEOUT. gunicorn replaces
a worker WEB_TIMEOUT after its last beat. By then each of its requests is past WEB_TIMEOUT, the last one by half of it.

One slow request does not hang a worker of four threads, since the other threads take new requests. It hangs a worker of
one thread only if other requests wait. An answer that has begun may pause for as long as it likes: a stream of events
does not hang.
"""

import logging
import math
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from flask_pooling.metrics import metrics

log = logging.getLogger(__name__)

View = TypeVar("View", bound=Callable[..., Any])


class Request:
    """A request that is being served."""

    __slots__ = ("environ", "logged", "moved", "pauses", "views")

    def __init__(self, environ: "dict[str, Any]", views: Mapping[str, Any] | None = None) -> None:
        self.environ, self.views = environ, views
        self.logged = False
        self.pauses = False  # its answer has begun, and the app has nothing more to send yet
        self.moved = time.monotonic()  # when it began, or last sent or took something

    @property
    def unlimited(self) -> bool:
        view = (self.views or {}).get(getattr(self.environ.get("werkzeug.request"), "endpoint", None) or "")
        return getattr(view, "unlimited", False)


in_flight: dict[int, Request] = {}  # by thread
_limit = [math.inf, 1]  # the seconds of WEB_TIMEOUT, and this worker's threads
_backlog: list[Callable[[], float]] = [lambda: math.nan]  # how many requests wait for a worker


def unlimited(view: View) -> View:
    """Let a view take as long as it likes until its answer begins. It is a decorator, below `@bp.get(...)` or around
    `as_view(...)`."""
    if isinstance(view, type):
        raise TypeError(f"unlimited({view.__name__}.as_view(...)), not the class")
    view.unlimited = True  # type: ignore[attr-defined]
    return view


def past(share: float = 1) -> list[tuple[int, Request]]:
    """Return the requests, by thread, that have made no progress for this share of WEB_TIMEOUT."""
    before = time.monotonic() - _limit[0] * share
    found = in_flight.copy().items()
    late = ((thread, request) for thread, request in found if request.moved < before and not request.pauses)
    return [(thread, request) for thread, request in late if not request.unlimited]


def is_hung(share: float = 1) -> bool:
    """Return whether none of this worker's threads makes progress and, if there is only one, other requests wait."""
    threads = _limit[1]
    # NaN: the kernel does not say how many wait, so some may.
    return len(in_flight) >= threads and len(past(share)) >= threads and (threads > 1 or _backlog[0]() != 0)


def watch(worker: Any, seconds: float, *, replace: bool, tick: Callable[[], None]) -> None:
    """Log what takes too long, from a thread of its own, and call `tick` at least twice a second.

    :param replace: stop the heartbeat of a worker that hangs. With `reload` it goes on: a developer may sit at a
        breakpoint.
    """
    _limit[:] = seconds, worker.cfg.threads
    _backlog[0] = metrics().sampled.get(metrics().backlog, _backlog[0])
    if replace:
        # gunicorn has no setting for this. Its documented contract is that a worker's `notify` is called again and
        # again, or the worker is replaced; tests/library/test_watchdog.py fails when that changes.
        beat = worker.notify
        worker.notify = lambda: None if is_hung(0.5) else beat()

    def run() -> None:
        while True:
            time.sleep(min(0.5, seconds / 8))
            try:
                tick()
                report()
            except Exception:
                log.exception("looking for requests past WEB_TIMEOUT has failed; it is tried again")

    threading.Thread(target=run, name="watchdog", daemon=True).start()


def report() -> None:
    """Log the stack of each request that is past WEB_TIMEOUT, once."""
    for thread, request in past():
        if request.logged or (frame := sys._current_frames().get(thread)) is None:
            continue
        request.logged = True
        environ = request.environ
        metrics().requests_over_limit.inc()
        method, path, request_id = (environ.get(name, "-") for name in ("REQUEST_METHOD", "PATH_INFO", "REQUEST_ID"))
        seconds, stack = time.monotonic() - request.moved, "".join(traceback.format_stack(frame))
        text = "request %s: %s %r has made no progress for %.1f seconds (WEB_TIMEOUT=%g). Its stack:\n%s"
        log.error(text, request_id, method, path, seconds, _limit[0], stack, extra={"request_id": request_id})
