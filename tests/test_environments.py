"""Places where people run the service: sockets of every kind, supervisors, containers, and checkouts with other line
ends. Each is the real thing, around the server that a bake installs."""

import contextlib
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from baking import Run
from needs import AS_NOBODY, READ_ONLY_SHARED_MEMORY, WITH_MOUNTS
from serving import CLEAN, free_port, metrics_folders, postgres, run

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108
SECONDS = 120
# As systemd starts a service that has a socket: it is file 3, and its variables name the process.
ACTIVATED = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.execvpe(sys.argv[2], sys.argv[2:], os.environ | {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())})
"""


@pytest.fixture(scope="module")
def environ(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Production's, with a database that has been migrated."""
    with postgres(installed, tmp_path_factory.mktemp("database") / "data", "service") as url:
        environ = CLEAN | {"DATABASE_URL": url, "SECRET_KEY": secrets.token_hex(32), "WEB_CONCURRENCY": "1"}
        migrated = run(".venv/bin/flask db upgrade", installed, **environ)
        assert migrated.returncode == 0, migrated.stdout
        yield environ


def ask(address: Any, path: str = "/readyz", before: str = "") -> str:
    """Return the whole answer."""
    with socket.socket(socket.AF_UNIX if isinstance(address, Path) else socket.AF_INET) as connection:
        connection.settimeout(SECONDS)
        connection.connect(str(address) if isinstance(address, Path) else address)
        connection.sendall(f"{before}GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        with connection.makefile("rb") as answer:
            return answer.read().decode()


def is_ready(address: Any, before: str = "", path: str = "/readyz") -> bool:
    with contextlib.suppress(OSError):
        return ask(address, path, before).startswith("HTTP/1.1 200")
    return False


def wait_until(condition: Any, log: Path) -> None:
    give_up = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < give_up, log.read_text()
        time.sleep(0.05)


@contextlib.contextmanager
def serving(
    project: Path,
    log: Path,
    words: list[Any],
    environ: dict[str, str],
    address: Any,
    before: str = "",
    path: str = "/readyz",
    **more: Any,
) -> Iterator["subprocess.Popen[bytes]"]:
    """Serve while the context lasts; then it is told to stop, and leaves nothing."""
    with log.open("wb") as output:
        server = subprocess.Popen(
            words, cwd=project, env=environ, stdout=output, stderr=output, start_new_session=True, **more
        )
    try:
        wait_until(lambda: server.poll() is not None or is_ready(address, before, path), log)
        assert server.poll() is None, log.read_text()
        folders = metrics_folders(server.pid)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            server.send_signal(signal.SIGTERM)
        server.wait(SECONDS)
    assert server.returncode == 0, log.read_text()
    assert "Traceback" not in log.read_text()
    assert [folder for folder in folders if folder.exists()] == []


def test_a_unix_socket(installed: Path, environ: dict[str, str], tmp_path: Path):
    """As behind nginx on one machine."""
    address, port = tmp_path / "s", str(free_port())
    words = [".venv/bin/gunicorn", "--bind", f"unix:{address}"]
    with serving(installed, tmp_path / "log", words, environ | {"PORT": port}, address):
        assert '"items"' in ask(address, "/api/notes")


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_socket_of_systemd(installed: Path, environ: dict[str, str], tmp_path: Path, kind: str):
    """The socket waits before the service is there; the port that it has is not in use by somebody else."""
    port = free_port()
    address: Any = tmp_path / "s" if kind == "unix" else ("127.0.0.1", port)
    made = socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET)
    with contextlib.closing(made):
        made.bind(str(address) if kind == "unix" else address)
        made.listen()
        words = [sys.executable, "-c", ACTIVATED, str(made.fileno()), ".venv/bin/gunicorn"]
        more = environ | {"PORT": str(port)}
        with serving(installed, tmp_path / "log", words, more, address, pass_fds=[made.fileno()]):
            assert '"items"' in ask(address, "/api/notes")


def test_proxy_protocol(installed: Path, environ: dict[str, str], tmp_path: Path):
    """As behind a load balancer for TCP: the client that it names is the one that is logged."""
    port = free_port()
    words, before = [".venv/bin/gunicorn", "--proxy-protocol"], "PROXY TCP4 203.0.113.7 10.0.0.1 5000 80\r\n"
    with serving(installed, tmp_path / "log", words, environ | {"PORT": str(port)}, ("127.0.0.1", port), before):
        assert '"items"' in ask(("127.0.0.1", port), "/api/notes", before)
    assert "203.0.113.7" in (tmp_path / "log").read_text()


def test_a_user_without_a_name_and_a_home(installed: Path, environ: dict[str, str], tmp_path: Path):
    """As on OpenShift. The database does not take it for anybody it knows, and is said to be missing."""
    port, log = free_port(), tmp_path / "log"
    more = {name: value for name, value in environ.items() if name not in {"HOME", "USER", "LOGNAME"}}
    words = [*AS_NOBODY, ".venv/bin/gunicorn"]
    with serving(installed, log, words, more | {"PORT": str(port)}, ("127.0.0.1", port), path="/livez"):
        assert "X-Request-ID" in ask(("127.0.0.1", port), "/livez")
        numbers = ask(("127.0.0.1", port + 1), "/metrics")
        assert "http_request_seconds_count" in numbers
        # The port of the probes has no request id, and leaves no line in the log.
        assert "X-Request-ID" not in numbers
        assert '"/metrics"' not in log.read_text()


def test_shared_memory_that_cannot_be_written(installed: Path, environ: dict[str, str], tmp_path: Path):
    """As in a container whose filesystems are all read-only but /tmp."""
    port = free_port()
    words = [*WITH_MOUNTS, "sh", "-c", f"{' '.join(READ_ONLY_SHARED_MEMORY)} && exec .venv/bin/gunicorn"]
    with serving(installed, tmp_path / "log", words, environ | {"PORT": str(port)}, ("127.0.0.1", port)) as server:
        assert '"items"' in ask(("127.0.0.1", port), "/api/notes")
        assert "http_request_seconds_count" in ask(("127.0.0.1", port + 1), "/metrics")
        assert mine(server.pid) == []


def mine(pid: int) -> list[Path]:
    """Find the folders of metrics that a process uses."""
    maps = Path(f"/proc/{pid}/maps").read_text()
    return [Path(found) for found in sorted(set(re.findall(rf"{SHARED_MEMORY}/metrics-[^/\s]+", maps)))]


def test_a_daemon_leaves_nothing(installed: Path, environ: dict[str, str], tmp_path: Path):
    """gunicorn --daemon, and later a signal."""
    port, log = free_port(), tmp_path / "log"
    words = f".venv/bin/gunicorn --daemon --pid {tmp_path}/pid --log-file {log}"
    started = run(words, installed, **environ, PORT=str(port))
    assert started.returncode == 0, started.stdout
    wait_until((tmp_path / "pid").exists, log)
    pid = int((tmp_path / "pid").read_text())
    try:
        wait_until(lambda: is_ready(("127.0.0.1", port)), log)
        (folder,) = mine(pid)
    finally:
        os.kill(pid, signal.SIGTERM)
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), log)
    assert not folder.exists()


# --- checkouts and bakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["template", "project"])
def test_line_ends(request: pytest.FixtureRequest, tmp_path: Path, what: str):
    """A checkout on Windows has those of Unix, so that shells take the scripts."""
    where: Path = request.getfixturevalue(what)
    git = ["git", "-c", "core.autocrlf=true", "-c", "init.defaultBranch=main"]
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "first"]):
        place = ["--git-dir", str(tmp_path / "git"), "--work-tree", str(where)]
        subprocess.run([*git, *place, *words], cwd=where, check=True, capture_output=True)
    subprocess.run([*git, "clone", "-q", tmp_path / "git", tmp_path / "clone"], check=True, capture_output=True)
    listed = subprocess.run(
        ["git", "ls-files", "--eol"], cwd=tmp_path / "clone", check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert len(listed) > 20
    assert [line for line in listed if "w/crlf" in line or "w/mixed" in line] == []


def test_answers_of_ones_own(cli: Run, template: Path, tmp_path: Path):
    """cookiecutter's default_context fills in what a team always answers."""
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        f"default_context:\n  author_name: Ours\n  app_instances: '3'\nreplay_dir: {tmp_path / 'replay'}\n"
    )
    done = cli(template, "--no-input", "--config-file", settings, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Ours" in (tmp_path / "my_service" / "pyproject.toml").read_text()
    assert "INSTANCES = 3" in (tmp_path / "my_service" / "app" / "defaults.py").read_text()


def test_a_bake_is_replayed_over_itself(cli: Run, template: Path, tmp_path: Path):
    """With the answers of the last time; what the owner has added stays."""
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"replay_dir: {tmp_path / 'replay'}\n")
    first = cli(template, "--no-input", "--config-file", settings, "app_instances=3", cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    project = tmp_path / "my_service"
    (project / "app" / "mine.py").write_text("MINE = 1\n")
    (project / "Makefile").write_text("")
    again = cli(template, "--replay", "--overwrite-if-exists", "--config-file", settings, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "INSTANCES = 3" in (project / "app" / "defaults.py").read_text()
    assert (project / "app" / "mine.py").exists()
    assert (project / "Makefile").read_text()


def test_long_lines_of_several_workers_stay_whole(installed: Path, environ: dict[str, str]):
    """On a pipe, which takes 4096 bytes at once, and whose reader is slow."""
    port = free_port()
    path = "/api/" + "%01" * 1200  # six characters each in the log
    server = subprocess.Popen(
        [".venv/bin/gunicorn"],
        cwd=installed,
        env=environ | {"PORT": str(port), "WEB_CONCURRENCY": "3"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    lines: list[bytes] = []

    def read() -> None:
        assert server.stderr
        with server.stderr:
            for line in server.stderr:
                lines.append(line)
                time.sleep(0.002)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        wait_until(lambda: is_ready(("127.0.0.1", port)), Path(os.devnull))
        with ThreadPoolExecutor(12) as clients:
            answers = list(clients.map(lambda _: ask(("127.0.0.1", port), path), range(240)))
    finally:
        server.terminate()
        server.wait(SECONDS)
        reader.join(SECONDS)
    assert {answer.split()[1] for answer in answers} == {"404"}
    entries = [json.loads(line) for line in lines]
    long = [entry for entry in entries if len(entry.get("path", "")) > 1000]
    assert len(long) == 240
    assert len({entry["process"] for entry in long}) == 3
    assert min(len(line) for line in lines if b"u0001" in line) > 4096


def test_an_editors_byte_order_mark(copy: Path):
    """At the start of a .env, before the first name."""
    (copy / ".env").write_text("APP_INSTANCES=4\n", encoding="utf-8-sig")
    planned = run("make plan", copy)
    assert "4 instances x" in planned.stdout, planned.stdout
