"""The holders of connections: seconds by endpoint, and one line for a connection on which nothing runs."""

import logging
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from flask import Flask, Response, stream_with_context

from flask_pooling import holds, run
from tests.library.plain import Item, db
from tests.library.test_metrics import read, value
from tests.library.test_page import PRIVATE
from tests.library.test_watchdog import get
from tests.serving import free_port, serving

LEAST = {"WEB_CONCURRENCY": 1, "WEB_THREADS": 6, "DB_HOLD_WARNING": 1.5}
LEAST |= {"DB_POOL_TIMEOUT": 3, "DB_STATEMENT_TIMEOUT": 3.5}
VIEWS = """
import os
import signal
import time
import flask_pooling
import sqlalchemy as sa
from flask import Response, stream_with_context
from app import create_app
from app.extensions import db
from flask_pooling import run

app = create_app()

@app.get("/read")
def read_and_call():
    db.session.execute(sa.text("select 1"))
    time.sleep(3)
    return ""

@app.get("/run")
def run_and_call():
    run(sa.text("select 1"))
    time.sleep(3)
    return ""

@app.get("/slow")
def slow_statement():
    db.session.execute(sa.text("select pg_sleep(3)"))
    return ""

@app.get("/frozen")
def frozen():
    process = db.session.scalar(sa.text("select pg_backend_pid()"))
    open(os.environ["FROZEN"], "w").write(str(process))
    os.kill(process, signal.SIGSTOP)
    db.session.execute(sa.text("select 1"))
    return ""

@app.get("/unlimited")
@flask_pooling.unlimited
def without_limit():
    db.session.execute(sa.text("set local statement_timeout = 0"))
    db.session.execute(sa.text("select pg_sleep(8)"))
    return ""

@app.get("/stream")
def stream():
    def lines():
        db.session.execute(sa.text("select 1"))
        for number in range(6):
            time.sleep(0.5)
            yield str(number)
    return Response(stream_with_context(lines()))
"""


@pytest.mark.postgres
def test_a_line_names_who_holds_an_idle_connection(environ: dict[str, str], tmp_path: Path) -> None:
    """A view that reads and then sleeps, and a stream, have one line each. The same by `run`, and a slow statement,
    have none. One whose process of the server is stopped gets 503 after twice DB_STATEMENT_TIMEOUT, and an unlimited
    view does not."""
    (tmp_path / "views.py").write_text(VIEWS)
    log, port, frozen = tmp_path / "log", free_port(), tmp_path / "frozen"
    more = environ | LEAST | {"PORT": port, "WEB_PROBE_PORT": port + 1, "PYTHONPATH": tmp_path, "FROZEN": frozen}
    answers: list[tuple[str, int]] = []
    with serving(log, "views:app", **more):
        asked = [
            threading.Thread(
                target=lambda path=path: answers.append((path, get(port, path, 60, **{"X-Request-ID": path})[0]))
            )
            for path in ("/read", "/run", "/slow", "/stream", "/frozen", "/unlimited")
        ]
        for thread in asked:
            thread.start()
        for thread in asked:
            thread.join()
        os.kill(int(frozen.read_text()), signal.SIGCONT)
        page = get(port + 1, "/pool.json")[1]
    assert {path for path, status in answers if status != 200} == {"/frozen"}
    assert ("/frozen", 503) in answers
    assert "request /frozen: frozen has waited 7 seconds for a server that seems to be frozen" in log.read_text()
    said = re.findall(r"request (\S+): (\S+) holds a connection on which nothing has run for", log.read_text())
    assert sorted(said) == [("/read", "read_and_call"), ("/stream", "stream")]
    assert re.search(r'"holders":\[(\["\w+",[\d.]+\],?){3}\]', page)


@pytest.fixture
def reported(plain: Flask, caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[float], list[str]]]:
    """A function that looks, and returns what was logged by then."""

    def look(limit: float) -> list[str]:
        holds.report(limit)
        return [record.getMessage() for record in caplog.records if record.name == "flask_pooling.holds"]

    with caplog.at_level(logging.WARNING), plain.app_context():
        yield look


@pytest.mark.postgres
def test_a_hold_is_logged_once(plain: Flask, reported: Callable[[float], list[str]]) -> None:
    """With the endpoint, and the stack; and the next one, of the same request, has a line of its own."""
    with plain.test_request_context("/items"):
        for number in (1, 2):
            db.session.execute(sa.select(Item))
            time.sleep(0.01)
            assert reported(10) == reported(10)
            assert len(reported(0.001)) == number
            assert len(reported(0.001)) == number
            db.session.commit()
        assert len(reported(0)) == 2
    line = reported(0)[0]
    assert "items holds a connection" in line
    assert "test_a_hold_is_logged_once" in line


@pytest.mark.postgres
def test_what_runs_is_not_idle(plain: Flask, reported: Callable[[float], list[str]]) -> None:
    """Many short statements are work, and so is a long one, as long as it runs."""
    db.session.execute(sa.select(1))
    time.sleep(0.3)
    db.session.execute(sa.select(1))
    assert reported(0.25) == []
    with db.engine.connect() as connection:
        began = threading.Event()
        sa.event.listen(db.engine, "before_cursor_execute", lambda *_: began.set())
        slow = threading.Thread(target=connection.execute, args=[sa.text("select pg_sleep(1)")])
        db.session.rollback()
        slow.start()
        began.wait()
        driver = connection.connection.dbapi_connection
        while slow.is_alive():
            if driver.pgconn.transaction_status == 1:  # type: ignore[union-attr]
                holds.report(0.5)
                time.sleep(0.05)
        slow.join()
        assert reported(0.5) == []


@pytest.mark.postgres
def test_run_holds_nothing(reported: Callable[[float], list[str]]) -> None:
    """Its connection is back before the view goes on."""
    run(sa.select(Item))
    time.sleep(0.01)
    assert reported(0.001) == []


def test_seconds_are_counted_by_endpoint(plain: Flask) -> None:
    """Not by path, and what is outside of a request is `none`; the pool page has the three with most."""
    name = 'db_connection_hold_seconds_total{endpoint="%s"}'

    def stream(number: int) -> Response:
        def lines() -> Iterator[str]:
            db.session.execute(sa.select(1))
            time.sleep(0.05)
            yield str(number)

        return Response(stream_with_context(lines()))

    plain.add_url_rule("/streams/<int:number>", "streams", stream)
    before = read(plain)
    for number in range(3):
        assert plain.test_client().get(f"/streams/{number}").text == str(number)
    plain.test_client().get("/items")
    with plain.app_context(), db.engine.connect():
        pass
    after = read(plain)
    assert value(after, name % "streams") >= value(before, name % "streams") + 0.15
    for endpoint in ("items", "none"):
        assert value(after, name % endpoint) > value(before, name % endpoint)
    assert "streams/" not in after
    answer = plain.test_client().get("/pool.json", environ_overrides=PRIVATE).json
    assert answer is not None
    held = [seconds for _, seconds in answer["now"]["holders"]]
    assert held == sorted(held, reverse=True)
    assert 0 < len(held) <= 3
