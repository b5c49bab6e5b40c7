"""Workflows, Dockerfile, compose file and hooks, read by the tools that know them; and the words of all texts. Nothing
asks the network."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from baking import PROJECT, ROOT, files

TOOLS = Path(sys.executable).parent
CHECKS = [
    # (in the template or in what it bakes, the tool, what it reads)
    ("template", "ruff check", ""),
    ("template", "ruff format --check", ""),
    *(
        (where, tool, path.relative_to(folder).as_posix())
        for where, folder in (("template", ROOT), ("project", ROOT / PROJECT))
        for path in sorted(folder.glob(".github/workflows/*.yml"))
        for tool in (
            "actionlint",
            "zizmor --offline --quiet",
            "check-jsonschema --builtin-schema vendor.github-workflows",
        )
    ),
    ("template", "zizmor --offline --quiet", ".github/dependabot.yml"),
    ("template", "check-jsonschema --builtin-schema vendor.dependabot", ".github/dependabot.yml"),
    ("project", "zizmor --offline --quiet", ".github/dependabot.yml"),
    ("project", "check-jsonschema --builtin-schema vendor.dependabot", ".github/dependabot.yml"),
    ("project", "check-jsonschema --builtin-schema vendor.compose-spec", "compose.yaml"),
    ("project", "hadolint", "Dockerfile"),
]


@pytest.mark.parametrize(("where", "command", "file"), CHECKS, ids=lambda value: value)
def test_tool_has_nothing_to_say(template: Path, project: Path, where: str, command: str, file: str):
    """Each file is clean for the tool that reads its kind."""
    tool, *args = command.split()
    result = subprocess.run(
        [TOOLS / tool, *args, *([file] if file else [])],
        cwd=template if where == "template" else project,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_ci_runs_what_people_run():
    """CI's one command is the one that people type, and it can be run."""
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert script.read_text().rstrip().endswith("exec make test")


# In brackets, so that this file does not hold what it looks for.
ODD_WORDS = re.compile(
    r"\b(a[n]ew|by itsel[f]|nobody els[e]'s|men[d](s|ed|ing)?|what nobod[y]|(is|are) believe[d]|whoeve[r])\b",
    re.IGNORECASE,
)
QUESTIONS = {"What", "Who", "How", "Whether", "Which"}


def test_plain_english(template: Path):
    """A docstring begins with a verb or names a thing, and words that make a reader stumble are in no text."""
    for name, content in files(template).items():
        if re.search(r"_?cache(__)?/|\.(png|json)$|requirements.*\.txt$|/results/|^LICENSE$", name):
            continue
        text = content.decode(errors="replace")
        assert not ODD_WORDS.search(text), (name, ODD_WORDS.search(text))
        for node in ast.walk(ast.parse(text)) if name.endswith(".py") else ():
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = ast.get_docstring(node) or ""
                assert docstring.partition(" ")[0] not in QUESTIONS, (name, docstring)
