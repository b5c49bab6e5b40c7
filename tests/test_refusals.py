"""Answers that cannot work are refused before a file exists, with one line that names the answer and the remedy."""

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from baking import ROOT, Run, load

pre = load(ROOT / "hooks" / "pre_gen_project.py")

SLUGS = [
    # (answer, what the line says about it)
    ("", "is empty: write a short name"),
    ("My_Service", "lower-case letters, digits and underscores, and begin with a letter; for example my_service"),
    ("my-service", "for example my_service"),
    ("my service", "for example my_service"),
    ("my.service", "for example my_service"),
    ("1service", "begin with a letter"),
    ("_service", "for example service"),
    ("service_", "end it with a letter or digit"),
    ("my___service", "at most two underscores in a row"),
    ("sérvice", "lower-case letters"),
    ("a" * 41, "has 41 characters: use at most 40"),
    ("x" * 300, "has 300 characters: use at most 40"),
    ("postgres", "a database of Postgres's own"),
    ("template0", "a database of Postgres's own"),
    ("template1", "a database of Postgres's own"),
    ("..", "begin with a letter"),
    ("../outside", "for example outside"),
    ("nested/folder", "for example nested_folder"),
    ("/absolute", "for example absolute"),
    ("two\nlines", "for example two_lines"),
    ("it's", "for example it_s"),
    ("a;rm -rf b", "for example a_rm_rf_b"),
]
TEXTS = [
    ("project_name", "", "is empty: write a name"),
    ("project_name", "   ", "is empty: write a name"),
    ("project_name", " padded", "begins or ends with a space"),
    ("project_name", "two\nlines", "U+000A"),
    ("project_name", "bell\a", "U+0007"),
    ("project_name", "line\u2028separator", "U+2028"),
    ("project_name", "right\u202eto left", "U+202E"),
    ("description", "", "is empty: say in one sentence"),
    ("description", "tab\there", "U+0009"),
    ("description", "delete\x7f", "U+007F"),
    ("author_name", "", "is empty: write the name"),
    ("author_name", "escape\x1b[31m", "U+001B"),
]
NUMBERS = [
    ("postgres_max_connections", "", "is not a whole number"),
    ("postgres_max_connections", "many", "is not a whole number"),
    ("postgres_max_connections", "1e3", "is not a whole number"),
    ("postgres_max_connections", "0", "is not positive"),
    ("postgres_max_connections", "262144", "write 262143 or less"),
    ("app_instances", "2.5", "is not a whole number"),
    ("app_instances", "1_000", "is not a whole number"),
    ("app_instances", " 7", "is not a whole number"),
    ("app_instances", "٣", "is not a whole number"),
    ("app_instances", "-5", "is not positive"),
    ("app_instances", "007", "begins with a zero: write 7"),
    ("app_instances", "9" * 5000, "write 262143 or less"),
]
MISFITS = [
    # (max_connections, instances, what the line says about them)
    ("100", "120", "240 > 87 usable (100 - 3 for superusers - 10 reserved)"),
    ("100", "44", "88 > 87 usable"),
    ("14", "1", "2 > 1 usable"),
    ("13", "1", "2 > 0 usable"),
    ("1", "1", "-12 usable"),
    ("262143", "262143", "524286 > 262130 usable"),
]
TABLE = [
    *(({"project_slug": answer}, remedy) for answer, remedy in SLUGS),
    *(({question: answer}, remedy) for question, answer, remedy in TEXTS + NUMBERS),
    *(({"postgres_max_connections": most, "app_instances": copies}, remedy) for most, copies, remedy in MISFITS),
]


def shown(answer: str) -> str:
    """Quote an answer as a line does: as Python would, but not endlessly."""
    return repr(answer if len(answer) <= 60 else answer[:57] + "...").strip("'\"")


def run(template: Path, cli: Run, folder: Path, *answers: str) -> tuple[subprocess.CompletedProcess[str], list[Path]]:
    """Bake in an empty folder inside another, and say what was printed and what is there afterwards."""
    (folder / "work").mkdir()
    return cli(template, "--no-input", *answers, cwd=folder / "work"), list(folder.rglob("*"))


@pytest.fixture(scope="module")
def runs(template: Path, cli: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Future]]:
    """Every row of the table, baked by the real command, two at a time: starting it is what takes long."""
    with ThreadPoolExecutor(2) as pool:
        yield [
            pool.submit(
                run,
                template,
                cli,
                tmp_path_factory.mktemp("refused"),
                *(f"{question}={answer}" for question, answer in answers.items()),
            )
            for answers, _ in TABLE
        ]


def refusal(result: subprocess.CompletedProcess[str], left: list[Path]) -> str:
    """Return the first line of a run that was refused and left nothing. The second is the command that asks again."""
    assert result.returncode == 1, result.stdout
    line, again, below = result.stderr.splitlines()
    assert line.startswith("Refused: ")
    assert again.startswith(
        f"To try again (Enter keeps the answers that were right): {sys.executable} -m cookiecutter "
    )
    assert below == "What Cookiecutter says below only means that these answers were refused."
    assert [path.name for path in left] == ["work"]
    return line


@pytest.mark.parametrize("row", range(len(TABLE)), ids=lambda row: " ".join(map(repr, TABLE[row][0].values()))[:30])
def test_refused(runs: list[Future], row: int):
    """A bad answer is named, with what is wrong and what would help, on one line; no file and no folder is left."""
    answers, remedy = TABLE[row]
    line = refusal(*runs[row].result())
    assert remedy in line
    for question, answer in answers.items():
        assert question in line
        assert shown(answer) in line


def test_all_at_once(template: Path, tmp_path: Path, cli: Run):
    """Three bad answers are three remedies on the one line, not three runs."""
    line = refusal(
        *run(template, cli, tmp_path, "project_slug=My-App", "author_name=", "app_instances=0", "description=x")
    )
    assert all(name in line for name in ("project_slug 'My-App'", "author_name ''", "app_instances '0'"))
    assert "description" not in line


def test_nothing_is_typed_twice(template: Path, tmp_path: Path, cli: Run):
    """The command of the second line has the good answers, quoted, and none that was refused; it works."""
    good = {"project_name": "Zoë's $HOME", "author_name": 'A "B" C', "postgres_max_connections": "200"}
    (tmp_path / "work").mkdir()
    answers = [f"{name}={answer}" for name, answer in good.items()]
    result = cli(template, "--no-input", "project_slug=Not a slug", *answers, cwd=tmp_path / "work")
    words = shlex.split(result.stderr.splitlines()[1].partition(": ")[2])
    assert words[:4] == [sys.executable, "-m", "cookiecutter", str(template)]
    assert not any(word.startswith("project_slug") for word in words)
    assert cli(*words[3:], "--no-input", cwd=tmp_path / "work").returncode == 0
    (project,) = (tmp_path / "work").iterdir()
    defaults = load(project / "app" / "defaults.py")
    assert good["project_name"] == defaults.SERVICE_TITLE
    assert defaults.MAX_CONNECTIONS == 200


def test_template_syntax_is_refused(template: Path, tmp_path: Path, cli: Run):
    """An answer in template syntax would be run when the project is updated; typed or replayed, it is refused."""
    answers = json.loads((template / "cookiecutter.json").read_text()) | {
        "project_slug": "x",
        "__given_slug": "x",
        "description": "seven is {{ 3 + 4 }}",
    }
    (tmp_path / "work").mkdir()
    replay = tmp_path / "replay.json"
    replay.write_text(json.dumps({"cookiecutter": answers}))
    result = cli(template, "--replay-file", replay, cwd=tmp_path / "work")
    assert result.returncode == 1
    assert "description 'seven is {{ 3 + 4 }}' holds template syntax" in result.stderr
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.parametrize(("most", "copies"), [("15", "1"), ("101", "44"), ("262143", "131065")])
def test_the_remedy_works(template: Path, tmp_path: Path, cli: Run, most: str, copies: str):
    """The least that is not refused is taken, whatever the size of the machine that bakes."""
    args = [f"postgres_max_connections={most}", f"app_instances={copies}"]
    assert cli(template, "--no-input", *args, cwd=tmp_path).returncode == 0


def test_nothing_that_was_there_is_touched(template: Path, tmp_path: Path, cli: Run):
    """A refused bake leaves a project of the same name alone."""
    (tmp_path / "my_service").mkdir()
    (tmp_path / "my_service" / "mine.txt").write_text("mine")
    result = cli(template, "--no-input", "--overwrite-if-exists", "app_instances=0", cwd=tmp_path)
    assert "Refused: app_instances '0' is not positive" in result.stderr
    assert [path.name for path in (tmp_path / "my_service").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("prefix", "installed", "command"),
    [
        ("/usr", True, "cookiecutter"),
        ("/home/x/.cache/pipx/5b2b", False, "pipx run cookiecutter"),
        ("/home/x/.cache/uv/archive-v0/KrNs", False, "uvx cookiecutter"),
        ("/home/x/venv", False, f"{shlex.quote(sys.executable)} -m cookiecutter"),
    ],
)
def test_the_command_is_one_that_is_there(tmp_path: Path, prefix: str, installed: bool, command: str):
    """pipx and uv run cookiecutter without putting it into the PATH."""
    if installed:
        (tmp_path / "cookiecutter").touch()
    assert pre.asked_by(prefix, {"PATH": f"/nowhere:{tmp_path}"}) == command
