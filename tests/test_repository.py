"""The repository itself: what a visitor of a minute reads, its address, its releases, the branch `example`."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from baking import PROJECT, ROOT, commit_all, files, git
from test_static import TOOLS

TEXTS = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "AGENTS.md", "docs/providers.md", f"{PROJECT}/AGENTS.md"]
LINKED = [
    *("CHANGELOG.md", "docs/existing-app.md", "docs/benchmark.md", f"{PROJECT}/README.md"),
    *(f"{PROJECT}/docs/{name}.md" for name in ("connection-pooling", "deploy", "jobs", "metrics", "recipes")),
]
# In a baked project, OWNER/REPOSITORY is its owner's address.
PLACEHOLDER = re.compile(r"OWNER/REPO\b|OWNER\.github\.io/REPO\b")
SAYS_IT_ITSELF = {".ci/address", "tests/test_repository.py"}


@pytest.fixture
def repository(template: Path, tmp_path: Path) -> Path:
    """A clone, with this test run's tools."""
    folder = shutil.copytree(template, tmp_path / "a clone")
    commit_all(folder, "all of it")
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def command(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120, check=False)


def found(folder: Path) -> set[str]:
    """Find the committed files that have the placeholder."""
    names = git(folder, "ls-files", "-z").split("\0")[:-1]
    return {name for name in names if PLACEHOLDER.search((folder / name).read_text(errors="replace"))}


def test_one_command_puts_the_address_in(repository: Path):
    """Afterwards no file has the placeholder, and nothing else has changed."""
    before, names = files(repository), found(repository)
    assert {"README.md", ".github/ISSUE_TEMPLATE/config.yml"} <= names - SAYS_IT_ITSELF
    done = command(repository, ".ci/address", "Notes-Inc/flask.pooling")
    assert done.returncode == 0, done.stderr
    assert found(repository) == SAYS_IT_ITSELF
    changed = {
        name for name, text in files(repository).items() if before.get(name) != text and not name.startswith(".git/")
    }
    assert changed == names - SAYS_IT_ITSELF
    readme = (repository / "README.md").read_text()
    assert "gh:Notes-Inc/flask.pooling" in readme
    assert "https://notes-inc.github.io/flask.pooling/" in readme


@pytest.mark.parametrize(
    "wrong", [(), ("",), ("notes",), ("a/b/c",), ("notes/x y",), ("https://github.com/a/b",), ("a#/b",)]
)
def test_an_address_that_is_none(repository: Path, wrong: tuple[str, ...]):
    """It is refused, and nothing is changed."""
    done = command(repository, ".ci/address", *wrong)
    assert done.returncode == 2
    assert "usage: .ci/address OWNER/REPO" in done.stderr
    assert git(repository, "status", "--porcelain", "--untracked-files=no") == ""


def test_no_address_is_made_up(template: Path):
    """A link to GitHub leads to the placeholder, or to somebody else's project that is named here."""
    elsewhere = {"guizmaii", "sqlalchemy"}
    for name, text in files(template).items():
        if name.startswith("tests/") or name.endswith((".txt", ".png")):
            continue
        for owner in re.findall(r"github\.com/([\w.-]+)/", text.decode(errors="replace")):
            assert owner in {"OWNER", *elsewhere}, (name, owner)


def test_the_branch_example(repository: Path, project: Path):
    """It holds the project as it is baked. It gets a commit where that has changed, and none where it has not."""
    branch = git(repository, "branch", "--show-current").strip()
    first = command(repository, ".ci/example")
    assert first.returncode == 0, first.stderr
    tree = git(repository, "ls-tree", "-r", "--name-only", "-z", "example").split("\0")[:-1]
    assert sorted(tree) == sorted(files(project))
    assert git(repository, "show", "example:README.md") == (project / "README.md").read_text()
    assert command(repository, ".ci/example").stdout == "example is as it was\n"
    readme = repository / PROJECT / "README.md"
    readme.write_text(f"{readme.read_text()}\nOne more line.\n")
    assert command(repository, ".ci/example").returncode == 0
    assert git(repository, "show", "example:README.md").endswith("One more line.\n")
    assert len(git(repository, "log", "--format=%h", "example").split()) == 2
    assert git(repository, "branch", "--show-current").strip() == branch
    assert git(repository, "diff", "--name-only").strip() == f"{PROJECT}/README.md"
    assert git(repository, "diff", "--cached", "--name-only") == ""


def test_the_notes_of_a_release(repository: Path):
    """They are the version's part of the changelog, without its heading. A version without one stops the release."""
    (repository / "CHANGELOG.md").write_text(
        "# Changelog\n\n## [Unreleased]\n\n- later\n\n## [0.3.0] - 2026-12-01\n\n### Added\n\n- a plan page\n\n"
        "## [0.3.0rc1] - 2026-11-01\n\n- early\n\n## [0.2.0]\n\n[0.3.0]: https://example.org/compare\n"
    )
    assert command(repository, ".ci/changes", "0.3.0").stdout == "### Added\n\n- a plan page\n"
    assert command(repository, ".ci/changes", "0.3.0rc1").stdout == "- early\n"
    for version in ("0.2.0", "0.3", "9.9.9"):
        missing = command(repository, ".ci/changes", version)
        assert missing.returncode == 1
        assert f"no part '## [{version}]'" in missing.stderr


def test_scripts_of_workflows_are_there():
    """Each script that a workflow runs exists, and may be run."""
    workflows = "".join(path.read_text() for path in (ROOT / ".github" / "workflows").glob("*.yml"))
    scripts = set(re.findall(r"\.ci/\w+", workflows))
    assert scripts == {".ci/run", ".ci/example", ".ci/changes", ".ci/locks", ".ci/newest"}
    assert [name for name in scripts if not (ROOT / name).stat().st_mode & 0o111] == []


def test_issue_forms_are_forms():
    """GitHub leaves out a form that it cannot read, without a word."""
    forms = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
    assert len(forms) == 4
    for form in forms:
        schema = "vendor.github-issue-config" if form.name == "config.yml" else "vendor.github-issue-forms"
        done = command(ROOT, str(TOOLS / "check-jsonschema"), "--builtin-schema", schema, str(form))
        assert done.returncode == 0, done.stdout
        assert yaml.safe_load(form.read_text())


def anchors(text: str) -> set[str]:
    """Return the names that GitHub gives to the headings."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", [*TEXTS, *LINKED])
def test_what_a_text_names_is_there(template: Path, project: Path, name: str):
    """Each link leads somewhere, each path is there, each target of make can be made."""
    folder, text = (project if PROJECT in name else template), (ROOT / name).read_text()
    here = folder / name.replace(f"{PROJECT}/", "")
    for link in re.findall(r"\]\(([^)]+)", text):
        path, _, anchor = link.partition("#")
        if "://" not in link:
            there = here.parent / path if path else here
            assert there.exists(), link
            assert not anchor or anchor in anchors(there.read_text()), link
    if name == "README.md" or name in LINKED:  # other tests read their commands and paths
        return
    makefile = (folder / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+):", makefile, re.MULTILINE)
    assert set(re.findall(r"(?:`|\$ )make ([a-z-]+)", text)) <= {*targets}
    top = {path.name for path in folder.iterdir()}
    paths = {path for path in re.findall(r"`([\w.{}-]+/[\w./-]*)`", text) if path.partition("/")[0] in top}
    assert [path for path in paths if not (folder / path).exists() and name != "docs/providers.md"] == []


def test_the_limits_are_those_of_the_page():
    """docs/providers.md and the plan page say the same limits, from the same source, read on the same day."""
    text, page = (ROOT / "docs" / "providers.md").read_text(), (ROOT / "docs" / "plan" / "index.html").read_text()
    read = re.search(r'const READ = "([\d-]+)"', page)
    assert read
    assert f"read on {read[1]}" in text
    for provider in ("Render", "Neon", "Supabase", "RDS"):
        part = text.partition(f"\n## {provider}\n")[2].partition("\n## ")[0]
        entry = page.partition(f'["{provider}", "')[2]
        source, limits = re.match(r'([^"]+)", \d+,\s*(\{[^}]+\})', entry).groups()  # type: ignore[union-attr]
        assert f"Source: {source}\n" in part
        said = {
            int(number)
            for number in re.findall(r"^\|(?: [^|]*[A-Za-z][^|]* \|)(?: [\d.]+ GiB \|)? (\d+) \|", part, re.M)
        }
        assert said
        assert said <= set(json.loads(re.sub(r"([{,]\s*)([A-Z]\w*):", r'\1"\2":', limits)).values())
