"""The version of the library that is used, and the check that it is the released one."""

import json
import shutil
from pathlib import Path

import pytest
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

import flask_pooling
from flask_pooling import SettingsError, version
from flask_pooling.gunicorn import configure
from tests.serving import command

pytestmark = pytest.mark.sqlite  # no database in it


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library in another place."""
    here = shutil.copytree(version.HERE, tmp_path / "flask_pooling", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(version, "HERE", here)
    monkeypatch.setattr(version, "RECORD", here / "RECORD")
    return here


def test_the_released_files_are_unmodified(environ: dict[str, str]) -> None:
    """`flask pool version` says so, and exits with 0; `--json` is for an update."""
    said = command("flask", "pool", "version", **environ)
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.startswith(f"flask_pooling {flask_pooling.__version__}, unmodified (vendored in ")
    facts = json.loads(command("flask", "pool", "version", "--json", **environ).stdout)
    assert (facts["version"], facts["unmodified"], facts["changed"]) == (flask_pooling.__version__, True, [])


def test_what_was_changed_is_named(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that was edited, added or deleted; bytecode is none."""
    assert version.changed() == []
    (copied / "sizing.py").write_text("edited")
    (copied / "own.py").write_text("added")
    (copied / "page.py").unlink()
    (copied / "__pycache__").mkdir()
    (copied / "__pycache__" / "x.pyc").write_text("made by Python")
    assert version.changed() == ["own.py", "page.py", "sizing.py"]


def test_two_copies_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in the project and one installed: nobody would know which is used."""
    monkeypatch.setattr(version, "installed", lambda: tmp_path)
    with pytest.raises(SettingsError, match=f"here twice: .* and installed in {tmp_path}"):
        flask_pooling.init_app(Flask("x"), SQLAlchemy())
    with pytest.raises(SystemExit, match="here twice"):
        configure({}, "x:app")


@pytest.mark.parametrize(("found", "works"), [("21.2.0", True), ("25.0", True), ("21.1.9", False), ("9.0", False)])
def test_what_is_too_old_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, found: str, works: bool) -> None:
    """With what is needed."""
    monkeypatch.setattr("importlib.metadata.version", lambda name: found if name == "gunicorn" else "99")
    says = [] if works else [f"gunicorn {found} is too old for flask_pooling: it needs 21.2 or newer"]
    assert [*version.problems()] == says


WITHOUT_A_NAME = """
import importlib.metadata
importlib.metadata.version = lambda name: "2.3" if name == {!r} else "99"
import pydantic_settings
del pydantic_settings.NoDecode
import flask_pooling
"""


def test_what_is_too_old_to_be_imported_is_said(environ: dict[str, str]) -> None:
    """An old version may lack a name that the library imports. An error with another cause stays as it is."""
    for name, says in (("pydantic-settings", "2.3 is too old for flask_pooling"), ("none", "import name 'NoDecode'")):
        done = command("python", "-c", WITHOUT_A_NAME.format(name), **environ)
        assert done.returncode == 1
        assert says in done.stderr.splitlines()[-1]
