"""Liveness and readiness.

Liveness never touches the database: a blip there must not restart every instance. Readiness does, and answers within a
second whatever happens to it: it never queues behind a full pool, and a server that hangs is given up on. A worker all
of whose threads hang (watchdog.py) is neither alive nor ready.
"""

import socket
import struct
import threading
import time
from concurrent.futures import Future
from typing import Any

import psycopg
import sqlalchemy as sa
from flask import Blueprint, Response, current_app, jsonify
from sqlalchemy.engine import Engine
from sqlalchemy.pool import QueuePool

from flask_pooling import metrics, watchdog

ANSWER_WITHIN_SECONDS = 0.8
# A full pool is proof enough of a living database while its connections keep coming back.
PROOF_SECONDS = 0.2
# PostgreSQL's SSLRequest message. A server, or a pooler, answers it with one byte, before any login.
SSL_REQUEST = struct.pack("!ii", 8, 80877103)

HUNG = "Every thread of this worker is busy with a request that is past WEB_TIMEOUT; the log says where."

bp = Blueprint("pooling_health", __name__)


class Prober:
    """Asks the database whether it answers, one question at a time, in a thread that may hang in place of ours."""

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

    def problem(self) -> str | None:
        """What is wrong, or None."""
        if self.pool_is_full():
            moving = time.monotonic() - self._last_answer < PROOF_SECONDS
            return None if moving or self._server_is_there() else "all connections are in use, and it does not answer"
        try:
            self._ask().result(timeout=ANSWER_WITHIN_SECONDS)
        except TimeoutError:
            return f"no answer within {ANSWER_WITHIN_SECONDS} seconds"
        except sa.exc.SQLAlchemyError as error:
            return type(error).__name__
        return None

    def pool_is_full(self) -> bool:
        pool = self.engine.pool
        return isinstance(pool, QueuePool) and pool.checkedout() >= metrics.most(pool)

    def _server_is_there(self) -> bool:
        """Asked without becoming one of its connections, since the plan has none left for that."""
        if self._server is None:
            return self.engine.dialect.name != "postgresql"
        host, port = self._server
        family: int = socket.AF_INET6 if ":" in host else socket.AF_INET
        address: Any = (host, port)
        if host.startswith("/"):
            family, address = socket.AF_UNIX, f"{host}/.s.PGSQL.{port}"
        give_up = time.monotonic() + ANSWER_WITHIN_SECONDS
        try:
            with socket.socket(family) as server:
                server.settimeout(ANSWER_WITHIN_SECONDS)
                server.connect(address)
                server.sendall(SSL_REQUEST)
                server.settimeout(max(give_up - time.monotonic(), 0.01))
                return server.recv(1) != b""
        except OSError:
            return False

    def _ask(self) -> Future[None]:
        """The question that is under way, or a new one."""
        with self._lock:
            if self._running is None or self._running.done():
                self._running = Future()
                threading.Thread(target=self._answer, args=(self._running,), daemon=True).start()
            return self._running

    def _answer(self, future: Future[None]) -> None:
        try:
            with self.engine.connect() as connection:
                connection.execute(sa.select(1))
        except BaseException as error:  # noqa: BLE001  # it is raised where the answer is awaited
            future.set_exception(error)
        else:
            future.set_result(None)


def pool_state(engine: Engine) -> dict[str, Any]:
    """The pool of this worker, as it is now."""
    pool = engine.pool
    state: dict[str, Any] = {"class": type(pool).__name__}
    if isinstance(pool, QueuePool):
        state |= {"size": pool.size(), "checked_out": pool.checkedout(), "idle": pool.checkedin()}
    return state


@bp.get("/livez")
def livez() -> Response:
    return not_well(HUNG) if watchdog.is_hung() else jsonify(status="alive")


@bp.get("/readyz")
def readyz() -> Response:
    prober: Prober = current_app.extensions["flask_pooling"].prober
    pool = pool_state(prober.engine)
    if watchdog.is_hung():
        return not_well(HUNG, pool=pool)
    if problem := prober.problem():
        return not_well(f"The database is not ready: {problem}.", pool=pool)
    return jsonify(status="ready", pool=pool)


def not_well(detail: str, **members: Any) -> Response:
    response = jsonify(type="about:blank", title="Service Unavailable", status=503, detail=detail, **members)
    response.status_code = 503
    response.mimetype = "application/problem+json"
    response.headers["Retry-After"] = "1"
    return response
