"""The holders of connections: seconds by endpoint, and a line in the log for a connection on which nothing runs."""

import contextlib
import logging
import os
import socket
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

    __slots__ = ("began", "endpoint", "environ", "is_logged", "rested", "thread", "used")

    def __init__(self) -> None:
        self.endpoint, self.environ = "none", dict[str, Any]()
        if has_request_context():
            asked = request._get_current_object()  # type: ignore[attr-defined]  # once: each use of the proxy costs
            self.endpoint, self.environ = asked.endpoint or "none", asked.environ
        self.thread, self.is_logged = threading.get_ident(), False
        self.began = self.used = self.rested = time.perf_counter()


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


def report(limit: float, frozen: float = float("inf"), unlimited: Any = ()) -> None:
    """Log each connection that is held, and on which nothing has run for so many seconds, once. Call it at least twice
    a second: it sees that a statement runs only when it looks.

    :param frozen: the seconds after which a connection whose statement still runs is cut off, except in the threads
        `unlimited`. A server or a pooler that is stopped enforces no limit, and its kernel still answers keepalives.
    """
    now = time.perf_counter()
    for record, hold in [item for each in held.values() for item in each.copy().items()]:
        driver: Any = record.dbapi_connection
        if not hasattr(driver, "pgconn"):
            continue
        request_id, began = hold.environ.get("REQUEST_ID", "-"), _began.get(driver, 0)
        if driver.pgconn.transaction_status != TransactionStatus.ACTIVE:
            hold.rested = now
        elif now - max(hold.rested, began) > frozen and hold.thread not in unlimited:
            text = "request %s: %s has waited %g seconds for a server that seems to be frozen; it is cut off from it"
            log.error(text, request_id, hold.endpoint, frozen, extra={"request_id": request_id})
            with contextlib.suppress(Exception), socket.socket(fileno=os.dup(driver.fileno())) as ours:
                if not driver.closed:  # else the number may be another connection's by now
                    ours.shutdown(socket.SHUT_RDWR)
        else:
            hold.used = now
        idle = now - max(hold.used, began)
        if hold.is_logged or idle <= limit or (frame := sys._current_frames().get(hold.thread)) is None:
            continue
        hold.is_logged, stack = True, "".join(traceback.format_stack(frame))
        text = "request %s: %s holds a connection on which nothing has run for %.1f seconds (DB_HOLD_WARNING=%g);"
        text += " commit before slow calls. Its stack:\n%s"
        log.warning(text, request_id, hold.endpoint, idle, limit, stack, extra={"request_id": request_id})
