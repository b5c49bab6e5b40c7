"""Helpers for tests of running services: commands as people type them, servers that start and stop."""

import contextlib
import http.client
import itertools
import json
import os
import random
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

STARTING_SECONDS = 300
STOPPING_SECONDS = 120
RUNNING_SECONDS = 3600
# A command finds the environment of a machine where nothing is set.
CLEAN = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("APP_", "DB_", "WEB_", "SQLALCHEMY_", "MAKE", "MFLAGS"))
    and name not in {"ARGS", "DATABASE_URL", "SECRET_KEY", "PORT", "RATE", "UV", "PYTHONDONTWRITEBYTECODE"}
}
# Runs a Postgres until its input ends, and prints where.
POSTGRES = """
import sys
from pathlib import Path
from scripts import postgres
with postgres.running(Path(sys.argv[1]), sys.argv[2], max_connections=int(sys.argv[3])) as url:
    print(url, flush=True)
    sys.stdin.read()
"""


def run(command: str, cwd: Path, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a person types it, with stdout and stderr together, as a person sees them."""
    return subprocess.run(
        ["sh", "-c", command],
        cwd=cwd,
        env=CLEAN | environ,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=RUNNING_SECONDS,
        check=False,
    )


def _pairs() -> Iterator[int]:
    """Yield every other port of this worker of pytest-xdist, from a random one on. They are below those that the kernel
    gives to clients, or a connection might take one before the server does."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 4
    ports = range(10_000 + 5_000 * worker, 15_000 + 5_000 * worker, 2)
    start = random.randrange(len(ports))  # noqa: S311  # no secret
    return itertools.cycle([*ports[start:], *ports[:start]])


PAIRS = _pairs()


def free_port() -> int:
    """Return a free port whose next one is free as well: production's probes go there."""
    while True:
        port = next(PAIRS)
        with socket.socket() as one, socket.socket() as two, contextlib.suppress(OSError):
            one.bind(("127.0.0.1", port))
            two.bind(("127.0.0.1", port + 1))
            return port


def ask(address: str, path: str, method: str = "GET", accept: str = "*/*", **note: str) -> tuple[int, Any]:
    """Return the status of an answer, and its text."""
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=120)
    with contextlib.closing(connection):
        headers = {"Accept": accept} | ({"Content-Type": "application/json"} if note else {})
        connection.request(method, path, body=json.dumps(note) if note else None, headers=headers)
        response = connection.getresponse()
        text = response.read().decode()
        return response.status, json.loads(text) if "json" in response.headers.get("Content-Type", "") else text


def use(address: str, metrics: int = 200) -> None:
    """Create a note, find it on a page, read, change and delete it. In production metrics are not here, but 404."""
    status, note = ask(address, "/api/notes", "POST", title="Bread", body="and butter")
    assert status == 201
    path = f"/api/notes/{note['id']}"
    assert note in ask(address, f"/api/notes?after={note['id'] - 1}&limit=1")[1]["items"]
    assert ask(address, path) == (200, note)
    assert ask(address, path, "PUT", title="Toast")[1]["title"] == "Toast"
    assert ask(address, path, "DELETE") == (204, "")
    assert [ask(address, probe)[0] for probe in ("/livez", "/readyz", "/metrics")] == [200, 200, metrics]


def processes(group: int | None = None, below: Path | None = None) -> dict[int, str]:
    """Find the running processes of a group, or those with a path below a folder on their command line."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (process / "cmdline").read_text(errors="replace").replace("\0", " ")
            its_group = int((process / "stat").read_text().rpartition(")")[2].split()[2])
            if command and (its_group == group or (below and f"{below}/" in command)):
                found[int(process.name)] = command
    return found


def everything(**environ: object) -> list[int]:
    """Find the running processes that have this in their environment."""
    wanted, found = {f"{name}={value}" for name, value in environ.items()}, []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted <= set((process / "environ").read_text(errors="replace").split("\0")):
                found.append(int(process.name))
    return found


def command_of(process: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/cmdline").read_text(errors="replace").replace("\0", " ")
    return ""


def metrics_of(process: int) -> set[Path]:
    """Return the folder in which a process of gunicorn keeps its workers' metrics."""
    with contextlib.suppress(OSError):
        found = re.findall(r"(/\S+/metrics-[^/\s]+)/", Path(f"/proc/{process}/maps").read_text())
        return {Path(folder) for folder in found}
    return set()


def metrics_folders(group: int) -> set[Path]:
    """Return the folders in which the gunicorn of a process group keeps its workers' metrics."""
    return {folder for process in processes(group) for folder in metrics_of(process)}


@contextlib.contextmanager
def served(
    command: str,
    cwd: Path,
    port: int,
    end: signal.Signals = signal.SIGINT,
    *,
    mistakes: bool = False,
    ready: int = 200,
    **environ: str,
) -> Iterator[str]:
    """Start what serves, wait until /readyz answers `ready`, and in the end press Ctrl-C: the address, while it serves.

    It has to end in good order and leave nothing: no process, no Postgres, no folder of metrics. With `mistakes`, it
    may log tracebacks. `make run` and `make demo` have Flask's server, all else has gunicorn.
    """
    log = cwd.parent / f"{port}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            ["sh", "-c", command],
            cwd=cwd,
            env=CLEAN | environ | {"PORT": str(port)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    address, metrics, flask = f"http://127.0.0.1:{port}", set(), command.endswith(("make run", "make demo"))
    try:
        deadline = time.monotonic() + STARTING_SECONDS
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if ask(address, "/readyz")[0] == ready:
                    break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield address
        servers = [each for each in everything(PORT=port) if "gunicorn" in command_of(each)]
        metrics = {folder for each in servers for folder in metrics_of(each)}
        assert len(metrics) == (0 if flask else 1)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, end)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOPPING_SECONDS)
        left = processes(process.pid, below=cwd / "instance") | {
            each: command_of(each) for each in everything(PORT=port)
        }
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        process.wait()
    assert left == {}, log.read_text()
    assert process.returncode in {0, -end}, log.read_text()
    assert flask or "Shutting down: Master" in log.read_text()
    assert mistakes or "Traceback" not in log.read_text(), log.read_text()
    assert [folder for folder in metrics if folder.exists()] == []


@contextlib.contextmanager
def postgres(project: Path, data: Path, database: str, max_connections: int = 100) -> Iterator[str]:
    """Run a Postgres from an installed project's wheel, with its data elsewhere; yield its URL."""
    server = subprocess.Popen(
        [project / ".venv" / "bin" / "python", "-c", POSTGRES, data, database, str(max_connections)],
        cwd=project,
        env=CLEAN,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with server:
        assert server.stdout
        yield server.stdout.readline().strip()
        server.communicate(timeout=STOPPING_SECONDS)
    assert server.returncode == 0
