"""The real server and the real commands, for the tests that need them. Both get the environment of the test."""

import contextlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TOOLS = Path(sys.executable).parent
SECONDS = 30  # for what takes one or two, unless the machine is busy


@dataclass(frozen=True)
class Server:
    port: int
    process: "subprocess.Popen[bytes]"
    log: Path


def environment(**more: object) -> dict[str, str]:
    """Add to the environment. FLASK_SKIP_DOTENV: Flask would read the developer's .env."""
    return os.environ | {"FLASK_SKIP_DOTENV": "1"} | {name: str(value) for name, value in more.items()}


def command(*words: str | Path, **more: object) -> "subprocess.CompletedProcess[str]":
    """Run a command of this Python's environment to its end. `more` is set in its environment."""
    return subprocess.run(
        [TOOLS / words[0], *words[1:]],
        env=environment(**more),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=SECONDS,
    )


@contextlib.contextmanager
def serving(log: Path, *words: str | Path, **more: object) -> Iterator[Server]:
    """Run gunicorn as in production, for as long as the context lasts."""
    port = int(str(more.setdefault("PORT", free_port())))
    with log.open("wb") as output:
        process = subprocess.Popen(
            [TOOLS / "gunicorn", *words], env=environment(**more), cwd=ROOT, stdout=output, stderr=output
        )
        try:
            wait_until(lambda: process.poll() is not None or answers(port), SECONDS)
            assert process.poll() is None, log.read_text()
            yield Server(port, process, log)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def call(port: int, method: str, path: str, body: object = None) -> tuple[int, Any]:
    """Return the status and the body, which is parsed if it is JSON."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)) as connection:
        sent = None if body is None else json.dumps(body)
        connection.request(method, path, sent, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read().decode()
        return response.status, json.loads(text) if "json" in (response.headers.get_content_subtype()) else text


def answers(port: int) -> bool:
    with contextlib.suppress(OSError):
        return call(port, "GET", "/livez")[0] == 200
    return False


def free_port() -> int:
    """Return a port with a free neighbour, for the probes. They are below those that the kernel gives to clients, or a
    connection might take one before the server does."""
    while True:
        port = random.randrange(10_000, 30_000)
        with socket.socket() as first, socket.socket() as second, contextlib.suppress(OSError):
            first.bind(("127.0.0.1", port))
            second.bind(("127.0.0.1", port + 1))
            return port


def wait_until(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    """Wait until the condition is true."""
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "it does not come true"
        time.sleep(0.01)
