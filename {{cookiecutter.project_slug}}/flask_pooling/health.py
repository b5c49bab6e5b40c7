"""Liveness and readiness.

Liveness never asks the database: a short outage must not restart every instance. Readiness does, and answers within a
second, whatever the database does. It asks nothing while requests return their connections, borrows a connection only
if one is idle, and gives up on a server that hangs. A worker whose threads all hang (watchdog.py) is neither alive nor
ready.
"""

import socket
import struct
import threading
import time
from concurrent.futures import Future
from typing import Any

import psycopg
import sqlalchemy as sa
from flask import Blueprint, current_app, jsonify
from flask.typing import ResponseReturnValue
from sqlalchemy.engine import Engine
from sqlalchemy.pool import QueuePool

from flask_pooling import metrics, watchdog

ANSWER_WITHIN_SECONDS = 0.8
# A connection that came back within so many seconds proves that the database is alive.
PROOF_SECONDS = 1.0
# PostgreSQL's SSLRequest message. A server, or a pooler, answers it with one byte, before any login.
SSL_REQUEST = struct.pack("!ii", 8, 80877103)

HUNG = "Every thread of this worker is busy with a request that is past WEB_TIMEOUT; the log has their stacks."

bp = Blueprint("pooling_health", __name__)


class Prober:
    """Asks the database whether it answers, one question at a time. A thread of its own may hang meanwhile."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._lock = threading.Lock()
        self._running: Future[None] | None = None
        self._last_answer = float("-inf")
        self._server: tuple[str, int] | None = None  # where a connection led to
        sa.event.listen(engine, "checkin", self._checked_in)
        if engine.dialect.name == "postgresql":
            sa.event.listen(engine, "connect", self._connected)

    def _connected(self, connection: "psycopg.Connection[Any]", record: object) -> None:
        self._server = (connection.info.hostaddr or connection.info.host, connection.info.port)

    def _checked_in(self, connection: object, record: object) -> None:
        if connection is not None:  # None: it was invalidated
            self._last_answer = time.monotonic()

    def has_answered(self) -> bool:
        return time.monotonic() - self._last_answer < PROOF_SECONDS

    def problem(self) -> str | None:
        """Return the problem, or None."""
        if self.has_answered():
            return None
        if not self.may_borrow():
            return None if self._server_is_there() else "all connections are in use, and it does not answer"
        try:
            self._ask().result(timeout=ANSWER_WITHIN_SECONDS)
        except TimeoutError:
            return None if self.has_answered() else f"no answer within {ANSWER_WITHIN_SECONDS} seconds"
        except sa.exc.SQLAlchemyError as error:
            return type(error).__name__
        return None

    def may_borrow(self) -> bool:
        """Return whether a connection is idle, or none is in use. A question that is under way has its own."""
        pool = self.engine.pool
        asking = self._running is not None and not self._running.done()
        return asking or not isinstance(pool, QueuePool) or pool.checkedin() > 0 or pool.checkedout() == 0

    def _server_is_there(self) -> bool:
        """Ask the server without logging in: the plan has no connection left for that."""
        if self._server is None:
            return self.engine.dialect.name != "postgresql"
        host, port = self._server
        family: int = socket.AF_INET6 if ":" in host else socket.AF_INET
        address: Any = (host, port)
        if host.startswith("/"):
            family, address = socket.AF_UNIX, f"{host}/.s.PGSQL.{port}"
        try:
            with socket.socket(family) as server:
                server.settimeout(ANSWER_WITHIN_SECONDS / 2)  # to connect, and to answer
                server.connect(address)
                server.sendall(SSL_REQUEST)
                return server.recv(1) != b""
        except OSError:
            return False

    def _ask(self) -> Future[None]:
        """Return the question that is under way, or a new one."""
        with self._lock:
            if self._running is None or self._running.done():
                self._running = Future()
                threading.Thread(target=self._answer, args=(self._running,), daemon=True).start()
            return self._running

    def _answer(self, future: Future[None]) -> None:
        pool, failure = self.engine.pool, None
        if isinstance(pool, metrics.QueuePool):
            pool.probe = threading.get_ident()
        try:
            with self.engine.connect() as connection:
                connection.execute(sa.select(1))
        except BaseException as error:  # noqa: BLE001  # it is raised where the answer is awaited
            failure = error
        if isinstance(pool, metrics.QueuePool):
            pool.probe = None
        future.set_result(None) if failure is None else future.set_exception(failure)


@bp.get("/livez")
def livez() -> ResponseReturnValue:
    return not_well(HUNG) if watchdog.is_hung() else jsonify(status="alive")


@bp.get("/readyz")
def readyz() -> ResponseReturnValue:
    if watchdog.is_hung():
        return not_well(HUNG)
    problem = current_app.extensions["flask_pooling"].prober.problem()
    return not_well(f"The database is not ready: {problem}.") if problem else jsonify(status="ready")


def not_well(detail: str) -> ResponseReturnValue:
    problem = jsonify(type="about:blank", title="Service Unavailable", status=503, detail=detail)
    return problem, 503, {"Content-Type": "application/problem+json", "Retry-After": "1"}
