"""The real server, for the tests that need one."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
GUNICORN = Path(sys.executable).parent / "gunicorn"
START_SECONDS = 30


def free_port() -> int:
    """A port with a free neighbour, for the probes."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            with contextlib.suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 1))
                return port


def call(port: int, method: str, path: str, body: object = None) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        sent = None if body is None else json.dumps(body)
        connection.request(method, path, sent, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
        return response.status, json.loads(text) if response.headers.get_content_subtype() == "json" else text.decode()
    finally:
        connection.close()


@contextlib.contextmanager
def serving(environ: dict[str, str], log: Path, *words: str) -> Iterator[tuple[int, "subprocess.Popen[bytes]"]]:
    """gunicorn as `make prod` runs it, for as long as the context lasts."""
    port = free_port()
    bare = {"PATH": os.environ["PATH"], "PORT": str(port), **environ}
    with log.open("wb") as output:
        server = subprocess.Popen([GUNICORN, *words], env=bare, cwd=ROOT, stdout=output, stderr=output)
        try:
            give_up = time.monotonic() + START_SECONDS
            while True:
                with contextlib.suppress(OSError):
                    if call(port, "GET", "/livez")[0] == 200:
                        break
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < give_up, log.read_text()
                time.sleep(0.05)
            yield port, server
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
