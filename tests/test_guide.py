"""The project's guide, docs/connection-pooling.md: every block and every error in it, run in an installed project."""

import re
import subprocess
from pathlib import Path

import pytest
from baking import ROOT
from serving import CLEAN

GUIDE = ROOT / "tests" / "inside" / "guide.py"


def test_the_guide_is_true(installed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """tests/inside/guide.py, by the project's own Python and packages."""
    command = [installed / ".venv/bin/python", "-m", "pytest", "-q", "-c", "/dev/null", "--noconftest"]
    done = subprocess.run(
        [*command, "--rootdir", tmp_path, "--basetemp", tmp_path / "pytest", GUIDE],
        cwd=installed,
        env=CLEAN | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    ran = re.search(r"^(\d+) passed in ", done.stdout, re.MULTILINE)
    assert ran, "something was skipped: " + done.stdout
    with capsys.disabled():
        print(f"\nthe guide: {ran[1]} passed")
