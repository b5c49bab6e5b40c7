"""Slow clients: `python slow_clients.py PORT head|body|open|read COUNT`. A client that is thrown out comes back.

`head` drips the head of a request, a byte a second; `body` sends the head at once and drips the body; `open` sends a
whole request and never closes its side of the connection; `read` asks for 4 MiB and takes a byte a second.
"""

import contextlib
import selectors
import socket
import sys
import time

HEAD = b"GET /api/notes HTTP/1.1\r\nHost: x\r\nX-Slow: " + b"z" * 4000
POST = b"POST /api/notes HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9999\r\n\r\n"
WHOLE = b"GET /chaos/slow?s=0 HTTP/1.1\r\nHost: x\r\n\r\n"
LARGE = b"GET /chaos/large HTTP/1.1\r\nHost: x\r\n\r\n"
REQUESTS = {"head": (HEAD, 1), "body": (POST + b" " * 9000, len(POST)), "open": (WHOLE, len(WHOLE)),
            "read": (LARGE, len(LARGE))}  # fmt: skip


def main(port: int, kind: str, count: int) -> None:
    request, first = REQUESTS[kind]
    sent: dict[socket.socket, int] = {}
    closed_at: dict[socket.socket, float] = {}
    selector = selectors.DefaultSelector()

    def drop(client: socket.socket) -> None:
        if kind != "read":
            selector.unregister(client)
        client.close()
        del sent[client]

    def take(client: socket.socket) -> None:
        with contextlib.suppress(BlockingIOError):
            try:
                gone = client.recv(1) == b""
            except ConnectionError:
                gone = True
            if gone:
                drop(client)

    while True:
        turn_ends = time.monotonic() + 1
        while len(sent) < count:
            client = socket.socket()
            client.setblocking(False)
            if kind == "read":
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            with contextlib.suppress(BlockingIOError):
                client.connect(("127.0.0.1", port))
            sent[client] = 0
            if kind != "read":
                selector.register(client, selectors.EVENT_READ)
        time.sleep(0.05)
        for client, done in list(sent.items()):
            if done == len(request):
                if kind == "read":
                    take(client)
                continue
            upto = min(max(first, done + 1), len(request))
            try:
                client.send(request[done:upto])
                sent[client] = upto
            except OSError:
                drop(client)
        while (left := turn_ends - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                client = key.fileobj
                try:
                    answered = client.recv(65536)
                except OSError:
                    answered = b""
                if answered:
                    continue
                if kind != "open":
                    drop(client)
                else:  # the server has closed; this side stays open for a while
                    closed_at[client] = time.monotonic()
                    selector.unregister(client)
        for client, when in list(closed_at.items()):
            if time.monotonic() - when > 5:
                del closed_at[client], sent[client]
                client.close()


main(int(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
