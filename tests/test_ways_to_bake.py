"""Every way to bake gives the same project: from a folder, at the prompts, from a zip, from git, and with cruft."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from baking import PROJECT, ROOT, Run, at_a_terminal, commit_all, files, git


@pytest.fixture(scope="module")
def repository(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The template as a git repository."""
    folder = shutil.copytree(template, tmp_path_factory.mktemp("git") / "flask-pooling")
    commit_all(folder, "The template")
    return folder


def test_from_a_folder(cli: Run, template: Path, project: Path, tmp_path: Path):
    """`cookiecutter PATH --no-input`, with the path absolute or relative, and a folder for the output or none."""
    relative = os.path.relpath(template, tmp_path)
    for path, args, output in [
        (template, [], tmp_path),
        (relative, ["-o", "out put"], tmp_path / "out put"),
    ]:
        assert cli(path, "--no-input", *args, cwd=tmp_path).returncode == 0
        assert files(output / "my_service") == files(project)


def test_relative_path_still_has_the_arithmetic(cli: Run, template: Path, tmp_path: Path):
    """Numbers that do not fit are refused before a file exists also where the template is given by a relative path."""
    result = cli(os.path.relpath(template, tmp_path), "--no-input", "-o", "out", "app_instances=99", cwd=tmp_path)
    assert "Refused: postgres_max_connections 100 and app_instances 99 do not fit" in result.stderr
    assert list(tmp_path.rglob("*")) == [tmp_path / "out"]


def test_at_the_prompts(template: Path, tmp_path: Path):
    """Each of the six answers can be typed; the prompts are sentences, and the slug on offer follows the name."""
    typed = ["Typed by Hand", "typed", "Typed for a test.", "Ty Pist", "200", "5"]
    command = [sys.executable, "-m", "cookiecutter", str(template)]
    code, shown = at_a_terminal(command, tmp_path, "".join(f"{answer}\n" for answer in typed))
    assert code == 0, shown
    plain = " ".join(shown.split())
    prompts = json.loads((template / "cookiecutter.json").read_text())["__prompts__"]
    for number, prompt in enumerate(prompts.values(), start=1):
        assert f"[{number}/6] {prompt}" in plain
    assert "(typed_by_hand)" in plain
    baked = b"".join(files(tmp_path / "typed").values()).decode(errors="ignore")
    assert all(answer in baked for answer in typed)


def test_defaults_at_the_prompts(template: Path, project: Path, tmp_path: Path):
    """Enter, six times, is the defaults."""
    code, shown = at_a_terminal([sys.executable, "-m", "cookiecutter", str(template)], tmp_path, "\n" * 6)
    assert code == 0, shown
    assert files(tmp_path / "my_service") == files(project)


def test_refused_at_the_prompts(template: Path, tmp_path: Path):
    """A bad answer at a prompt is refused as one on the command line is."""
    command = [sys.executable, "-m", "cookiecutter", str(template)]
    code, shown = at_a_terminal(command, tmp_path, "Name\nnot a slug\n{{ braces }}\n\n\n\n")
    assert code == 1
    assert "project_slug 'not a slug' cannot be used" in shown
    assert "description '{{ braces }}' holds template syntax" in shown
    assert list(tmp_path.iterdir()) == []


def test_from_a_zip(cli: Run, repository: Path, project: Path, tmp_path: Path):
    """A zip of the repository, as a code host makes one, bakes the same project, and refuses the same numbers."""
    git(
        repository,
        "archive",
        "--format=zip",
        "--prefix=flask-pooling-main/",
        f"--output={tmp_path / 'main.zip'}",
        "HEAD",
    )
    assert zipfile.is_zipfile(tmp_path / "main.zip")
    assert cli("main.zip", "--no-input", cwd=tmp_path).returncode == 0
    assert files(tmp_path / "my_service") == files(project)
    assert "do not fit together" in cli("main.zip", "--no-input", "app_instances=99", "-o", "x", cwd=tmp_path).stderr


def test_from_git(cli: Run, repository: Path, project: Path, tmp_path: Path):
    """A clone of the repository, as `gh:OWNER/REPO` makes one, bakes the same project, and refuses the same numbers."""
    address = repository.as_uri()
    assert cli(address, "--no-input", cwd=tmp_path).returncode == 0
    assert files(tmp_path / "my_service") == files(project)
    assert "do not fit together" in cli(address, "--no-input", "app_instances=99", "-o", "x", cwd=tmp_path).stderr


def cruft(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cruft", *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


def test_cruft_bakes_the_same(repository: Path, project: Path, tmp_path: Path):
    """`cruft create` gives what cookiecutter gives, and its own note of where that came from."""
    result = cruft("create", repository, "--no-input", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    created = files(tmp_path / "my_service")
    assert json.loads(created.pop(".cruft.json"))["commit"] == git(repository, "rev-parse", "HEAD").strip()
    assert created == files(project)


def test_cruft_is_refused_too(repository: Path, tmp_path: Path):
    """Numbers that do not fit are refused, and leave nothing, where only the second hook can tell."""
    result = cruft("create", repository, "--no-input", "--extra-context", '{"app_instances": "99"}', cwd=tmp_path)
    assert result.returncode != 0
    assert "Refused: postgres_max_connections and app_instances do not fit together" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_cruft_updates_a_project(repository: Path, tmp_path: Path):
    """The README's command, as it is written: over a project whose `app/` was changed everywhere, a template whose
    `flask_pooling/` has changed brings that, renders what is new, and conflicts with nothing."""
    (command,) = re.findall(r"^\$ (cruft update.*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    source = shutil.copytree(repository, tmp_path / "source")
    answers = '{"project_name": "Zoë\'s \\"X\\""}'
    created = cruft("create", source, "--no-input", "--extra-context", answers, cwd=tmp_path)
    assert created.returncode == 0, created.stderr
    project = tmp_path / "zoe_s_x"
    mine = [path for path in (project / "app").rglob("*") if path.is_file()] + [project / "gunicorn.conf.py"]
    for path in mine:
        comment = {".html": "<!-- mine -->", ".css": "/* mine */"}.get(path.suffix, "# mine")
        path.write_text(f"{comment}\n{path.read_text()}\n{comment}\n")
    commit_all(project, "Made, and changed by me")

    theirs = [path for path in (source / PROJECT / "flask_pooling").rglob("*") if path.suffix == ".py"]
    assert len(theirs) > 10
    for path in theirs:
        lines = path.read_text().splitlines()
        middle = len(lines) // 2
        path.write_text("\n".join([lines[0], "", *lines[1:middle], *lines[middle:], "# The template moves on."]) + "\n")
    with (source / PROJECT / "README.md").open("a") as readme:
        readme.write("\nA new line, for {{ cookiecutter.project_slug }}.\n")
    (source / PROJECT / "flask_pooling" / "new.py").write_text('"""A new file of the template."""\n')
    commit_all(source, "The template moves on")
    assert cruft("check", cwd=project).returncode == 1

    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    updated = subprocess.run(
        ["sh", "-c", command],
        cwd=project,
        env=os.environ | {"PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert updated.returncode == 0, updated.stdout + updated.stderr
    for file in theirs:
        assert (
            project / "flask_pooling" / file.relative_to(source / PROJECT / "flask_pooling")
        ).read_text() == file.read_text()
    assert (project / "flask_pooling" / "new.py").is_file()
    assert (project / "README.md").read_text().endswith("\nA new line, for zoe_s_x.\n")
    assert all(path.read_text().count("mine") >= 2 for path in mine)
    assert not any("<<<<<<<" in path.read_text() for path in mine)
    assert list(project.rglob("*.rej")) == []
    assert cruft("check", cwd=project).returncode == 0
