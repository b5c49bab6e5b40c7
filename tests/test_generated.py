"""What is baked passes its own checks: those of the defaults, and of answers that are unusual and right."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from baking import AWKWARD, Bake


def check(command: list[str | Path], cwd: Path, timeout: int = 600) -> str:
    """Run a command that has to succeed, and return what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def results(output: str) -> list[dict[str, int]]:
    """How each run of pytest ended, by its closing lines."""
    lines = re.findall(r"^(\d+ passed.*) in .*s", output, re.MULTILINE)
    return [{word: int(count) for count, word in re.findall(r"(\d+) (\w+)", line)} for line in lines]


def test_lint_and_types(installed: Path):
    """ruff and mypy --strict find nothing in what the defaults bake."""
    check(["make", "lint", "typecheck"], installed)


def test_the_suite_on_both_databases(installed: Path, capsys: pytest.CaptureFixture[str]):
    """`make test`: on SQLite and on a real Postgres, and every test runs in one of the two; none is skipped. Whichever
    run is done first is the first to say so."""
    output = check(["make", "test"], installed)
    runs = dict(zip(re.findall(r"pytest --database (\w+)$", output, re.MULTILINE), results(output), strict=True))
    assert set(runs) == {"sqlite", "postgres"}, output
    for run in runs.values():
        assert set(run) == {"passed", "deselected"}, output
    sqlite, postgres = runs["sqlite"], runs["postgres"]
    assert sqlite["passed"] + sqlite["deselected"] == postgres["passed"] + postgres["deselected"]
    assert sqlite["passed"] >= postgres["deselected"]
    assert postgres["passed"] >= sqlite["deselected"]
    with capsys.disabled():
        print(f"\n{output}", end="")


@pytest.mark.parametrize("name", AWKWARD)
def test_the_suite_of_awkward_answers(installed: Path, bake: Bake, tmp_path: Path, name: str):
    """Nothing in the suite depends on the answers; and mypy does not mind them either."""
    project = bake(into=tmp_path / "it's a folder, & more", **AWKWARD[name])
    (run,) = results(check([installed / ".venv/bin/pytest", "--database", "sqlite"], project))
    assert set(run) == {"passed", "deselected"}
    check([installed / ".venv/bin/mypy", "app/defaults.py"], project)


@pytest.mark.parametrize("name", ["one character", "forty characters", "smallest numbers"])
def test_the_suite_of_awkward_answers_on_postgres(installed: Path, bake: Bake, tmp_path: Path, name: str):
    """The slug names the database, the application and a lock; the smallest numbers leave a pool of one."""
    project = bake(into=tmp_path / "it's a folder, & more", **AWKWARD[name])
    (run,) = results(check([installed / ".venv/bin/pytest", "--database", "postgres"], project))
    assert set(run) == {"passed", "deselected"}


MANY_PLANS = """
import sys
sys.path[:0] = [".", "tests"]
import hypothesis, test_sizing
many = hypothesis.settings(max_examples=7000, deadline=None, database=None, derandomize=False)
for name in sorted(vars(test_sizing)):
    test = getattr(test_sizing, name)
    if hasattr(test, "hypothesis"):
        print(name)
        many(test)()
"""


def test_the_promises_hold_over_20_000_plans(installed: Path):
    """The generated suite tries a hundred of each; here it is 21,000."""
    checked = check([installed / ".venv/bin/python", "-c", MANY_PLANS], installed).split()
    assert len(checked) == 3
