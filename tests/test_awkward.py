"""Answers that are unusual and right bake a project as clean as the defaults do."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from baking import AWKWARD, Bake, files, load


@pytest.fixture(scope="module", params=AWKWARD, ids=lambda name: name.replace(" ", "-"))
def awkward(request: pytest.FixtureRequest, bake: Bake, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """The answers, and the project that they bake, below a folder whose name is awkward too."""
    answers = AWKWARD[request.param]
    return answers, bake(into=tmp_path_factory.mktemp("baked") / "it's a folder, & more", **answers)


def test_answers_arrive(awkward: tuple[dict, Path]):
    """Python and the packaging tools read the very answers."""
    answers, project = awkward
    defaults = load(project / "app" / "defaults.py")
    about = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    for question, arrived in {
        "project_name": defaults.SERVICE_TITLE,
        "project_slug": defaults.SERVICE_NAME,
        "description": defaults.SERVICE_DESCRIPTION,
        "author_name": about["authors"][0]["name"],
        "postgres_max_connections": str(defaults.MAX_CONNECTIONS),
        "app_instances": str(defaults.INSTANCES),
    }.items():
        assert arrived == answers.get(question, arrived)
    assert about["name"] == project.name == defaults.SERVICE_NAME
    assert about["description"] == defaults.SERVICE_DESCRIPTION


def test_it_is_formatted_and_lints(awkward: tuple[dict, Path]):
    """The project's own ruff settings find nothing to change and nothing to say."""
    _, project = awkward
    for command in (["format", "--check"], ["check"]):
        result = subprocess.run(
            [sys.executable, "-m", "ruff", *command, "--no-cache"],
            cwd=project,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == 0, result.stdout + result.stderr


def test_it_parses(awkward: tuple[dict, Path]):
    """Every Python, TOML and YAML file is one."""
    _, project = awkward
    for name, text in files(project).items():
        if name.endswith(".py"):
            compile(text, name, "exec")
        elif name.endswith(".toml"):
            tomllib.loads(text.decode())
        elif name.endswith((".yml", ".yaml")):
            yaml.safe_load(text)
