"""gunicorn's threaded worker, which gives a request to a thread once all of it has arrived.

gthread waits in a thread for what a client has yet to send, and on its only loop for clients to close: a few that are
slow hold all threads of all workers. Here the loop reads, without ever blocking, and a thread finds the request whole.
Everything else is gthread's: parsing and its limits, TLS and HTTP/2 (which are not collected), threads, signals.
"""

import contextlib
import re
import selectors
import socket
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from gunicorn import http
from gunicorn.http2 import negotiation
from gunicorn.workers.gthread import TConn, ThreadWorker

from app.config import MAX_BODY_BYTES

MAX_HEAD_BYTES = 65_536
REQUEST_SECONDS = 60.0  # for all of a request to arrive
STOP_SECONDS = 2.0  # the same, once the worker has been told to stop
LINGER_SECONDS = 2.0  # for a client to read an answer that came before it had sent everything (RFC 9112, 9.6)
HEARTBEAT_SECONDS = 0.1  # a fraction of gunicorn's shortest timeout, which is 1 s
# What one worker keeps of requests that have not arrived. One more, and the oldest is dropped; more bytes, and whoever
# sent them is turned away. As many again may linger, and both fit under the usual limit of 1024 open files, beyond
# which gunicorn's accept would end the worker.
MAX_WAITING = 400
MAX_WAITING_BYTES = 32 * 1024 * 1024

_READ_BYTES = 65_536
_END_OF_HEAD = b"\r\n\r\n"
_FRAMING = re.compile(rb"\r\n(content-length|transfer-encoding|expect)[ \t]*:[ \t]*([^\r\n]*)", re.IGNORECASE)
_HEXADECIMAL = re.compile(rb"[ \t]*[0-9a-fA-F]{1,16}[ \t]*")
_MAX_DIGITS = 20


class Connection(TConn):
    """One client, and what has arrived of its request."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.arrived = bytearray()
        self.head = 0  # its length, once its end has arrived
        self.body: int | None = 0  # its length; None: chunked, the end is told by what arrives
        self.chunk = 0  # where the next one begins, if chunked
        self.whole = False  # the request has arrived, and nothing behind it
        self.deadline = time.monotonic() + REQUEST_SECONDS

    def read(self) -> bytes | None:
        """What has arrived: b"" at the end, None if there is nothing yet."""
        try:
            return bytes(self.sock.recv(_READ_BYTES))
        except BlockingIOError:
            return None
        except OSError:
            return b""

    def send(self, message: bytes) -> None:
        """If the client does not take it, it goes without."""
        with contextlib.suppress(OSError):
            self.sock.send(message)

    def taken(self) -> bytes:
        arrived, self.arrived = bytes(self.arrived), bytearray()
        return arrived

    def is_ready(self) -> bool:
        """Whether a thread can take it: it is whole, or the answer does not depend on the rest. What is malformed is
        for gunicorn to refuse."""
        if not self.head and not self._find_head():
            return False
        end = self._end_of_chunks() if self.body is None else self.head + self.body
        self.whole = end == len(self.arrived)
        return end is not None and (end <= len(self.arrived) or end - self.head > MAX_BODY_BYTES)

    def _find_head(self) -> bool:
        end = self.arrived.find(_END_OF_HEAD)
        if end < 0:
            return False
        self.head = self.chunk = end + len(_END_OF_HEAD)
        expects = False
        for name, value in _FRAMING.findall(self.arrived, 0, self.head):
            if name.lower() == b"content-length" and self.body is not None:
                self.body = int(value) if value.isdigit() and len(value) < _MAX_DIGITS else 0
            elif name.lower() == b"transfer-encoding":
                self.body = None
            elif value.lower() == b"100-continue":
                expects = True
        if expects and (self.body is None or len(self.arrived) - self.head < self.body <= MAX_BODY_BYTES):
            self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        return True

    def _end_of_chunks(self) -> int | None:
        """Where a chunked body ends, as soon as that is known."""
        while (line := self.arrived.find(b"\r\n", self.chunk)) >= 0:
            size = self.arrived[self.chunk : line].partition(b";")[0]
            if not _HEXADECIMAL.fullmatch(size):
                return len(self.arrived)
            if int(size, 16) == 0:
                end = self.arrived.find(_END_OF_HEAD, line)  # behind the trailers, if any
                return end + len(_END_OF_HEAD) if end >= 0 else None
            self.chunk = line + int(size, 16) + 2 * len(b"\r\n")
        too_much = self.head + MAX_BODY_BYTES + 1
        return too_much if max(self.chunk, len(self.arrived)) >= too_much else None


class CollectingWorker(ThreadWorker):
    """`nr_conns` counts all connections, as in gthread, which accepts up to `worker_connections` of them. Those that
    wait here take no thread, so each raises that by one."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Each in the order of their deadlines, since all of a kind wait for the same time.
        self.collecting: dict[Connection, None] = {}
        self.lingering: dict[Connection, None] = {}
        self.bytes_waiting = 0
        self.stopped_at: float | None = None
        self.notify_at = 0.0

    def init_process(self) -> None:
        if hasattr(socket, "TCP_DEFER_ACCEPT"):  # Linux
            for listener in self.sockets:
                if listener.family in {socket.AF_INET, socket.AF_INET6}:
                    # The kernel keeps a connection until its first bytes are there. Taken before, it would not be
                    # known to need a thread, and this worker would take more than it has threads for.
                    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)
        # gunicorn looks a setting up by its name, through two calls, thirty times a request. None changes any more.
        vars(self.cfg).update((name, setting.get()) for name, setting in self.cfg.settings.items())
        self.addresses = {listener: listener.getsockname() for listener in self.sockets}
        super().init_process()

    def notify(self) -> None:
        """The heartbeat. gthread beats at each turn of its loop, which is more than once a request."""
        if time.monotonic() >= self.notify_at:
            self.notify_at = time.monotonic() + HEARTBEAT_SECONDS
            super().notify()

    def accept(self, listener: Any) -> None:
        try:
            client, address = listener.accept()
        except (BlockingIOError, ConnectionAbortedError):  # another worker was faster; the client has gone
            return
        self.nr_conns += 1
        connection = Connection(self.cfg, client, address, self.addresses[listener])
        if self.cfg.is_ssl or negotiation.prior_knowledge_allowed(self.cfg, address):
            self.enqueue_req(connection)
        else:
            self._collect(connection)

    def finish_request(self, conn: Any, fs: Future[Any]) -> None:
        """In gthread this ends by blocking the loop until the client closes, or for two seconds."""
        if self.cfg.is_ssl or fs.cancelled() or fs.exception() or fs.result():
            super().finish_request(conn, fs)
        elif conn.whole:
            self._drop(conn)
        else:
            self._linger(conn)

    def murder_pending(self) -> None:
        """Called at least once a second. The worker stops when no connection is left."""
        super().murder_pending()
        now = time.monotonic()
        if not self.alive and self.stopped_at is None:
            self.stopped_at = now
        stop = float("inf") if self.stopped_at is None else self.stopped_at + STOP_SECONDS
        while self.collecting and min((first := next(iter(self.collecting))).deadline, stop) <= now:
            self._turn_away(first, "408 Request Timeout")
        while self.lingering and (first := next(iter(self.lingering))).deadline <= now:
            self._drop(first)

    def _collect(self, connection: Connection) -> None:
        """Take in what has arrived, and go on once it is enough."""
        piece = connection.read()
        if piece:
            connection.arrived += piece
            self.bytes_waiting += len(piece)
        if connection.is_ready() or (piece == b"" and connection.arrived):
            self._serve(connection)
        elif piece == b"":
            self._drop(connection)
        elif not connection.head and len(connection.arrived) > MAX_HEAD_BYTES:
            self._turn_away(connection, "431 Request Header Fields Too Large")
        elif self.bytes_waiting > MAX_WAITING_BYTES:
            self._turn_away(connection, "503 Service Unavailable", "Retry-After: 1\r\n")
        elif connection not in self.collecting:
            self._wait(connection, self.collecting, self._collect)
            if len(self.collecting) > MAX_WAITING:
                self._turn_away(next(iter(self.collecting)), "408 Request Timeout")

    def _wait(self, connection: Connection, group: dict[Connection, None], then: Callable[[Connection], None]) -> None:
        def readable(_: socket.socket) -> None:
            if connection in group:  # else it was dropped after the poller had seen it
                then(connection)

        group[connection] = None
        self.worker_connections += 1
        self.poller.register(connection.sock, selectors.EVENT_READ, readable)

    def _wait_no_more(self, connection: Connection) -> None:
        self.bytes_waiting -= len(connection.arrived)
        for group in (self.collecting, self.lingering):
            if connection in group:
                del group[connection]
                self.worker_connections -= 1
                self.poller.unregister(connection.sock)

    def _serve(self, connection: Connection) -> None:
        self._wait_no_more(connection)
        connection.parser = http.get_parser(self.cfg, connection.sock, connection.client)
        connection.parser.unreader.unread(connection.taken())
        connection.data_ready = True
        self.enqueue_req(connection)

    def _turn_away(self, connection: Connection, status: str, header: str = "") -> None:
        self._wait_no_more(connection)
        if connection.taken():  # else it asked for nothing
            connection.send(f"HTTP/1.1 {status}\r\n{header}Connection: close\r\nContent-Length: 0\r\n\r\n".encode())
        self._linger(connection)

    def _linger(self, connection: Connection) -> None:
        """Close once the client has: with bytes unread, or more to come, the kernel would cut the answer off."""
        try:
            connection.sock.setblocking(False)
            connection.sock.shutdown(socket.SHUT_WR)
        except OSError:
            self._drop(connection)
            return
        connection.deadline = time.monotonic() + LINGER_SECONDS
        self._wait(connection, self.lingering, self._drain)
        if len(self.lingering) > MAX_WAITING:
            self._drop(next(iter(self.lingering)))

    def _drain(self, connection: Connection) -> None:
        if connection.read() == b"":
            self._drop(connection)

    def _drop(self, connection: Connection) -> None:
        self._wait_no_more(connection)
        self.nr_conns -= 1
        connection.close()
