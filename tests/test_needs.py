"""`make test` runs for everybody: what a machine lacks leaves out the tests that need it, which is said."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest
from needs import NEEDS

HERE = Path(__file__).parent
# Where no program is: no pooler, no browser, no apt-get.
NOTHING = {"PATH": "/nonexistent"}


@pytest.mark.parametrize("tool", NEEDS)
def test_what_is_left_out_is_there(tool: str):
    """The table names files and tests that exist, or a test that was renamed would fail where its tool is missing."""
    for test in NEEDS[tool].tests:
        file, _, name = test.partition("::")
        tree = ast.parse((HERE / file).read_text())
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert not name or name.partition("[")[0] in functions, test


@pytest.mark.parametrize(("environ", "code"), [({}, 0), ({"LEAVE_NOTHING_OUT": "1"}, 1)])
def test_what_cannot_be_installed(environ: dict[str, str], code: int):
    """`make test` goes on without it. CI does not."""
    words = [sys.executable, HERE / "needs.py"]
    done = subprocess.run(words, env=NOTHING | environ, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == code
    assert done.stdout == ""
    assert ("what some tests need is not here: apt-get install " in done.stderr) is bool(code)


@pytest.mark.parametrize("workers", [(), ("-n", "1")], ids=["one process", "pytest-xdist"])
def test_the_end_says_what_was_left_out(workers: tuple[str, ...]):
    """One line for each tool, with its tests and the command that brings it; whole files by their name alone."""
    words = [
        sys.executable,
        "-m",
        "pytest",
        *workers,
        "-p",
        "no:cacheprovider",
        "--no-header",
        "tests/test_monitoring.py",
    ]
    words += ["tests/test_deploy.py::test_rq", "tests/test_questions.py::test_six_questions"]
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "LEAVE"))}
    done = subprocess.run(
        words, cwd=HERE.parent, env=environ | NOTHING, capture_output=True, text=True, timeout=600, check=False
    )
    assert "\nRedis: 1 tests, test_deploy.py::test_rq. apt-get install redis-server\n" in done.stdout, done.stdout
    assert "tests, test_monitoring.py. apt-get install prometheus\n" in done.stdout


def test_nothing_is_left_out_of_ci():
    """With LEAVE_NOTHING_OUT a test without its tool fails, so that it cannot be forgotten."""
    words = [
        sys.executable,
        "-m",
        "pytest",
        "--collect-only",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_monitoring.py",
    ]
    environ = os.environ | NOTHING | {"LEAVE_NOTHING_OUT": "1"}
    done = subprocess.run(words, cwd=HERE.parent, env=environ, capture_output=True, text=True, timeout=600, check=False)
    assert "tests collected" in done.stdout
    assert "deselected" not in done.stdout
