"""gunicorn.conf.py and its hooks: the names are gunicorn's, the numbers are the plan's, and nothing breaks the sum."""

import contextlib
import signal
import socket
import subprocess
import sys
import types
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from gunicorn.config import KNOWN_SETTINGS
from gunicorn.http import get_parser
from gunicorn.workers.gthread import ThreadWorker
from gunicorn.workers.sync import SyncWorker

from flask_pooling.settings import Settings
from tests.library.conftest import load, start
from tests.serving import ROOT, SECONDS, TOOLS, call, command, environment, free_port, serving, wait_until

CONFIG = ROOT / "gunicorn.conf.py"
once = pytest.mark.sqlite  # no database in it


@once
@pytest.mark.usefixtures("production")
def test_every_name_is_a_setting_of_gunicorns(monkeypatch: pytest.MonkeyPatch) -> None:
    """gunicorn ignores names that it does not know, so a misspelt one would have no effect."""
    load(monkeypatch)
    module = vars(sys.modules["__config__"])
    names = {
        name
        for name, value in module.items()
        if not name.startswith("_") and getattr(value, "__module__", "gunicorn") != "app.logs"
        if not isinstance(value, types.ModuleType | type | types.FunctionType)
    }
    assert "worker_connections" in names
    assert names <= {setting.name for setting in KNOWN_SETTINGS}


@once
@pytest.mark.usefixtures("production")
@pytest.mark.parametrize("more", [{}, {"WEB_WORKER_CLASS": "sync"}, {"WEB_CONCURRENCY": "2", "WEB_THREADS": "7"}])
def test_gunicorn_runs_what_was_planned(monkeypatch: pytest.MonkeyPatch, more: dict[str, str]) -> None:
    """The same plan that sized the pools, on gunicorn's own workers."""
    cfg = load(monkeypatch, **more).cfg
    plan = Settings.load().plan
    assert (cfg.workers, cfg.threads, cfg.worker_connections) == (plan.workers, plan.threads, plan.threads)
    assert cfg.worker_class is {"sync": SyncWorker, "gthread": ThreadWorker}[plan.worker_class]
    assert (cfg.keepalive, cfg.preload_app, cfg.reload, cfg.control_socket_disable) == (0, True, False, True)
    assert cfg.max_requests_jitter >= cfg.max_requests / 2
    assert load(monkeypatch, "--worker-connections", "9", **more).cfg.worker_connections == 9  # not one of the five


@once
@pytest.mark.usefixtures("production")
def test_gunicorn_believes_no_proxy_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one on this machine either, as it would by default: WEB_TRUSTED_PROXIES alone says whom to trust."""
    cfg = load(monkeypatch).cfg
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-Proto: https\r\n\r\n")
        request = next(get_parser(cfg, ours, ("127.0.0.1", 1)))
    assert request.scheme == "http"


@once
@pytest.mark.usefixtures("production")
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--workers", "2000"], "WEB_CONCURRENCY"),
        (["--worker-class", "gevent"], "WEB_WORKER_CLASS"),
        (["--threads", "40"], "WEB_THREADS"),
        (["--timeout", "10"], "WEB_TIMEOUT"),
        (["--graceful-timeout", "1"], "WEB_GRACEFUL_TIMEOUT"),
        ([], "WEB_CONCURRENCY"),
    ],
)
def test_overrides_of_the_plan_are_refused(monkeypatch: pytest.MonkeyPatch, words: list[str], says: str) -> None:
    """They would change one side of the sum; the message names the variable that changes both sides."""
    if not words:
        monkeypatch.setenv("GUNICORN_CMD_ARGS", "--workers 7")
    with pytest.raises(SystemExit, match=f"leave it out; {says} changes it on both sides of the sum"):
        start(monkeypatch, *words)


@once
def test_bad_settings_stop_gunicorn_with_all_of_them(environ: dict[str, str]) -> None:
    """One message, and no traceback."""
    done = command("gunicorn", APP_ENV="production", DB_POOL_SIZE="twenty", DATABASE_URL="sqlite:///x.db")
    assert done.returncode == 1
    assert "DB_POOL_SIZE='twenty'" in done.stderr
    assert "SECRET_KEY is not set" in done.stderr
    assert "production needs Postgres" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.postgres
def test_a_start_that_is_refused_leaves_nothing(environ: dict[str, str], made: Callable[[], list[Path]]) -> None:
    """A folder was made for its metrics, and is gone."""
    assert command("gunicorn", "--workers", "7", PORT=free_port()).returncode == 1
    (folder,) = made()
    assert not folder.exists()


@pytest.mark.postgres
@pytest.mark.parametrize("variable", ["PORT", "WEB_PROBE_PORT"])
def test_a_port_in_use_is_said(environ: dict[str, str], variable: str) -> None:
    """Of the service's own gunicorn says it, before the port of the probes is looked at."""
    port = free_port()
    in_gunicorns_words = f"Can't connect to ('127.0.0.1', {port})"
    in_ours = f"WEB_PROBE_PORT={port}: Address already in use"
    with socket.create_server(("127.0.0.1", port)):
        done = command("gunicorn", **{"PORT": free_port(), variable: port})
    assert done.returncode == 1
    assert {"PORT": in_gunicorns_words, "WEB_PROBE_PORT": in_ours}[variable] in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.postgres
def test_any_name_of_the_app_will_do(environ: dict[str, str], tmp_path: Path) -> None:
    """`gunicorn wsgi:app` is as good as naming none: the app finds out that it is in a worker."""
    with serving(tmp_path / "log", "wsgi:app") as server:
        assert call(server.port, "GET", "/readyz")[0] == 200
    assert "plan: " in server.log.read_text()


@pytest.mark.postgres
def test_a_server_without_the_plan_serves_nobody(environ: dict[str, str], tmp_path: Path) -> None:
    """`cd / && gunicorn --chdir PROJECT wsgi:app -w 8` does not read gunicorn.conf.py. It is said how to start it."""
    port, log = free_port(), tmp_path / "log"
    words = [str(TOOLS / "gunicorn"), "--chdir", str(ROOT), "-w", "2", "-b", f"127.0.0.1:{port}", "wsgi:app"]
    with log.open("wb") as output:
        server = subprocess.Popen(words, env=environment(), cwd=tmp_path, stdout=output, stderr=output)
    try:
        wait_until(lambda: b"Booting worker" in log.read_bytes())
        for path in ("/", "/readyz", "/livez"):
            status, body = call(port, "GET", path)
            assert status == 503
            assert "start `gunicorn` in the folder of gunicorn.conf.py" in body["detail"]
    finally:
        server.terminate()
        server.wait(20)
    assert "was not started with gunicorn.conf.py" in log.read_text()


NOTE_FOLDERS = """
import os
import tempfile

make = tempfile.mkdtemp


def mkdtemp(*args, **kwargs):
    folder = make(*args, **kwargs)
    with open(os.environ["FOLDERS"], "a") as folders:
        folders.write(f"{folder}\\n")
    return folder


tempfile.mkdtemp = mkdtemp
"""


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Path]]:
    """Return the folders that commands of this test have made for metrics. Other services have folders beside them."""
    (tmp_path / "sitecustomize.py").write_text(NOTE_FOLDERS)
    (tmp_path / "folders").touch()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("FOLDERS", str(tmp_path / "folders"))
    return lambda: [Path(line) for line in (tmp_path / "folders").read_text().splitlines() if "/metrics-" in line]


def says(log: Path, text: str) -> bool:
    return text in log.read_text()


@pytest.mark.postgres
@pytest.mark.direct
def test_signals_cannot_break_the_plan(environ: dict[str, str], tmp_path: Path, made: Callable[[], list[Path]]) -> None:
    """HUP, USR2 and TTIN would start workers beside the ones there are: one line each, in the log's own form, and
    nothing else. TERM ends all, and leaves nothing behind."""
    with serving(tmp_path / "log") as server:
        (folder,) = made()
        assert folder.exists()
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
        planned = Settings.load().plan.workers
        wait_until(lambda: len(children.read_text().split()) == planned)
        workers = children.read_text()
        for number, name in ((signal.SIGHUP, "HUP"), (signal.SIGUSR2, "USR2"), (signal.SIGTTIN, "TTIN")):
            server.process.send_signal(number)
            wait_until(partial(says, server.log, f"{name} is ignored"))
        assert call(server.port, "GET", "/livez")[0] == 200
        assert children.read_text() == workers
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0
    text = server.log.read_text()
    assert text.count("which the plan does not count. Restart the service instead.") == 3
    assert all(line.startswith("{") for line in text.splitlines())
    assert not folder.exists()


@pytest.mark.postgres
@pytest.mark.direct
def test_who_waits_at_the_end_is_served(environ: dict[str, str], tmp_path: Path) -> None:
    """Two clients hold both threads with half a request, four more wait in the kernel's queue. When it is told to stop,
    it takes no further connection, and answers all six. It waits longer here, since this machine may be slow."""
    request = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
    patient = tmp_path / "patient.py"
    patient.write_text("from flask_pooling import gunicorn\ngunicorn.DRAIN_SECONDS = 60\n" + CONFIG.read_text())
    words = ("-c", patient, "--chdir", ROOT)
    with serving(tmp_path / "log", *words, WEB_CONCURRENCY=1, WEB_THREADS=2) as server, contextlib.ExitStack() as stack:
        address = ("127.0.0.1", server.port)
        clients = [stack.enter_context(socket.create_connection(address, SECONDS)) for _ in range(6)]
        for number, client in enumerate(clients):
            client.sendall(request[: -1 if number < 2 else None])
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not connects(address))
        for number, client in enumerate(clients):
            client.sendall(request[-1:] if number < 2 else b"")
            assert client.recv(15) == b"HTTP/1.1 200 OK"
            client.close()
        assert server.process.wait(SECONDS) == 0


def connects(address: tuple[str, int]) -> bool:
    """Return whether a connection that is made ends at once."""
    with contextlib.suppress(OSError), socket.create_connection(address, 0.2):
        return True
    return False


@pytest.mark.postgres
@pytest.mark.direct
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT])
def test_a_request_that_runs_is_finished(environ: dict[str, str], tmp_path: Path, number: signal.Signals) -> None:
    """Whichever signal ends the service. The worker has read the head of the request, and waits for its body."""
    head = b"POST /api/notes HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with serving(tmp_path / "log", WEB_CONCURRENCY=1, WEB_THREADS=2) as server:
        address = ("127.0.0.1", server.port)
        with socket.create_connection(address, SECONDS) as client:
            client.sendall(head + b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\n")
            assert client.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
            server.process.send_signal(number)
            wait_until(lambda: not connects(address))
            client.sendall(b"{}")
            assert client.recv(12) == b"HTTP/1.1 422"
        assert server.process.wait(SECONDS) == 0
    assert "Traceback" not in server.log.read_text()


@pytest.mark.postgres
@pytest.mark.direct
@pytest.mark.parametrize(
    ("more", "warned"),
    [
        ({"WEB_HOST": "0.0.0.0"}, True),
        ({"WEB_HOST": "0.0.0.0", "WEB_TRUSTED_PROXIES": "1"}, False),
        ({"WEB_HOST": "localhost"}, False),
    ],
)
def test_who_listens_without_a_proxy_is_warned(
    environ: dict[str, str], tmp_path: Path, more: dict[str, str], warned: bool
) -> None:
    """A client without a proxy in between may hold a thread, so that is said. gunicorn's own option keeps this test on
    the loopback address."""
    port = free_port()
    with serving(tmp_path / "log", "--bind", f"127.0.0.1:{port}", PORT=port, WEB_PROBE_PORT="0", **more) as server:
        pass
    assert ("put a buffering proxy in front" in server.log.read_text()) is warned
