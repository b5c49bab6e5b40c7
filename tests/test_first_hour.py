"""A newcomer's first hour with a project, mistakes included: each is survived, or explained in one line."""

import contextlib
import html
import http.client
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from baking import Bake
from serving import CLEAN, ask, command_of, everything, free_port, processes, run, served

PATIENCE = 120  # seconds, for what takes a few on a quiet machine


@pytest.fixture
def fresh(bake: Bake, tmp_path: Path) -> Path:
    """A project in which nothing is installed yet."""
    return bake(into=tmp_path)


def wait_for(address: str, status: int, text: str) -> None:
    """Ask until the answer is this one; the server may be on its way up or down meanwhile."""
    deadline, answer = time.monotonic() + PATIENCE, None
    while True:
        with contextlib.suppress(OSError, http.client.HTTPException):
            answer = ask(address, "/api/notes")
            if answer[0] == status and text in str(answer[1]):
                return
        assert time.monotonic() < deadline, answer
        time.sleep(0.2)


MISTAKES = {
    "a syntax error": ("app/notes.py", "def broken(:\n", "SyntaxError"),
    "a name that is not there": ("app/models.py", "missing_name\n", "NameError"),
    "in the settings": ("app/config.py", "1 / 0\n", "ZeroDivisionError"),
}


def test_a_mistake_is_shown_and_survived(copy: Path):
    """`make run` answers with the error in Werkzeug's debugger while a file does not load, and serves again when it is
    corrected; also where the file is new, and was never loaded."""
    factory = copy / "app" / "__init__.py"
    with served("make run", copy, free_port(), mistakes=True) as address:
        wait_for(address, 200, "items")
        for name, line, error in MISTAKES.values():
            before = (copy / name).read_text()
            (copy / name).write_text(f"{before}\n{line}")
            wait_for(address, 500, error)
            (copy / name).write_text(before)
            wait_for(address, 200, "items")
        (copy / "app" / "new.py").write_text("missing_name\n")
        factory.write_text(factory.read_text().replace("    from app import ", "    from app import new, ", 1))
        wait_for(address, 500, "NameError")
        (copy / "app" / "new.py").write_text("name = 1\n")
        wait_for(address, 200, "items")


VIEWS = """

@bp.get("/stop")
def stop() -> str:
    stopped = 6 * 7
    breakpoint()
    return f"then {stopped}"


@bp.get("/raise")
def raises() -> str:
    return 1 / 0
"""


def test_breakpoint_and_debugger(copy: Path):
    """A breakpoint stops in the terminal. An error shows Werkzeug's debugger, which may run its script: the headers of
    the app are not on its page."""
    with (copy / "app" / "notes.py").open("a") as file:
        file.write(VIEWS)
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    with Terminal("make run", copy, PORT=str(port)) as terminal, ThreadPoolExecutor(1) as browser:
        terminal.wait_for("Debugger PIN")
        wait_for(address, 200, "items")
        answer = browser.submit(ask, address, "/api/notes/stop")
        terminal.wait_for(r"\(Pdb\)")
        terminal.type("p stopped\n")
        terminal.wait_for(r"\b42\b")
        terminal.type("c\n")
        assert answer.result() == (200, "then 42")
        status, page = ask(address, "/api/notes/raise", accept="text/html")
        assert status == 500
        assert "ZeroDivisionError" in page
        (script,) = re.findall(r'src="(\?__debugger__=yes[^"]+debugger\.js)"', page)
        assert ask(address, f"/{html.unescape(script)}")[0] == 200
        with urlopen(f"{address}/api/notes") as fine:  # noqa: S310  # it is the service
            assert "Content-Security-Policy" in fine.headers
        with pytest.raises(HTTPError) as failed:
            urlopen(f"{address}/api/notes/raise")  # noqa: S310
        failed.value.close()
        assert "Content-Security-Policy" not in failed.value.headers
        terminal.type(CTRL_C)
        terminal.end()


def test_a_template_is_read_again(copy: Path):
    """Without a restart."""
    page = copy / "app" / "templates" / "index.html"
    with served("make run", copy, free_port()) as address:
        page.write_text(page.read_text().replace("<h1>", "<h1>Edited "))
        assert "<h1>Edited My Service" in ask(address, "/", accept="text/html")[1]


CTRL_C = "\x03"


class Terminal:
    """A command at a terminal of its own."""

    def __init__(self, command: str, cwd: Path, **environ: str) -> None:
        self.ours, theirs = pty.openpty()
        self.shown = self.seen = ""
        self.process = subprocess.Popen(
            ["sh", "-c", command],
            cwd=cwd,
            env=CLEAN | environ,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),
        )
        os.close(theirs)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        for each in processes(self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        self.process.wait()
        with contextlib.suppress(OSError):
            os.close(self.ours)

    def read(self) -> bool:
        """Read, and return whether the terminal is still held open by anybody."""
        if select.select([self.ours], [], [], 0.1)[0]:
            try:
                self.shown += os.read(self.ours, 4096).decode(errors="replace")
            except OSError:  # how Linux ends a terminal that nobody holds open any more
                return False
        return True

    def wait_for(self, text: str) -> None:
        """Wait until it is shown after the last wait's text, or is the command line of a process that runs here."""
        deadline = time.monotonic() + PATIENCE
        while not (found := re.search(text, self.shown[len(self.seen) :])):
            if any(re.search(text, command) for command in processes(self.process.pid).values()):
                return
            assert self.read(), self.shown
            assert time.monotonic() < deadline, self.shown
        self.seen = self.shown[: len(self.seen) + found.end()]

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def end(self) -> tuple[int, str]:
        """Return the exit code, and all that was shown."""
        deadline = time.monotonic() + PATIENCE
        while self.read():
            assert time.monotonic() < deadline, f"it goes on: {self.shown}"
        return self.process.wait(PATIENCE), self.shown


def of_ours(shown: str, project: Path) -> list[str]:
    """Return the lines of a traceback that are in the project's own files, but for what a script imports at its top:
    until then nothing of it can handle Ctrl-C."""
    found = re.findall(rf'(File "(?:{re.escape(str(project))}/(?!\.venv/).*|<stdin>)".*)(\n +(?!File ).*)?', shown)
    return [place for place, line in found if not line.strip().startswith(("import ", "from "))]


@pytest.mark.parametrize(
    ("target", "moment"),
    [
        ("plan", "-m flask pool plan"),  # a process: while it is only being loaded
        ("run", "-m flask db upgrade"),
        ("run", "-m flask --app wsgi run"),
        ("run", "Running on"),
        ("run", "Debugger PIN"),
        ("prod", "-m scripts.prod"),
        ("prod", "Starting Postgres"),
        ("prod", "Postgres is at"),
        ("prod", "Listening at"),
        ("prod", "Ctrl-C stops it"),
    ],
)
def test_ctrl_c_at_any_moment(installed: Path, target: str, moment: str):
    """Nothing runs on, and no traceback leads through our files. Python shows its own while Flask is being loaded."""
    port = str(free_port())
    with Terminal(f"make {target}", installed, PORT=port) as terminal:
        terminal.wait_for(moment)
        terminal.type(CTRL_C)
        _, shown = terminal.end()
    assert of_ours(shown, installed) == [], shown
    assert processes(below=installed / "instance") == {}
    assert everything(PORT=port) == []


def test_ctrl_c_while_it_installs(fresh: Path):
    """No traceback, and the same command goes on."""
    with Terminal("make plan UV=", fresh) as terminal:
        terminal.wait_for("Collecting|Processing|Using cached|Downloading")
        terminal.type(CTRL_C)
        _, shown = terminal.end()
    assert of_ours(shown, fresh) == []
    assert not (fresh / ".venv" / ".prod").exists()
    assert run("make plan", fresh, UV=uv()).returncode == 0


def uv() -> str:
    return str(Path(sys.executable).parent / "uv")


@pytest.mark.parametrize("command", ["make run", "make prod"])
def test_a_closed_terminal_ends_it(installed: Path, command: str):
    """Nothing serves on, and the port is free again."""
    port = free_port()
    with Terminal("exec bash --norc -i", installed, PORT=str(port), PS1="what now? ") as terminal:
        terminal.wait_for(r"what now\? ")  # what is typed before it may be lost
        terminal.type(f"{command}\n")
        terminal.wait_for("Debugger PIN|Ctrl-C stops it")
        wait_for(f"http://127.0.0.1:{port}", 200, "items")
        os.close(terminal.ours)
        terminal.process.wait(PATIENCE)
        deadline = time.monotonic() + PATIENCE
        while left := everything(PORT=port):
            assert time.monotonic() < deadline, [command_of(each) for each in left]
            time.sleep(0.2)
    assert processes(below=installed / "instance") == {}
    with socket.create_server(("127.0.0.1", port)):
        pass


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", free_port())) as server:
        yield server.getsockname()[1]


def test_a_port_in_use_is_one_line(copy: Path, taken: int):
    """The server says it; also when the port is the one in .env. Nothing is left."""
    said = run("make run", copy, PORT=str(taken))
    assert said.returncode
    assert f"Port {taken} is in use by another program" in said.stdout
    (copy / ".env").write_text(f"PORT={taken}\n")
    assert f"Port {taken} is in use by another program" in run("make run", copy).stdout
    for port, says in (
        (taken, f"Can't connect to ('127.0.0.1', {taken})"),
        (taken - 1, f"WEB_PROBE_PORT={taken}: Address already in use"),
    ):
        said = run("make prod", copy, PORT=str(port))
        assert said.returncode
        assert says in said.stdout
        assert "Traceback" not in said.stdout
        assert processes(below=copy / "instance") == {}


@pytest.mark.parametrize("more", ["UV=", f"UV={uv()}"])
def test_an_old_python(fresh: Path, tmp_path: Path, more: str):
    """One line, and nothing is left."""
    old = tmp_path / "python3.10"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    said = run(f"make run PYTHON={old} {more}", fresh)
    line, *rest = said.stdout.splitlines()
    assert line == f"Python 3.11 or newer is needed, and {old} is older or missing: make PYTHON=/path/to/python"
    assert all(line.startswith("make") for line in rest)
    assert not (fresh / ".venv").exists()


def test_without_debians_venv_package(fresh: Path, tmp_path: Path):
    """Python's message is shown, and after the installation of the package the same command works."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "venv.py").write_text(
        "import pathlib, sys\npathlib.Path('.venv/bin').mkdir(parents=True)\n"
        "pathlib.Path('.venv/bin/python').symlink_to(sys.executable)\n"
        "pathlib.Path('.venv/pyvenv.cfg').write_text(f'home = {pathlib.Path(sys.executable).resolve().parent}')\n"
        "sys.exit('ensurepip is not available')\n"
    )
    said = run("make plan UV=", fresh, PYTHONPATH=str(tmp_path / "fake"))
    assert said.returncode
    assert "ensurepip is not available" in said.stdout
    assert run("make plan", fresh, UV=uv()).returncode == 0


@pytest.mark.parametrize("left", ["an empty folder", "no python", "no pip"])
def test_an_unfinished_venv_is_made_again(fresh: Path, left: str):
    """Whatever an interrupted start left."""
    (fresh / ".venv" / "bin").mkdir(parents=True)
    if left == "no python":
        (fresh / ".venv" / "bin" / "python").symlink_to("/nowhere/python")
    elif left == "no pip":
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", fresh / ".venv"], check=True, timeout=60)
    said = run("make plan", fresh, UV="" if left == "no pip" else uv())
    assert said.returncode == 0, said.stdout
    assert "all instances" in said.stdout


@pytest.mark.parametrize("name", ["50% of it", "$HOME of mine", 'a "quoted" one', "it's ünusual"])
def test_paths(bake: Bake, tmp_path: Path, name: str):
    """A folder may have any name: it installs, migrates and serves."""
    project = bake(into=tmp_path / name)
    with served("make run", project, free_port(), UV=uv()) as address:
        assert ask(address, "/api/notes") == (200, {"items": [], "next": None})


def test_env_counts_in_development(copy: Path):
    """In `make plan` as in `make run`; what is set in the environment comes first."""
    (copy / ".env").write_text((copy / ".env.example").read_text().replace("# APP_INSTANCES=2", "APP_INSTANCES=4"))
    assert "4 instances x" in run("make plan", copy).stdout
    assert "3 instances x" in run("make plan", copy, APP_INSTANCES="3").stdout
    with served("make run", copy, free_port()) as address:
        assert ask(address, "/")[1]["plan"].startswith("4 instances x")


@pytest.mark.parametrize("command", ["db upgrade", "run", "shell", "pool check"])
def test_flask_in_a_shell(installed: Path, command: str):
    """Without APP_ENV it is production; the message tells a newcomer what to set."""
    said = run(f".venv/bin/flask {command}", installed)
    assert said.returncode
    assert "SECRET_KEY is not set" in said.stdout
    assert "APP_ENV=development" in said.stdout
    assert "Traceback" not in said.stdout


def test_prod_as_root_where_nobody_else_may_look(installed: Path, tmp_path: Path):
    """It works below a folder that only root may enter, under umask 077, and changes the permissions of no folder."""
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    project = shutil.copytree(installed, home / "my_service", ignore=shutil.ignore_patterns("instance"), symlinks=True)
    for path in [project, *project.rglob("*")]:
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & 0o700)
    before = {path: path.stat().st_mode for path in (tmp_path, home, project)}
    with served("umask 077; make prod", project, free_port(), end=signal.SIGINT) as address:
        assert ask(address, "/api/notes") == (200, {"items": [], "next": None})
    assert {path: path.stat().st_mode for path in before} == before
    assert (project / "instance" / "postgres").resolve().parent == Path("/var/tmp")  # noqa: S108
