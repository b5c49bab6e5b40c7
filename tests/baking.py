"""Helpers of all tests: paths, answers to bake with, and ways to run things."""

import importlib.util
import os
import pty
import random
import re
import select
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent
PROJECT = "{{cookiecutter.project_slug}}"
SCRATCH = (
    ".git",
    ".venv",
    ".demo",
    "__pycache__",
    ".hypothesis",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
)

# Answers that are unusual and right. Each bakes a project that passes its own checks and its own suite.
AWKWARD = {
    "quotes": {
        "project_name": """Bob's "Best" Service""",
        "description": """It's '''all''' \"\"\"quotes\"\"\", `ticks` and "more".""",
        "author_name": """Ann "the Hammer" O'Neil <ann@example.org>""",
    },
    "backslashes": {
        "project_name": r"back\slash",
        "description": r"ends with C:\new\table\u0041 \\",
        "author_name": "tail\\",
    },
    "accents": {
        "project_name": "Crème Brûlée & Søn",
        "description": "Ünïcödé, 日本語, العربية, ‘curly’, – dashes – and 👩‍🚀.",
        "author_name": "Zoë Ångström",
    },
    "syntax": {
        "project_name": "- &no: *yes # !null",
        "description": "${HOME} $PATH %(percent)s {single} }} %} [list] <b>&amp;</b> | > @ : $$ $(id)",
        "author_name": "null",
    },
    "digit first": {"project_name": "3 Little Pigs"},
    "one character": {"project_name": "x", "project_slug": "a", "description": ".", "author_name": "b"},
    "forty characters": {"project_name": "W" * 90, "project_slug": "a2345678901234567890123456789012345678z0"},
    "largest numbers": {"postgres_max_connections": "262143", "app_instances": "131065"},
    "smallest numbers": {"postgres_max_connections": "15", "app_instances": "1"},
}

# What a random test prints where it fails, and takes from the environment to repeat the run.
SEED = int(os.environ.get("SEED") or random.randrange(10**6))  # noqa: S311  # no secret

Bake = Callable[..., Path]
Run = Callable[..., subprocess.CompletedProcess[str]]


def load(path: Path) -> ModuleType:
    """Load the module in one file."""
    spec = importlib.util.spec_from_file_location(f"loaded_{path.stem}", path)
    assert spec
    assert spec.loader
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def files(folder: Path) -> dict[str, bytes]:
    """Read every file below a folder, by its path there."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def at_a_terminal(command: list[str], cwd: Path, typed: str, after: str = "") -> tuple[int, str]:
    """Run a command at a terminal of its own, and type once it has shown `after`: its exit code, and all it showed."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command,
        cwd=cwd,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        # The first terminal that a session's leader opens becomes its own: Ctrl-C works as it does for a person.
        preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),
    )
    os.close(theirs)
    shown, deadline = b"", time.monotonic() + 600
    try:
        while select.select([ours], [], [], 0)[0] or time.monotonic() < deadline:
            if typed and after.encode() in shown:
                os.write(ours, typed.encode())
                typed = ""
            if select.select([ours], [], [], 0.1)[0]:
                try:
                    shown += os.read(ours, 4096)
                except OSError:  # how Linux ends a terminal that nobody holds open any more
                    break
        return process.wait(timeout=120), re.sub(r"\x1b\[[0-9;]*m", "", shown.decode())
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def git(folder: Path, *args: str) -> str:
    """Run git with ARGS in a folder, and return its output."""
    return subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, timeout=60, check=True).stdout


def commit_all(folder: Path, message: str) -> None:
    """Make the folder a git repository, with everything in it committed."""
    git(folder, "init", "--quiet")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", message)


def with_hypothesis(venv: Path) -> None:
    """Install it into a project's environment, as it is pinned for the template's own tests."""
    _install("hypothesis", "test.txt", "--python", venv / "bin" / "python")


def with_pytest_flask(folder: Path) -> Path:
    """Install it, without what it needs, into a folder for PYTHONPATH."""
    _install("pytest-flask", "deploy.txt", "--no-deps", "--target", folder)
    return folder


def _install(name: str, pinned_in: str, *where: str | Path) -> None:
    needed = ["--constraint", ROOT / "requirements" / pinned_in, name]
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([uv, "pip", "install", "--quiet", *where, *needed], timeout=600, check=True)
