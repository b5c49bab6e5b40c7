"""gunicorn_worker.py: requests arrive whole, whatever pieces they come in, and slow clients hold no thread."""

import contextlib
import json
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from gunicorn.config import Config
from gunicorn.workers.gthread import ThreadWorker
from serving import ROOT, call, serving, wait_until

from app.config import MAX_BODY_BYTES
from gunicorn_worker import HEARTBEAT_SECONDS, CollectingWorker, Connection

pytestmark = pytest.mark.sqlite  # which database is behind it does not matter: once is enough

# Of the servers in these tests.
REQUEST_SECONDS = 0.7
STOP_SECONDS = 0.4

NOTE = json.dumps({"title": "in pieces"}).encode()
POST = b"POST /api/notes HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
WITH_LENGTH = POST + b"Content-Length: %d\r\n\r\n" % len(NOTE) + NOTE
CHUNKED = (
    POST
    + b"Transfer-Encoding: chunked\r\n\r\n"
    + b"".join(b"%x;x=y\r\n%s\r\n" % (len(part), part) for part in (NOTE[:5], NOTE[5:]))
    + b"0\r\nX-Trailer: z\r\n\r\n"
)


@pytest.mark.parametrize(
    ("request_", "whole"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", True),
        (WITH_LENGTH, True),
        (CHUNKED, True),
        (POST + b"transfer-encoding:chunked\r\n\r\n0\r\n\r\n", True),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n000 ;x\r\n\r\n", True),
        (POST + b"Content-Length: %d\r\n\r\n" % (MAX_BODY_BYTES + 1), False),  # refused without the body
        (POST + b"Transfer-Encoding: chunked\r\n\r\n7\r\n\r\n0\r\n\r\n\r\n0\r\n\r\n", True),  # a chunk like an end
        (POST + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n" % (MAX_BODY_BYTES + 1), False),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n-5\r\n", True),
        (POST + b"Content-Length: -1\r\n\r\n", False),  # malformed: for gunicorn to refuse
        (POST + b"Content-Length: %s\r\n\r\n" % (b"9" * 5000), False),
    ],
)
def test_a_request_is_ready_with_its_last_byte_and_not_before(request_: bytes, whole: bool) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        connection = Connection(Config(), ours, "", "")
        for at in range(len(request_) - 1):
            connection.arrived += request_[at : at + 1]
            assert not connection.is_ready(), request_[: at + 1]
        connection.arrived += request_[-1:]
        assert connection.is_ready()
        assert connection.whole or not whole


@contextlib.contextmanager
def one_worker(environ_for: Any, folder: Path, **limits: float) -> Iterator[tuple[int, "subprocess.Popen[bytes]"]]:
    """The project's configuration, with two threads and with limits that a test can wait for."""
    config, log = folder / "quick.conf.py", folder / "log"
    config.write_text(
        "import gunicorn_worker\n"
        f"vars(gunicorn_worker).update({limits})\n"
        f"__file__ = {str(ROOT / 'gunicorn.conf.py')!r}\n"
        "exec(compile(open(__file__).read(), __file__, 'exec'))\n"
    )
    environ = environ_for(WEB_CONCURRENCY="1", WEB_THREADS="2", APP_INSTANCES="1")
    with serving(environ, log, "-c", str(config)) as (port, server):
        yield port, server
    assert server.returncode == 0
    assert "Traceback" not in log.read_text(), log.read_text()


@pytest.fixture(scope="module")
def port(environ_for: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    limits = {"REQUEST_SECONDS": REQUEST_SECONDS, "MAX_WAITING": 30, "MAX_WAITING_BYTES": 300_000}
    with one_worker(environ_for, tmp_path_factory.mktemp("worker"), **limits) as (port, _):
        yield port


@contextlib.contextmanager
def clients(port: int, count: int = 1) -> Iterator[list[socket.socket]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(socket.create_connection(("127.0.0.1", port), 5)) for _ in range(count)]


def answer(client: socket.socket) -> bytes:
    """All that the server says until it closes."""
    said = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := client.recv(65536):
            said += piece
    return said


pieces: dict[str, Callable[[bytes], list[bytes]]] = {
    "byte by byte": lambda request: [request[at : at + 1] for at in range(len(request))],
    "head and body apart": lambda request: list(request.partition(b"\r\n\r\n")),
}


@pytest.mark.parametrize("request_", [WITH_LENGTH, CHUNKED], ids=["length", "chunked"])
@pytest.mark.parametrize("cut", pieces.values(), ids=pieces)
def test_a_request_in_pieces_is_served(port: int, request_: bytes, cut: Callable[[bytes], list[bytes]]) -> None:
    with clients(port) as [client]:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for piece in cut(request_):
            client.sendall(piece)
            time.sleep(0.0005)
        said = answer(client)
    assert said.startswith(b"HTTP/1.1 201"), said
    assert b'"in pieces"' in said


def test_a_client_that_asks_first_is_told_to_go_on(port: int) -> None:
    with clients(port) as [client]:
        head, _, body = WITH_LENGTH.partition(b"\r\n\r\n")
        client.sendall(head + b"\r\nExpect: 100-continue\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 100 ")
        client.sendall(body)
        assert b"HTTP/1.1 201" in answer(client)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (POST + b"Content-Length: %d\r\n\r\nx" % (MAX_BODY_BYTES + 1), 413),
        (POST + b"Content-Length: ten\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\nX-Long: " + b"z" * 70_000, 431),
        (POST + b"Content-Length: 1000000\r\n\r\n" + b" " * 400_000, 503),
    ],
)
def test_what_cannot_be_served_gets_its_answer(port: int, sent: bytes, status: int) -> None:
    """Also when not all of it was read: closing at once would take the answer away."""
    with clients(port) as [client]:
        client.sendall(sent)
        assert answer(client).startswith(b"HTTP/1.1 %d " % status)


def test_what_does_not_arrive_in_time_gets_its_answer(port: int) -> None:
    """Whether it is the head or the body that does not end."""
    with clients(port, 2) as slow:
        for client, sent in zip(slow, (b"GET /livez HTTP/1.1\r\nX-Never: ends", WITH_LENGTH[:-1]), strict=True):
            client.sendall(sent)
        time.sleep(REQUEST_SECONDS)
        assert call(port, "GET", "/livez")[0] == 200  # an event, at which the worker looks at the time
        for client in slow:
            assert answer(client).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize("sent", [b"", b"GET /livez", POST + b"Content-Length: 100\r\n\r\n{"])
def test_a_client_that_hangs_up_is_forgotten(port: int, sent: bytes) -> None:
    with clients(port) as [client]:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        assert not answer(client).startswith(b"HTTP/1.1 5")


@pytest.mark.parametrize(
    "sent", [b"GET /livez HTTP/1.1\r\nX-Drip: ", WITH_LENGTH[:-1], b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"]
)
def test_slow_clients_hold_no_thread(port: int, sent: bytes) -> None:
    """Ten times as many as threads: with a head that does not end, a body that does not, and a connection that is not
    closed. Others are served as if they were not there."""
    with clients(port, 20) as slow:
        for client in slow:
            client.sendall(sent)
        time.sleep(0.05)
        began = time.monotonic()
        for _ in range(10):
            assert call(port, "GET", "/livez")[0] == 200
        assert time.monotonic() - began < 1


def test_more_than_can_be_kept_drop_the_oldest(port: int) -> None:
    with clients(port, 40) as slow:
        for client in slow:
            client.sendall(b"GET /livez HTTP/1.1\r\nX-Drip: ")
            time.sleep(0.005)
        slow[0].settimeout(1)
        assert slow[0].recv(100).startswith(b"HTTP/1.1 408 ")
        slow[-1].sendall(b"\r\n\r\n")
        assert answer(slow[-1]).startswith(b"HTTP/1.1 200 ")


def test_slow_clients_do_not_keep_a_worker_from_stopping(environ_for: Any, tmp_path: Path) -> None:
    """What has begun to arrive may still do so for a moment."""
    with (
        one_worker(environ_for, tmp_path, STOP_SECONDS=STOP_SECONDS) as (port, server),
        clients(port, 3) as slow,
    ):
        for client in slow:
            client.sendall(WITH_LENGTH[:-1])
        assert call(port, "GET", "/livez")[0] == 200  # they came before it, and so they have been taken in
        server.send_signal(signal.SIGTERM)
        wait_until(lambda: "Handling signal: term" in (tmp_path / "log").read_text())
        slow[0].sendall(WITH_LENGTH[-1:])
        assert answer(slow[0]).startswith(b"HTTP/1.1 201 ")
        time.sleep(STOP_SECONDS)
        slow[2].close()  # an event, at which the worker looks at the time; else it does once a second
        assert answer(slow[1]).startswith(b"HTTP/1.1 408 ")


def test_a_busy_worker_beats_no_more_often_than_it_has_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each beat is a system call on the loop, and gthread makes one or two for each request."""
    worker = object.__new__(CollectingWorker)
    worker.notify_at = 0.0
    beats: list[float] = []
    monkeypatch.setattr(ThreadWorker, "notify", lambda _: beats.append(time.monotonic()))
    end = time.monotonic() + 3.5 * HEARTBEAT_SECONDS
    while time.monotonic() < end:
        worker.notify()
    assert len(beats) == 4
