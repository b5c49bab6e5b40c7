"""The files around the app that repeat it agree with it: README, .env.example, Makefile, container files."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from serving import CLEAN

TABLE_ROW = re.compile(r"^\| `([A-Z_]+)` \| (.+?) \| (.+) \|$", re.MULTILINE)
ASKED = {"APP_INSTANCES": "2", "DB_MAX_CONNECTIONS": "100"}
FIELDS = """
import json
from app.config import Settings
print(json.dumps({name.upper(): field.get_default(call_default_factory=True) for name, field in
    Settings.model_fields.items()}))
"""


@pytest.fixture(scope="module")
def defaults(installed: Path) -> dict[str, str]:
    """Every setting with its default as one writes it; nothing where there is none, or the plan decides."""
    command = [installed / ".venv/bin/python", "-c", FIELDS]
    done = subprocess.run(command, cwd=installed, env=CLEAN, capture_output=True, text=True, timeout=60, check=True)
    return {name: "" if value in (None, {}, []) else f"{value}" for name, value in json.loads(done.stdout).items()}


def targets(project: Path) -> list[str]:
    """Read the targets of make."""
    phony = re.search(r"^\.PHONY: (.+)$", (project / "Makefile").read_text(), re.MULTILINE)
    assert phony
    return phony[1].split()


def make(project: Path, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["make", *args], cwd=project, env=CLEAN, capture_output=True, text=True, timeout=60, check=False
    )


def test_env_example_is_every_default(project: Path, defaults: dict[str, str]):
    """The commented lines of .env.example are all settings with exactly their defaults, and there are no others."""
    text = (project / ".env.example").read_text()
    shown = dict(re.findall(r"^# ([A-Z_]+)=(.*)$", text, re.MULTILINE))
    assert {name: shown.get(name) for name in defaults} == defaults
    assert [line for line in text.splitlines() if line and not line.startswith("# ")] == []


def test_env_example_says_where_it_counts(project: Path):
    """The first line is for the owner who copies it."""
    assert (project / ".env.example").read_text().startswith("# Copy this file to .env")


def test_the_table_of_settings(project: Path, defaults: dict[str, str]):
    """The README lists all settings, each with its default."""
    rows = {name: default for name, default, _ in TABLE_ROW.findall((project / "README.md").read_text())}
    assert rows.keys() == defaults.keys()
    for name, default in rows.items():
        if name in ASKED:
            assert (default, defaults[name]) == ("asked", ASKED[name])
        elif defaults[name]:
            assert default == defaults[name]
        else:
            assert " " in default or default == "none", f"{name} has no default, so the table says where it is from"


def test_help_lists_every_target(project: Path):
    """`make` alone names every target, with what it does."""
    assert re.findall(r"^  make ([a-z-]+) +\S", make(project).stdout, re.MULTILINE) == targets(project)


def test_every_target_can_be_made(project: Path):
    """Nothing that a target needs is missing from the Makefile."""
    planned = make(project, "--dry-run", *targets(project), "m=what changed")
    assert planned.returncode == 0, planned.stderr


@pytest.mark.parametrize("name", ["README.md", ".github/workflows/ci.yml", "docs/connection-pooling.md"])
def test_named_targets_exist(project: Path, name: str):
    """Whatever is said of `make SOMETHING` can be made."""
    found = re.findall(r"(?:`|\$ |run: |=\S+ )make ([a-z-]+(?: [a-z-]+(?![a-z=-]))*)", (project / name).read_text())
    assert {target for words in found for target in words.split()} <= set(targets(project))


def test_named_files_exist(project: Path):
    """Every path that the README and the guide name is there, and every folder is in "Where things are"."""
    readme = (project / "README.md").read_text()
    folder = r"(?:app|deploy|docs|migrations|flask_pooling|requirements|scripts|tests)/[\w./-]*"
    for text in (readme, (project / "docs" / "connection-pooling.md").read_text()):
        named = re.findall(rf"`({folder}|[\w.-]+\.conf\.py|wsgi\.py)`", text)
        assert named
        assert [path for path in named if not (project / path).exists()] == []
    places = readme.partition("## Where things are")[2].partition("## ")[0]
    folders = {path.name for path in project.iterdir() if path.is_dir()} - {".git", "instance", ".venv"}
    assert [name for name in folders if f"`{name}/`" not in places] == []


def test_pre_commit_runs_the_tools_of_the_venv(project: Path):
    """Each hook's program is one that requirements/dev.txt installs, so its version stands nowhere else."""
    tools = re.findall(r"entry: \.venv/bin/(\S+)", (project / ".pre-commit-config.yaml").read_text())
    assert tools == ["ruff", "ruff", "mypy"]
    for tool in tools:
        assert re.search(rf"^{tool}==", (project / "requirements/dev.txt").read_text(), re.MULTILINE)


def test_secrets_have_no_default(project: Path):
    """Nothing that starts the service comes with a secret in it."""
    for name in ("compose.yaml", "Dockerfile", ".env.example"):
        given = re.findall(r"(?:SECRET_KEY|PASSWORD)(?:=|: )(.*)$", (project / name).read_text(), re.MULTILINE)
        assert [value for value in given if value and not value.startswith(("${", "$(openssl", '""'))] == []


def test_plain_words(project: Path, template: Path):
    """Words of our own do not reach the owner: "instance" is the field's."""
    texts = [
        project / "README.md",
        project / ".env.example",
        template / "README.md",
        project / "docs/connection-pooling.md",
    ]
    for path in texts:
        prose = re.sub(r"`[^`\n]*`|^## How fast.*?^## ", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        for word in ("baked", "copies", "fleet", "problem(s)"):
            assert word not in prose, f"{path.name}: {word}"
