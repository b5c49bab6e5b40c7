"""WEB_TIMEOUT for a request: what hangs is logged, a worker that hangs is replaced, what makes progress is left
alone."""

import http.client
import io
import math
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flask import Flask, Response, send_file
from flask.views import MethodView
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.test import Client

import flask_pooling
from flask_pooling import watchdog
from flask_pooling.middleware import Watched
from tests.serving import SECONDS, free_port, serving, wait_until

TIMEOUT = 3
VIEWS = """
import time
import flask_pooling
from app import create_app

app = create_app()

@app.get("/hang")
def hang():
    time.sleep(600)

@app.get("/slow")
def slow():
    time.sleep(8)
    return "done"

@app.get("/events")
def events():
    def some():
        yield "first "
        time.sleep(8)
        yield "done"
    return app.response_class(some())

@app.get("/late")
@flask_pooling.unlimited
def late():
    time.sleep(600)
"""
# One worker with two threads, and a ladder of times that ends below WEB_TIMEOUT.
LEAST = {
    "WEB_CONCURRENCY": 1,
    "WEB_THREADS": 2,
    "WEB_TIMEOUT": TIMEOUT,
    "WEB_GRACEFUL_TIMEOUT": TIMEOUT,
    "DB_CONNECT_TIMEOUT": 2,
    "DB_POOL_TIMEOUT": 2,
    "DB_STATEMENT_TIMEOUT": 2.5,
}


def get(port: int, path: str, seconds: float = 2, **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=seconds)
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        return response.status, response.read().decode()
    except (OSError, http.client.HTTPException):
        return 0, ""
    finally:
        connection.close()


def begin(port: int, path: str, *ids: str) -> None:
    """Send requests that nobody waits for, each in a thread of its own."""
    for request_id in ids:
        asked = threading.Thread(target=get, args=(port, path, 60), kwargs={"X-Request-ID": request_id}, daemon=True)
        asked.start()


@pytest.fixture
def service(environ: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[int, int, Path]]:
    """The port of the service, the port of its probes, and its log. A parameter has more words for gunicorn."""
    (tmp_path / "views.py").write_text(VIEWS)
    log, port = tmp_path / "log", free_port()
    more: dict[str, Any] = environ | LEAST | {"PORT": port, "WEB_PROBE_PORT": port + 1, "PYTHONPATH": tmp_path}
    with serving(log, "views:app", *getattr(request, "param", ()), **more):
        yield port, port + 1, log


def metric(probe: int, name: str) -> float:
    found = re.search(rf"^{name} (.+)$", get(probe, "/metrics")[1], re.MULTILINE)
    return float(found[1]) if found else 0


@pytest.mark.postgres
def test_a_worker_that_hangs_is_replaced(service: tuple[int, int, Path]) -> None:
    """By gunicorn, while its requests would go on for minutes; until then its probes say so. This is what shows that
    gunicorn still asks for a heartbeat as watchdog.py thinks."""
    port, probe, log = service
    assert get(probe, "/livez")[0] == 200
    begin(port, "/hang", "first", "second")
    wait_until(lambda: get(probe, "/livez")[0] == 503)
    assert get(probe, "/readyz")[0] == 503
    assert metric(probe, "web_slots_over_limit") == 2
    wait_until(lambda: get(port, "/livez", 2)[0] == 200)
    assert get(probe, "/livez")[0] == get(probe, "/readyz")[0] == 200
    assert metric(probe, "web_requests_over_limit_total") == 2
    assert metric(probe, "web_workers_replaced_total") == 1
    said = log.read_text()
    for request_id in ("first", "second"):
        assert len(re.findall(rf"request {request_id}: GET '/hang' has made no progress", said)) == 1
    assert "time.sleep(600)" in said


@pytest.mark.postgres
@pytest.mark.parametrize(("workers", "threads", "path"), [(2, 1, "/slow"), (1, 2, "/events")])
def test_slow_requests_and_quiet_streams_are_served(
    environ: dict[str, str], tmp_path: Path, workers: int, threads: int, path: str
) -> None:
    """One rule, whatever number of threads the plan chooses: a slow request is served while no other waits for it, and
    a stream may say nothing for more than one and a half times WEB_TIMEOUT."""
    (tmp_path / "views.py").write_text(VIEWS)
    answers: list[tuple[int, str]] = []
    more: dict[str, Any] = environ | LEAST | {"PYTHONPATH": tmp_path}
    more |= {"WEB_CONCURRENCY": workers, "WEB_THREADS": threads}
    with serving(tmp_path / "log", "views:app", **more) as server:
        asking = [threading.Thread(target=lambda: answers.append(get(server.port, path, SECONDS))) for _ in range(2)]
        for thread in asking:
            thread.start()
        for thread in asking:
            thread.join()
    assert [(status, text[-4:]) for status, text in answers] == [(200, "done")] * 2


@pytest.mark.postgres
@pytest.mark.parametrize("service", [("--max-requests", "5", "--max-requests-jitter", "0")], indirect=True)
def test_a_worker_that_ends_in_time_does_not_hang(service: tuple[int, int, Path]) -> None:
    """It is replaced after `max_requests`, and gives its last request WEB_GRACEFUL_TIMEOUT, no more."""
    port, probe, log = service
    begin(port, "/late", "late")
    wait_until(lambda: metric(probe, "web_slots_busy") == 1)
    wait_until(lambda: get(port, "/livez") and "Autorestarting worker" in log.read_text())
    wait_until(lambda: get(port, "/livez", 2)[0] == 200)
    assert metric(probe, "web_workers_replaced_total") == 0
    assert metric(probe, "web_requests_over_limit_total") == 0
    assert "WORKER TIMEOUT" not in log.read_text()


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, watchdog.Request]]:
    """As if this process were a worker of two threads with a WEB_TIMEOUT of ten seconds."""
    monkeypatch.setattr(watchdog, "_limit", [10.0, 2])
    watchdog.in_flight.clear()
    yield watchdog.in_flight
    watchdog.in_flight.clear()


def request_since(seconds: float, **environ: Any) -> watchdog.Request:
    request = watchdog.Request(environ, {})
    request.moved -= seconds
    return request


@pytest.mark.sqlite
def test_when_a_worker_hangs(hanging: dict[int, watchdog.Request], plain: Flask) -> None:
    """Only when every one of its threads does; then neither probe is 200, on either port."""
    hanging[1] = request_since(11)
    assert not watchdog.is_hung()
    hanging[2] = request_since(9)
    assert not watchdog.is_hung()
    assert watchdog.is_hung(0.5)
    hanging[2] = request_since(11)
    assert watchdog.is_hung()
    for private in ({}, {"flask_pooling.private": True}):
        client = plain.test_client()
        for path in ("/livez", "/readyz"):
            answer = client.get(path, environ_overrides=private)
            assert (answer.status_code, answer.mimetype) == (503, "application/problem+json")


@pytest.mark.sqlite
def test_a_worker_of_one_thread_hangs_where_others_wait(
    hanging: dict[int, watchdog.Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise its request is only slow. Where the kernel does not say whether somebody waits, somebody may."""
    monkeypatch.setattr(watchdog, "_limit", [10.0, 1])
    hanging[1] = request_since(11)
    for waiting, hangs in ((0, False), (1, True), (math.nan, True)):
        monkeypatch.setattr(watchdog, "_backlog", [lambda waiting=waiting: waiting])
        assert watchdog.is_hung() is hangs
    assert len(watchdog.past()) == 1


@pytest.mark.sqlite
def test_an_answer_that_has_begun_may_pause(hanging: dict[int, watchdog.Request], plain: Flask) -> None:
    """A stream of events says nothing for a while. Before its first part it may hang, and so may what ends it."""
    seen: list[int] = []

    def late() -> None:
        for request in hanging.values():
            request.moved -= 100
        seen.append(len(watchdog.past()))

    def events() -> Iterator[str]:
        late()
        yield "first"
        late()
        yield "second"

    def view() -> Response:
        response = Response(events())
        response.call_on_close(late)
        return response

    plain.add_url_rule("/events", view_func=view)
    Client(Watched(plain)).get("/events", buffered=True).close()
    assert seen == [1, 0, 1]


@pytest.mark.sqlite
def test_nothing_is_left_in_flight(hanging: dict[int, watchdog.Request], plain: Flask, tmp_path: Path) -> None:
    """Neither by an answer, nor by an error, nor by a stream that ends early, nor by a file."""
    (tmp_path / "file.txt").write_text("text")

    @plain.get("/error")
    def error() -> str:
        raise RuntimeError

    @plain.get("/stream")
    def stream() -> Any:
        return plain.response_class(iter(["a", "b", "c"]))

    @plain.get("/file")
    def file() -> Any:
        assert len(hanging) == 1
        return send_file(tmp_path / "file.txt")

    def never_closes(environ: Any, start_response: Any) -> list[bytes]:
        return [b"".join(plain(environ, start_response))]

    client = Client(Watched(plain))
    for path in ("/livez", "/nothing", "/file"):
        client.get(path).close()
    with pytest.raises(RuntimeError):
        client.get("/error")
    assert hanging == {}
    with client.get("/stream", buffered=False) as answer:
        assert next(iter(answer.response))
    assert hanging == {}
    Client(Watched(never_closes)).get("/stream").close()
    assert hanging == {}


@pytest.mark.sqlite
def test_a_view_without_a_limit(hanging: dict[int, watchdog.Request]) -> None:
    """The decorator leaves the view as it is."""

    @flask_pooling.unlimited
    def view() -> str:
        return "late"

    assert view() == "late"
    hanging[1] = watchdog.Request({"werkzeug.request": type("R", (), {"endpoint": "view"})()}, {"view": view})
    hanging[1].moved -= 100
    hanging[2] = request_since(100)
    assert [thread for thread, _ in watchdog.past()] == [2]


@pytest.mark.sqlite
def test_a_request_is_in_flight_until_its_answer_is_closed(plain: Flask) -> None:
    """The app's code after the last part may hang, too."""
    seen = []

    def view() -> Response:
        response = Response("sent")
        response.call_on_close(lambda: seen.append(threading.get_ident() in watchdog.in_flight))
        return response

    plain.add_url_rule("/closing", view_func=view)
    Client(Watched(plain)).get("/closing").close()
    assert seen == [True]
    assert threading.get_ident() not in watchdog.in_flight


@pytest.mark.sqlite
def test_what_is_around_the_app_is_seen_too(hanging: dict[int, watchdog.Request], plain: Flask) -> None:
    """A middleware, an app that is mounted beside ours, and a view that asks the app itself for something."""
    seen: list[tuple[str | None, bool]] = []

    def look(environ: Any, start_response: Any) -> list[bytes]:
        (request,) = hanging.values()
        seen.append((request.environ.get("PATH_INFO"), request.unlimited))
        start_response("200 OK", [])
        return []

    @plain.get("/asks")
    @flask_pooling.unlimited
    def asks() -> str:
        plain.test_client().get("/livez").close()
        look({}, lambda *_: None)
        return ""

    def middleware(environ: Any, start_response: Any) -> Any:
        look({}, lambda *_: None)
        return plain(dict(environ), start_response)

    client = Client(Watched(DispatcherMiddleware(middleware, {"/other": look})))
    client.get("/other/x").close()
    client.get("/asks").close()
    assert seen == [("/x", False), ("/asks", False), ("/asks", True)]
    assert hanging == {}


@pytest.mark.sqlite
@pytest.mark.parametrize("way", ["read", "pieces", "lines", "readlines", "none"])
@pytest.mark.parametrize("length", [{"CONTENT_LENGTH": "8890"}, {"HTTP_TRANSFER_ENCODING": "chunked"}])
def test_a_body_that_still_comes_or_goes_makes_progress(
    hanging: dict[int, watchdog.Request], way: str, length: dict[str, str]
) -> None:
    """However slowly. What arrives is what was sent, whichever way it is read."""
    sent = b"".join(b"line %d\n" % number for number in range(1000))
    moved: list[float] = []

    class Slow(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            moved.extend(request.moved for request in hanging.values())
            return super().read(size)

    def app(environ: Any, start_response: Any) -> list[bytes]:
        stream = environ["wsgi.input"]
        got = {
            "read": stream.read,
            "pieces": lambda: b"".join(iter(lambda: stream.read(7000), b"")),
            "lines": lambda: b"".join(stream),
            "readlines": lambda: b"".join(stream.readlines()),
            "none": lambda: stream.read(None),
        }[way]()
        assert got == sent
        start_response("200 OK", [])
        return [got * 20, b"", b"end"]

    start: Any = lambda *_: None  # noqa: E731
    parts = list(Watched(app)({"wsgi.input": Slow(sent), "REQUEST_METHOD": "POST", **length}, start))
    assert b"".join(parts) == sent * 20 + b"end"
    assert max(map(len, parts)) < len(sent) * 20
    assert way in {"lines", "readlines"} or len(set(moved)) > 5


@pytest.mark.sqlite
def test_unlimited_is_for_views() -> None:
    """On a class it would say nothing of its views."""
    with pytest.raises(TypeError, match=r"unlimited\(MethodView.as_view"):
        watchdog.unlimited(MethodView)
