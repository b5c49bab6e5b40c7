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
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
GUNICORN = Path(sys.executable).parent / "gunicorn"
START_SECONDS = 30
RUN_SECONDS = 30
OURS = {"app", "gunicorn_worker", "prometheus_client", "scripts", "wsgi"}  # prometheus_client decides when imported


def free_port() -> int:
    """A port with a free neighbour, for the probes."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port = int(first.getsockname()[1])
            with contextlib.suppress(OSError, OverflowError):
                second.bind(("127.0.0.1", port + 1))
                return port


def in_child(action: Callable[[], object], folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run something in a forked process, which has the modules that we have: to import them takes a second."""
    child = os.fork()
    if child == 0:
        code = 1
        signal.alarm(RUN_SECONDS)  # ends it
        try:
            sys.stdout, sys.stderr = ((folder / name).open("w") for name in ("stdout", "stderr"))
            os.dup2(sys.stdout.fileno(), 1)
            os.dup2(sys.stderr.fileno(), 2)
            action()
            code = 0
        except SystemExit as error:
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
            if isinstance(error.code, str):
                print(error.code, file=sys.stderr)
        except BaseException:  # noqa: BLE001  # nothing may get back into the test run
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    _, status = os.waitpid(child, 0)
    said = ((folder / name).read_text() for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess((), os.waitstatus_to_exitcode(status), *said)


def run(words: Sequence[str], environ: Mapping[str, str], folder: Path) -> "subprocess.CompletedProcess[str]":
    """Run a command of the venv at the root of the project, with an environment of its own. What the project's modules
    find there when they are imported they find anew."""

    def command() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
            del sys.modules[name]
        os.environ.clear()
        # gunicorn makes the folder if it is not told of one, and deletes it when its process ends by itself.
        os.environ.update({"PATH": os.defpath, "PROMETHEUS_MULTIPROC_DIR": str(folder), **environ})
        os.chdir(ROOT)
        match [*words]:
            case ["python", "-c", code]:
                exec(code, {})
            case ["python", "-m", *module]:
                sys.argv = module
                runpy.run_module(module[0], run_name="__main__")
            case [script, *_]:
                sys.argv = [*words]
                (program,) = entry_points(group="console_scripts", name=script)
                program.load()()

    return in_child(command, folder)


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
                time.sleep(0.02)
            yield port, server
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
