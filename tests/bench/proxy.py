"""A TCP proxy in front of Postgres that counts, on the wire, what passes.

A round trip is a ReadyForQuery from the server: the end of what the client sent and then waited for. The one that ends
the start of a connection counts as that connection, not as a round trip.
"""

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

READY_FOR_QUERY = b"Z"
ENCRYPTION_REQUESTS = {80877103, 80877104}  # TLS and GSSAPI: answered with "N", no, by the proxy itself


@dataclass
class Counts:
    connections: int = 0
    round_trips: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, connections: int = 0, round_trips: int = 0) -> None:
        with self._lock:
            self.connections += connections
            self.round_trips += round_trips

    def snapshot(self) -> tuple[int, int]:
        with self._lock:
            return self.connections, self.round_trips


@contextlib.contextmanager
def counting(server_port: int) -> Iterator[tuple[int, Counts]]:
    """Listen on a free port of 127.0.0.1 for as long as the context lasts; yields the port and the counts."""
    counts = Counts()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=_accept, args=(listener, server_port, counts), daemon=True).start()
        try:
            yield listener.getsockname()[1], counts
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket, server_port: int, counts: Counts) -> None:
    while True:
        try:
            client, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_serve, args=(client, server_port, counts), daemon=True).start()


def _serve(client: socket.socket, server_port: int, counts: Counts) -> None:
    with contextlib.suppress(OSError), client, socket.create_connection(("127.0.0.1", server_port)) as server:
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        server.sendall(_startup_packet(client))
        threading.Thread(target=_pump, args=(client, server), daemon=True).start()
        _pump_and_count(server, client, counts)


def _startup_packet(client: socket.socket) -> bytes:
    while True:
        head = _exactly(client, 8)
        length, code = struct.unpack("!II", head)
        if code not in ENCRYPTION_REQUESTS:
            return head + _exactly(client, length - 8)
        client.sendall(b"N")


def _exactly(source: socket.socket, length: int) -> bytes:
    found = b""
    while len(found) < length:
        more = source.recv(length - len(found))
        if not more:
            raise OSError("closed")
        found += more
    return found


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def _pump_and_count(server: socket.socket, client: socket.socket, counts: Counts) -> None:
    """Count messages. Each is a letter, a length that counts itself, and the rest. They may be cut anywhere."""
    head, left, started = b"", 0, False
    while data := server.recv(65536):
        ready, at = 0, 0
        while at < len(data):
            if left:
                step = min(left, len(data) - at)
                left, at = left - step, at + step
                continue
            step = min(5 - len(head), len(data) - at)
            head, at = head + data[at : at + step], at + step
            if len(head) == 5:
                ready += head[:1] == READY_FOR_QUERY
                left, head = struct.unpack("!I", head[1:])[0] - 4, b""
        if ready:  # counted before it is passed on: who has the answer finds it counted
            counts.add(connections=not started, round_trips=ready - (not started))
            started = True
        client.sendall(data)
    client.shutdown(socket.SHUT_WR)
