"""What a newcomer does to a project in the first hour, mistakes included: each is survived, or said in one line."""

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
from pathlib import Path

import pytest
from baking import Bake
from serving import CLEAN, ask, free_port, processes, run, served

UNREACHABLE = "http://127.0.0.1:9/simple"


@pytest.fixture
def fresh(bake: Bake, tmp_path: Path) -> Path:
    """A project in which nothing is installed yet."""
    return bake(into=tmp_path)


def wait_for(address: str, status: int, text: str) -> None:
    deadline = time.monotonic() + 30
    while True:
        answer = ask(address, "/api/notes")
        if answer[0] == status and text in str(answer[1]):
            return
        assert time.monotonic() < deadline, answer
        time.sleep(0.2)


MISTAKES = {
    "a syntax error": ("app/notes.py", "def broken(:\n", "SyntaxError"),
    "a name that is not there": ("app/models.py", "missing_name\n", "NameError"),
    "an import that fails": ("app/errors.py", "import not_a_module\n", "ModuleNotFoundError"),
    "an exit": ("app/home.py", "raise SystemExit('gone')\n", "gone"),
    "in the settings": ("app/config.py", "1 / 0\n", "ZeroDivisionError"),
}


def test_a_mistake_is_shown_and_survived(copy: Path):
    """`make run` answers 500 with the error while a file does not load, and serves again when it is mended."""
    with served("make run", copy, free_port(), mistakes=True) as address:
        wait_for(address, 200, "items")
        for name, line, error in MISTAKES.values():
            before = (copy / name).read_text()
            (copy / name).write_text(f"{before}\n{line}")
            wait_for(address, 500, error)
            (copy / name).write_text(before)
            wait_for(address, 200, "items")


def test_a_mistake_in_a_file_that_was_never_loaded(copy: Path):
    """Also where gunicorn does not know the file: a module that is new."""
    with served("make run", copy, free_port(), mistakes=True) as address:
        factory = copy / "app" / "__init__.py"
        (copy / "app" / "new.py").write_text("missing_name\n")
        factory.write_text(factory.read_text().replace("    from app import ", "    from app import new, ", 1))
        wait_for(address, 500, "NameError")
        (copy / "app" / "new.py").write_text("name = 1\n")
        wait_for(address, 200, "items")


def test_what_a_start_says(installed: Path):
    """The last line is the name, the address and how to stop it; the plan is there once, and nothing of gunicorn's own
    doings."""
    port = free_port()
    with served("make run", installed, port):
        log = (installed.parent / f"{port}.log").read_text()
    *_, plan, last = [line for line in log.splitlines() if "app.access" not in line]
    assert f"my_service serves on http://127.0.0.1:{port}; Ctrl-C stops it" in last
    assert "plan: 2 instances x" in plan
    assert not re.search("Next:|Reloader|SIGQUIT|Booting|\x1b", log)
    assert log.count("instances x") == 1


def at_once(command: str, project: Path, seconds: float, **environ: str) -> tuple[int, str]:
    """Press Ctrl-C at a terminal after a while."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        ["sh", "-c", command],
        cwd=project,
        env=CLEAN | environ,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),
    )
    os.close(theirs)
    time.sleep(seconds)
    os.write(ours, b"\x03")
    shown, deadline = b"", time.monotonic() + 60
    try:
        while select.select([ours], [], [], max(0, deadline - time.monotonic()))[0]:
            shown += os.read(ours, 4096)
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"it goes on: {shown.decode(errors='replace')}")
    except OSError:  # how Linux ends a terminal that nobody holds open any more
        return process.wait(30), shown.decode(errors="replace")
    finally:
        os.close(ours)


@pytest.mark.parametrize("seconds", [0.2, 0.5, 1, 1.8])
@pytest.mark.parametrize("target", ["run", "prod", "plan"])
def test_ctrl_c_at_once(installed: Path, target: str, seconds: float):
    """No traceback, whenever it comes. Python itself shows one in the instant before it runs a line of ours."""
    _, shown = at_once(f"make {target}", installed, seconds, PORT=str(free_port()))
    starting = "Fatal Python error: init_import_site" in shown or "Could not import runpy module" in shown
    assert "Traceback" not in shown or starting, shown
    assert processes(below=installed / "instance") == {}


def test_ctrl_c_while_it_installs(fresh: Path):
    """One line, and the same command goes on."""
    _, shown = at_once("make plan UV=", fresh, 1.5)
    assert "Traceback" not in shown
    assert shown.count("Stopped. Run the same command again to continue.") == 1
    assert run("make plan", fresh, UV=uv()).returncode == 0


def uv() -> str:
    return str(Path(sys.executable).parent / "uv")


def everything() -> list[int]:
    return [int(path.name) for path in Path("/proc").glob("[0-9]*")]


def environ_of(process: int) -> str:
    try:
        return Path(f"/proc/{process}/environ").read_text(errors="replace")
    except OSError:
        return ""


@pytest.mark.parametrize("command", ["make run", "make prod"])
@pytest.mark.parametrize("opened_for", ["bash --norc -i", "make"])
def test_a_closed_terminal_ends_it(installed: Path, command: str, opened_for: str):
    """Nothing serves on, and the port is free again. An editor opens a terminal for make itself."""
    words = opened_for.split() if opened_for != "make" else command.split()
    port = free_port()
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(installed)
        os.execvpe(words[0], words, CLEAN | {"PORT": str(port)})  # noqa: S606
    if opened_for != "make":
        os.read(terminal, 1000)  # the prompt: what is typed before it may be lost
        os.write(terminal, f"{command}\n".encode())
    deadline = time.monotonic() + 60
    while True:
        try:
            if ask(f"http://127.0.0.1:{port}", "/livez")[0] == 200:
                break
        except OSError:
            assert time.monotonic() < deadline
            time.sleep(0.2)
    os.close(terminal)
    os.waitpid(pid, 0)
    while [each for each in everything() if f"PORT={port}\0" in environ_of(each)]:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    with socket.create_server(("127.0.0.1", port)):
        pass


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", free_port())) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize("command", ["make run", "make prod"])
def test_a_port_in_use_is_said_first(fresh: Path, taken: int, command: str):
    """Before anything is installed, in one line; also when the port is the one in .env."""
    for environ, file in (({"PORT": str(taken)}, ""), ({}, f"PORT={taken}\n")):
        (fresh / ".env").write_text(file)
        said = run(command, fresh, **environ)
        assert said.returncode
        assert said.stdout.startswith(f"127.0.0.1:{taken} is in use; set PORT to a free port")
        assert len([line for line in said.stdout.splitlines() if not line.startswith("make")]) == 1
        assert not (fresh / ".venv").exists()


def test_the_port_of_the_probes_in_use_is_said_first(fresh: Path, taken: int):
    """It is the next one, or WEB_PROBE_PORT."""
    for environ in ({"PORT": str(taken - 1)}, {"PORT": str(free_port()), "WEB_PROBE_PORT": str(taken)}):
        said = run("make prod", fresh, **environ)
        assert said.returncode
        assert said.stdout.startswith(f"127.0.0.1:{taken} is in use; set WEB_PROBE_PORT to a free port")
        assert not (fresh / ".venv").exists()


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
    """The package is named, the unfinished venv is gone, and after its installation the same command works."""
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "venv.py").write_text(
        "import pathlib, sys\npathlib.Path('.venv/bin').mkdir(parents=True)\n"
        "pathlib.Path('.venv/bin/python').symlink_to(sys.executable)\nsys.exit('ensurepip is not available')\n"
    )
    said = run("make plan UV=", fresh, PYTHONPATH=str(tmp_path / "fake"))
    assert said.returncode
    assert "apt install python3-venv" in said.stdout
    assert not (fresh / ".venv").exists()


@pytest.mark.parametrize("left", ["an empty folder", "no python", "no pip"])
def test_an_unfinished_venv_is_made_anew(fresh: Path, left: str):
    """Whatever an interrupted start left."""
    (fresh / ".venv" / "bin").mkdir(parents=True)
    if left == "no python":
        (fresh / ".venv" / "bin" / "python").symlink_to("/nowhere/python")
    elif left == "no pip":
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", fresh / ".venv"], check=True, timeout=60)
    said = run("make plan", fresh, UV="" if left == "no pip" else uv())
    assert said.returncode == 0, said.stdout
    assert "all instances" in said.stdout


@pytest.mark.parametrize("tool", ["pip", "uv"])
def test_without_a_network(fresh: Path, tmp_path: Path, tool: str):
    """It is said in one line that it is the network."""
    nowhere = {
        f"PIP_{name}": value for name, value in (("INDEX_URL", UNREACHABLE), ("NO_INDEX", "0"), ("RETRIES", "0"))
    }
    nowhere |= {
        "PIP_CONFIG_FILE": "/dev/null",
        "PIP_FIND_LINKS": "",
        "PIP_NO_CACHE_DIR": "1",
        "PIP_EXTRA_INDEX_URL": "",
    }
    nowhere |= {"UV_DEFAULT_INDEX": UNREACHABLE, "UV_INDEX_URL": UNREACHABLE, "UV_NO_CONFIG": "1", "UV_FIND_LINKS": ""}
    nowhere |= {"UV_CACHE_DIR": str(tmp_path / "cache"), "UV_HTTP_RETRIES": "0", "UV_INDEX": "", "UV_OFFLINE": "0"}
    said = run("make plan", fresh, UV=uv() if tool == "uv" else "", **nowhere)
    assert said.returncode
    lines = [line for line in said.stdout.splitlines() if not re.match(r"make|Installing| +\d+ s", line)]
    assert lines == ["The package index cannot be reached. Check the network, then run the same command again."], (
        said.stdout
    )


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
    port = free_port()
    with served("make run", copy, port):
        assert "plan: 4 instances x" in (copy.parent / f"{port}.log").read_text()


@pytest.mark.parametrize("command", ["db upgrade", "run", "shell", "pool check"])
def test_flask_in_a_shell(installed: Path, command: str):
    """Without APP_ENV it is production; whoever only tries is told what to set."""
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
    try:
        with served("umask 077; make prod", project, free_port(), end=signal.SIGINT) as address:
            assert ask(address, "/api/notes") == (200, {"items": [], "next": None})
        assert {path: path.stat().st_mode for path in before} == before
    finally:
        elsewhere = (project / "instance" / "postgres").resolve()
        if elsewhere.is_relative_to("/var/tmp"):  # noqa: S108
            shutil.rmtree(elsewhere, ignore_errors=True)
            elsewhere.with_name(f"{elsewhere.name}.log").unlink(missing_ok=True)
