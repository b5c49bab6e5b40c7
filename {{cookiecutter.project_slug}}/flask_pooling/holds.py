"""The holders of connections: seconds by endpoint, and a line in the log for a connection on which nothing runs."""

import logging
import sys
import threading
import time
import traceback
from typing import Any
from weakref import WeakKeyDictionary

from flask import has_request_context, request
from psycopg.pq import TransactionStatus
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.pool import ConnectionPoolEntry

log = logging.getLogger(__name__)


class Hold:
    """A connection that is in use: since when, and by which endpoint and thread."""

    __slots__ = ("began", "endpoint", "environ", "is_logged", "thread", "used")

    def __init__(self) -> None:
        self.endpoint, self.environ = "none", dict[str, Any]()
        if has_request_context():
            asked = request._get_current_object()  # type: ignore[attr-defined]  # once: each use of the proxy costs
            self.endpoint, self.environ = asked.endpoint or "none", asked.environ
        self.thread, self.is_logged = threading.get_ident(), False
        self.began = self.used = time.perf_counter()


held: dict[str, dict[ConnectionPoolEntry, Hold]] = {}  # by kind of process
_began: "WeakKeyDictionary[Any, float]" = WeakKeyDictionary()  # the last statement of each connection


def watch(engine: Engine) -> None:
    """Note when a statement begins. The listeners are the dialect's, which cost less than an engine's."""
    if engine.dialect.name != "postgresql":
        return

    def begins(cursor: Any, *arguments: object) -> None:
        _began[cursor.connection] = time.perf_counter()

    for name in ("do_execute", "do_execute_no_params", "do_executemany"):
        event.listen(engine, name, begins)


def report(limit: float) -> None:
    """Log each connection that is held, and on which nothing has run for so many seconds, once. Call it at least twice
    a second: it sees that a statement runs only when it looks."""
    now = time.perf_counter()
    for record, hold in [item for each in held.values() for item in each.copy().items()]:
        driver: Any = record.dbapi_connection
        if not hasattr(driver, "pgconn"):
            continue
        if driver.pgconn.transaction_status == TransactionStatus.ACTIVE:
            hold.used = now
        idle = now - max(hold.used, _began.get(driver, 0))
        if hold.is_logged or idle <= limit or (frame := sys._current_frames().get(hold.thread)) is None:
            continue
        hold.is_logged = True
        request_id, stack = hold.environ.get("REQUEST_ID", "-"), "".join(traceback.format_stack(frame))
        text = "request %s: %s holds a connection on which nothing has run for %.1f seconds (DB_HOLD_WARNING=%g);"
        text += " commit before slow calls. Its stack:\n%s"
        log.warning(text, request_id, hold.endpoint, idle, limit, stack, extra={"request_id": request_id})
