"""The real server and the real commands, for the tests that need them."""

import contextlib
import http.client
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RUN_SECONDS = 30
OURS = {"app", "gunicorn_worker", "prometheus_client", "scripts", "wsgi"}


def free_port() -> int:
    """A port with a free neighbour, for the probes."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            with contextlib.suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 1))
                return port


class Child:
    """A forked process. It starts with the modules that we have: to import them takes a second."""

    def __init__(self, action: Callable[[], object], output: Path, errors: Path) -> None:
        self.returncode: int | None = None
        with warnings.catch_warnings():
            # Of threads. What tests may leave behind are some that wait for a client, and hold no lock.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            os._exit(_exit_code(action, output, errors))

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def wait(self, seconds: float = 20) -> int | None:
        try:
            wait_until(lambda: self.poll() is not None, seconds)
        finally:
            self.send_signal(signal.SIGKILL)
        return self.returncode


def _exit_code(action: Callable[[], object], output: Path, errors: Path) -> int:
    """Run it as the interpreter would. Nothing may get back from here into the test run."""
    with output.open("a") as stdout, errors.open("a") as stderr:
        sys.stdout, sys.stderr = stdout, stderr
        os.dup2(stdout.fileno(), 1)
        os.dup2(stderr.fileno(), 2)
        try:
            action()
        except SystemExit as error:
            if isinstance(error.code, str):
                print(error.code, file=stderr)
            return error.code if isinstance(error.code, int) else int(error.code is not None)
        except BaseException:  # noqa: BLE001  # all that there is
            traceback.print_exc()
            return 1
        return 0


def in_child(action: Callable[[], object], folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run something in a forked process, and wait for its end."""
    output, errors = folder / "stdout", folder / "stderr"
    output.unlink(missing_ok=True)
    errors.unlink(missing_ok=True)
    code = Child(action, output, errors).wait(RUN_SECONDS)
    return subprocess.CompletedProcess((), code or 0, output.read_text(), errors.read_text())


def run(words: Sequence[str], environ: Mapping[str, str], folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run a command of the venv, and wait for its end."""
    return in_child(lambda: become(words, {"PROMETHEUS_MULTIPROC_DIR": str(folder), **environ}), folder)


def become(words: Sequence[str], environ: Mapping[str, str]) -> None:
    """Be a command of the venv at the root of the project, with an environment of its own. The project's modules are
    imported anew, since they, and prometheus_client, look at that."""
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]
    warnings.resetwarnings()
    os.environ.clear()
    os.environ.update({"PATH": os.defpath, **environ})
    os.chdir(ROOT)
    sys.argv = [*words]
    match sys.argv:
        case ["python", "-c", code]:
            exec(code, {})
        case ["python", "-m", module, *_]:
            del sys.argv[:2]
            runpy.run_module(module, run_name="__main__")
        case [script, *_]:
            (program,) = entry_points(group="console_scripts", name=script)
            program.load()()


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


def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Ask again and again until it is true."""
    give_up = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up, "it does not come true"
        time.sleep(0.005)


@contextlib.contextmanager
def serving(environ: dict[str, str], log: Path, *words: str) -> Iterator[tuple[int, Child]]:
    """gunicorn as `make prod` runs it, for as long as the context lasts."""
    port = free_port()
    metrics = log.with_name("metrics")
    metrics.mkdir()
    bare = {"PORT": str(port), "PROMETHEUS_MULTIPROC_DIR": str(metrics), **environ}
    server = Child(lambda: become(["gunicorn", *words], bare), log, log)

    def answers() -> bool:
        assert server.poll() is None, log.read_text()
        with contextlib.suppress(OSError):
            return call(port, "GET", "/livez")[0] == 200
        return False

    try:
        wait_until(answers)
        yield port, server
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait()
