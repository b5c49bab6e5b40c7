"""Liveness and readiness, also when the database is in trouble."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask.testing import FlaskClient
from serving import wait_until

from app import health
from app.extensions import db


def timed(client: FlaskClient, path: str) -> tuple[int, float, Any]:
    start = time.monotonic()
    response = client.get(path)
    return response.status_code, time.monotonic() - start, response.get_json()


def test_liveness_does_not_touch_the_database(app: Flask) -> None:
    """A blip of the database must not restart every copy."""
    with app.app_context():
        sa.event.listen(db.engine, "do_connect", lambda *_: pytest.fail("it connected"))
    assert app.test_client().get("/livez").get_json() == {"status": "alive"}


def test_readiness_says_what_the_pool_is_doing(client: FlaskClient, database_kind: str) -> None:
    """200, and the pool of the worker that answered."""
    status, _, body = timed(client, "/readyz")
    assert (status, body["status"]) == (200, "ready")
    if database_kind == "postgres":
        assert body["pool"]["class"] == "QueuePool"
        assert body["pool"]["size"] >= 1
    else:
        assert body["pool"] == {"class": "NullPool"}


def test_a_database_that_is_gone_is_503(make_app: Any) -> None:
    """With Retry-After, and no word of where it was."""
    app = make_app()
    with app.app_context():

        def refuse(*_: Any) -> None:
            raise sa.exc.OperationalError("connect to 10.1.2.3", None, Exception("refused"))

        sa.event.listen(db.engine, "do_connect", refuse)
    response = app.test_client().get("/readyz")
    assert response.status_code == 503
    assert response.headers["Retry-After"]
    assert "10.1.2.3" not in response.text
    assert app.test_client().get("/livez").status_code == 200


@contextmanager
def impatient() -> Iterator[None]:
    """What is given up within a second is given up sooner, so that a test need not wait so long. Only while it hangs: a
    database that does answer may take its time on a busy machine."""
    assert health.ANSWER_WITHIN_SECONDS < 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(health, "ANSWER_WITHIN_SECONDS", 0.05)
        yield


def test_a_database_that_hangs_is_given_up_within_a_second(make_app: Any) -> None:
    """And the question that hangs is not asked again: probes must not pile up connections."""
    app = make_app(DB_MAX_CONNECTIONS="100", APP_INSTANCES="2")  # room for more than the one that hangs
    let_go = threading.Event()
    asked = []

    def hang(*_: Any) -> None:
        asked.append(1)
        let_go.wait(10)

    sa.event.listen(app.extensions["statements"], "before_cursor_execute", hang)
    client = app.test_client()
    try:
        for _ in range(2):
            with impatient():
                status, seconds, body = timed(client, "/readyz")
            assert status == 503
            assert seconds < 1
            assert "no answer" in body["detail"]
            wait_until(lambda: asked)
        assert len(asked) == 1
    finally:
        let_go.set()
    app.extensions["prober"]._running.result(10)
    assert client.get("/readyz").status_code == 200


@contextmanager
def full(app: Flask) -> Iterator[None]:
    with app.app_context():
        held = [db.engine.connect() for _ in range(db.engine.pool.size())]  # type: ignore[attr-defined]
    yield
    for connection in held:
        connection.close()


@pytest.mark.postgres
@pytest.mark.live
def test_readiness_does_not_queue_behind_a_full_pool(app: Flask, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool that is busy is ready for as long as its server is there, which is asked without a connection."""
    monkeypatch.setattr(health, "PROOF_SECONDS", 0)
    client = app.test_client()
    assert client.get("/readyz").status_code == 200
    with full(app):
        status, seconds, body = timed(client, "/readyz")
        assert (status, body["pool"]["idle"]) == (200, 0)
        assert seconds < 0.5
    assert client.get("/readyz").status_code == 200


@pytest.mark.postgres
@pytest.mark.live
@pytest.mark.parametrize("state", ["gone", "hangs", "moves"])
def test_behind_a_full_pool_a_server_that_is_not_there_is_noticed(
    app: Flask, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """Within a second, whether nobody listens any more or somebody who does not answer. While connections keep coming
    back, nobody is asked."""
    client = app.test_client()
    prober: health.Prober = app.extensions["prober"]
    assert client.get("/readyz").status_code == 200
    with socket.create_server(("127.0.0.1", 0)) as silent, full(app):
        prober._server = silent.getsockname()
        if state == "gone":
            silent.close()
        prober._last_answer = time.monotonic()
        monkeypatch.setattr(health, "PROOF_SECONDS", 10 if state == "moves" else 0)
        with impatient():
            status, seconds, body = timed(client, "/readyz")
        assert seconds < 1
        assert status == (200 if state == "moves" else 503)
        assert state == "moves" or "does not answer" in body["detail"]
    assert client.get("/readyz").status_code == 200
