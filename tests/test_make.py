"""The template's Makefile, on stand-ins for what takes long."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from baking import PROJECT, at_a_terminal

PROJECT_MAKEFILE = """\
run:
	@exec "{python}" -c 'import signal, time; signal.signal(signal.SIGINT, lambda *_: exit(0)); \
	print("serving on $(or $(PORT),8000)", flush=True); time.sleep($(or $(SECONDS),0))'
"""


@pytest.fixture
def checkout(template: Path, tmp_path: Path) -> Path:
    """A checkout in a folder with a space, with this test run's tools, and a project that only pretends to serve."""
    folder = shutil.copytree(template, tmp_path / "a checkout")
    (folder / PROJECT / "Makefile").write_text(PROJECT_MAKEFILE.format(python=sys.executable))
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def make(folder: Path, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    # The tools are there, so the files that say so are taken as newer than the requirements.
    fresh = ["-o", ".venv/.bake", "-o", ".venv/.test", "UV="]
    command = ["make", *fresh, *args]
    env = os.environ | environ
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=60, check=False)


def test_help_is_the_default(checkout: Path):
    """`make` alone lists every target with what it does."""
    result = make(checkout)
    targets = re.findall(r"^([a-z]+):", (checkout / "Makefile").read_text(), re.MULTILINE)
    assert re.findall(r"^  ([a-z]+) +\S", result.stdout, re.MULTILINE) == targets
    assert result.returncode == 0


def test_demo_bakes_once(checkout: Path):
    """`make demo` bakes the defaults and serves them; again, it serves what is there, and says when that is old."""
    first = make(checkout, "demo", "PORT=8123")
    assert first.returncode == 0, first.stderr
    assert first.stdout.rstrip().endswith("serving on 8123")
    demo = checkout / ".demo" / "my_service"
    assert (demo / "app" / "config.py").is_file()

    (demo / "data.txt").write_text("mine")
    second = make(checkout, "demo", PORT="8124")
    assert second.stdout == "serving on 8124\n"

    later = time.time() + 10
    os.utime(checkout / PROJECT / "wsgi.py", (later, later))
    third = make(checkout, "demo")
    assert third.stdout.startswith("The template has changed since .demo/my_service was made. 'rm -r .demo' lets")
    assert third.stdout.endswith("serving on 8000\n")
    assert (demo / "data.txt").read_text() == "mine"


def test_demo_after_an_interrupted_bake(checkout: Path):
    """After an interrupted bake, the project is baked again."""
    (checkout / ".demo" / "my_service").mkdir(parents=True)
    assert make(checkout, "demo").returncode == 0
    assert (checkout / ".demo" / "my_service" / "wsgi.py").is_file()


def test_demo_stops_quietly(checkout: Path):
    """Ctrl-C ends the demo without an error of make's."""
    assert make(checkout, "demo").returncode == 0
    command = ["make", "-o", ".venv/.bake", "demo", "SECONDS=60"]
    _, shown = at_a_terminal(command, checkout, "\x03", after="8000\r\n")
    assert shown.split() == ["serving", "on", "8000", "^C"]


@pytest.mark.parametrize("python", ["/bin/false", "no-such-python"])
def test_old_python_is_one_clear_error(template: Path, tmp_path: Path, python: str):
    """A Python that is too old, or none, is said in one line with the remedy."""
    folder = shutil.copytree(template, tmp_path / "a checkout")
    command = ["make", "demo", "UV=", f"PYTHON={python}"]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    line, *rest = result.stderr.splitlines()
    assert line == f"Python 3.11 or newer is needed, and {python} is older or missing: make PYTHON=/path/to/python"
    assert all(line.startswith("make") for line in rest)
    assert not (folder / ".venv").exists()
