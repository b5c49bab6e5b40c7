"""Liveness and readiness, also when the database is in trouble."""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask

from flask_pooling import health, metrics
from flask_pooling.probes import PRIVATE
from tests.library.conftest import engine_of
from tests.serving import wait_until


def timed(app: Flask, path: str) -> tuple[int, float, Any]:
    start = time.monotonic()
    response = app.test_client().get(path, environ_overrides={PRIVATE: True})
    return response.status_code, time.monotonic() - start, response.get_json()


def test_liveness_does_not_touch_the_database(plain: Flask) -> None:
    """A blip of the database must not restart every instance."""
    taken: list[object] = []
    sa.event.listen(engine_of(plain), "checkout", lambda *_: taken.append(1))
    assert plain.test_client().get("/livez").get_json() == {"status": "alive"}
    assert taken == []


def test_a_database_that_is_gone_is_503(make_plain: Callable[..., Flask]) -> None:
    """With Retry-After, and no word of where it was."""
    app = make_plain()

    def refuse(*_: Any) -> None:
        raise sa.exc.OperationalError("connect to 10.1.2.3", None, Exception("refused"))

    sa.event.listen(engine_of(app), "do_connect", refuse, insert=True)
    response = app.test_client().get("/readyz")
    assert response.status_code == 503
    assert response.headers["Retry-After"]
    assert "10.1.2.3" not in response.text
    assert app.test_client().get("/livez").status_code == 200


@contextmanager
def impatient() -> Iterator[None]:
    """Give up sooner than within a second, so that a test need not wait so long."""
    assert health.ANSWER_WITHIN_SECONDS < 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(health, "ANSWER_WITHIN_SECONDS", 0.05)
        yield


def test_a_database_that_hangs_is_given_up_within_a_second(make_plain: Callable[..., Flask]) -> None:
    """And the question that hangs is not asked again: probes must not pile up connections."""
    app = make_plain()
    let_go, asked = threading.Event(), []

    def hang(*_: Any) -> None:
        asked.append(1)
        let_go.wait(10)

    sa.event.listen(engine_of(app), "before_cursor_execute", hang)
    try:
        for _ in range(2):
            with impatient():
                status, seconds, body = timed(app, "/readyz")
            assert status == 503
            assert seconds < 1
            assert "no answer" in body["detail"]
            wait_until(lambda: asked)
        assert len(asked) == 1
    finally:
        let_go.set()
    app.extensions["flask_pooling"].prober._running.result(10)
    assert timed(app, "/readyz")[0] == 200


@contextmanager
def old_proof(app: Flask) -> Iterator[health.Prober]:
    """Pretend that no connection has come back for a while."""
    prober: health.Prober = app.extensions["flask_pooling"].prober
    prober._last_answer = float("-inf")
    yield prober


def test_nothing_is_asked_while_connections_come_back(plain: Flask) -> None:
    """A connection that a request has just given back is proof enough; later a question is asked again."""
    taken: list[object] = []
    assert timed(plain, "/readyz")[0] == 200
    sa.event.listen(engine_of(plain), "checkout", lambda *_: taken.append(1))
    for _ in range(3):
        assert timed(plain, "/readyz")[0] == 200
    assert taken == []
    with old_proof(plain):
        assert timed(plain, "/readyz")[0] == 200
    assert taken == [1]


@pytest.mark.postgres
def test_a_probe_takes_no_connection_that_a_request_could_need(plain: Flask) -> None:
    """Where none is idle, it asks without one. A request that waits for the probe's is not counted as waiting."""
    engine, waits = engine_of(plain), metrics.metrics().pool_wait._sum
    assert timed(plain, "/readyz")[0] == 200
    opened: list[object] = []
    sa.event.listen(engine, "connect", lambda *_: opened.append(1))
    with engine.connect(), old_proof(plain):  # one is open and in use, and the pool may open more
        assert timed(plain, "/readyz")[0] == 200
    assert opened == []
    before, asked, go_on = waits.get(), threading.Event(), threading.Event()

    def hang(*_: object) -> None:
        asked.set()
        go_on.wait(10)

    with ExitStack() as stack:
        for _ in range(engine.pool.size() - 1):  # type: ignore[attr-defined]
            stack.enter_context(engine.connect())
        engine.connect().close()
        sa.event.listen(engine, "before_cursor_execute", hang)
        with old_proof(plain) as prober:
            future = prober._ask()
            assert asked.wait(10)
            threading.Timer(0.2, go_on.set).start()
            engine.connect().close()  # has to wait for the probe's
        future.result(10)
    assert waits.get() == before


@pytest.mark.usefixtures("production")
def test_in_production_anybody_may_ask_and_is_told_no_numbers(make_plain: Callable[..., Flask]) -> None:
    """On the public port, and on the port of the probes, where /metrics and /pool have them."""
    app = make_plain()
    for environ in {}, {PRIVATE: True}:
        for path, status in ("/livez", "alive"), ("/readyz", "ready"):
            assert app.test_client().get(path, environ_overrides=environ).get_json() == {"status": status}


@contextmanager
def full(app: Flask) -> Iterator[None]:
    engine = engine_of(app)
    held = [engine.connect() for _ in range(engine.pool.size())]  # type: ignore[attr-defined]
    yield
    for connection in held:
        connection.close()


@pytest.mark.postgres
def test_readiness_does_not_queue_behind_a_full_pool(plain: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that is busy is ready for as long as its server is there, which is asked without a connection."""
    monkeypatch.setattr(health, "PROOF_SECONDS", 0)
    assert timed(plain, "/readyz")[0] == 200
    with full(plain):
        assert timed(plain, "/readyz")[0] == 200
    assert timed(plain, "/readyz")[0] == 200


@pytest.mark.postgres
@pytest.mark.parametrize("state", ["gone", "hangs", "moves"])
def test_behind_a_full_pool_a_server_that_is_not_there_is_noticed(
    plain: Flask, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """Within a second, whether nobody listens any more or somebody who does not answer. While connections keep coming
    back, nobody is asked."""
    prober: health.Prober = plain.extensions["flask_pooling"].prober
    assert timed(plain, "/readyz")[0] == 200
    with socket.create_server(("127.0.0.1", 0)) as silent, full(plain):
        prober._server = silent.getsockname()
        if state == "gone":
            silent.close()
        prober._last_answer = time.monotonic()
        monkeypatch.setattr(health, "PROOF_SECONDS", 10 if state == "moves" else 0)
        with impatient():
            status, seconds, body = timed(plain, "/readyz")
        assert seconds < 1
        assert status == (200 if state == "moves" else 503)
        assert state == "moves" or "does not answer" in body["detail"]
