"""The hooks, as the pure functions that they are, and what a bake prints."""

import ast
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from baking import PROJECT, ROOT, Run, load
from hypothesis import given
from hypothesis import strategies as st

GOOD = {
    "project_name": "My Service",
    "project_slug": "my_service",
    "description": "What it does.",
    "author_name": "Somebody",
    "postgres_max_connections": "100",
    "app_instances": "2",
}
pre = load(ROOT / "hooks" / "pre_gen_project.py")
post = load(ROOT / "hooks" / "post_gen_project.py")
sizing = load(ROOT / PROJECT / "flask_pooling" / "sizing.py")


@pytest.mark.parametrize("hook", ["pre_gen_project", "post_gen_project"])
def test_jinja_only_at_the_call(hook: str):
    """A hook is Python before it is rendered, and one expression of it is Jinja: data for the call under __main__."""
    source = (ROOT / "hooks" / f"{hook}.py").read_text()
    ast.parse(source)
    assert source.count("{" + "{") == 1
    assert "{%" not in source
    assert "{" + "{" in source.split('if __name__ == "__main__":')[1]


@pytest.mark.parametrize("hook", ["pre_gen_project", "post_gen_project"])
def test_hooks_stay_at_home(hook: str):
    """No network, no deletion, no prompt and no other program in a hook."""
    names = {
        name.id
        for name in ast.walk(ast.parse((ROOT / "hooks" / f"{hook}.py").read_text()))
        if isinstance(name, ast.Name)
    }
    assert not names & {"input", "subprocess", "shutil", "socket", "urllib", "requests", "open", "exec", "eval"}


@pytest.mark.parametrize("slug", ["a", "my_service", "my__service", "a1", "app", "x" * 40, "postgres2", "template"])
def test_good_slugs(slug: str):
    """Lower-case letters, digits and inner underscores make a slug, from one character to forty."""
    assert pre.slug_problem(slug) == ""


@given(st.text())
def test_any_slug_that_passes_names_everything(slug: str):
    """Whatever is accepted can name a database, a distribution and an image; the remedy for the rest is accepted."""
    problem = pre.slug_problem(slug)
    if not problem:
        assert slug.isascii()
        assert slug.isidentifier()
        assert slug == slug.lower()
        assert slug[-1] != "_"
    elif "; for example " in problem and len(slug) <= 40:
        better = problem.rpartition("; for example ")[2]
        assert pre.slug_problem(better) in ("", pre.slug_problem("postgres"), pre.slug_problem("template0"))
    assert len(problem.splitlines()) <= 1


@given(st.text())
def test_any_text_that_passes_is_one_line(text: str):
    """Whatever is accepted as a name or a description stays on one line and survives a second rendering."""
    problem = pre.text_problem("project_name", text)
    if not problem:
        assert text.splitlines() == [text]
        assert text == text.strip()
        assert not any(syntax in text for syntax in ("{" + "{", "{%", "{#"))
    assert len(problem.splitlines()) <= 1


@given(st.one_of(st.integers().map(str), st.text(), st.from_regex("[0-9]{1,10}", fullmatch=True)))
def test_any_number_that_passes_is_one(number: str):
    """Whatever is accepted as a number is written as Python writes it, and is one that Postgres can serve."""
    if not pre.number_problem("app_instances", number):
        assert str(int(number)) == number
        assert 1 <= int(number) <= 262143


@given(st.integers(1, 262143), st.integers(1, 262143))
def test_numbers_that_do_not_fit_name_a_way_out(most: int, copies: int):
    """Refused numbers fit once one of the remedies is followed; without a remedy, both numbers have to change."""
    problem = pre.fit_problem(str(most), str(copies), sizing)
    if not problem:
        assert most - 13 >= 2 * copies
        return
    assert most - 13 < 2 * copies
    ways = problem.rpartition("what would help: ")[2]
    if ways == "fewer instances and more connections":
        assert most - 13 < 2
        assert 2 * copies + 13 > 262143
        return
    for way in ways.split(" or "):
        question, _, value = way.partition(" ")
        numbers = {"postgres_max_connections": str(most), "app_instances": str(copies)} | {question: value}
        assert pre.problems(GOOD | numbers, sizing) == []


def test_old_python_is_refused(capfd: pytest.CaptureFixture[str]):
    """A cookiecutter that runs on a Python older than the service's floor is told so, in one line."""
    assert pre.main(GOOD, {}, version=(3, 10, 9)) == 1
    assert capfd.readouterr().err == (
        "Refused: Python 3.10 runs cookiecutter: use Python 3.11 or newer, as the service does\n"
    )


def test_arithmetic_is_found(template: Path, tmp_path: Path):
    """The template's folder is found as it was typed: absolute, or relative to where cookiecutter was started."""
    expected = template / PROJECT / "flask_pooling" / "sizing.py"
    for repo, output, pwd in [
        (str(template), str(tmp_path), None),
        (template.name, str(template.parent), None),
        (template.name, str(tmp_path), str(template.parent)),
        (".", str(tmp_path), str(template)),
    ]:
        found = pre.find_sizing({"_repo_dir": repo, "_output_dir": output}, {"PWD": pwd} if pwd else {})
        assert found
        assert found.resolve() == expected.resolve()


def test_unknown_template_folder_leaves_the_fit_open(tmp_path: Path):
    """cruft does not name the template's folder: the first hook then leaves the arithmetic to the second."""
    assert pre.find_sizing({"_template": "x"}, {"PWD": str(tmp_path)}) is None
    assert pre.main(GOOD | {"app_instances": "120"}, {}) == 0


def test_second_hook_refuses_what_the_first_could_not(project: Path, capfd: pytest.CaptureFixture[str]):
    """Numbers that could not be held together before the bake are after it; cookiecutter then removes what it made."""
    assert post.main(GOOD | {"app_instances": "120"}, project) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("Refused: postgres_max_connections and app_instances do not fit together: 120 instances")
    assert err.count("\n") == 1


def machine(cpus: float, memory_mib: int) -> SimpleNamespace:
    return SimpleNamespace(cpus=lambda: cpus, memory_mib=lambda: memory_mib)


def test_report():
    """After a bake: the machine, the plan, the sum behind it, and the next three commands."""
    numbers = {"max_connections": 100, "instances": 2}
    lines = post.report("My Service", Path("/a/my_service"), numbers, sizing, machine(2, 4096))
    assert lines == [
        "My Service on this machine (2 cpus, 4096 MiB):",
        "  3 workers x 4 threads",
        "  2 instances x 3 workers x (4 + 0) = 24 of 87 connections (100 - 3 for superusers - 10 reserved)",
        "",
        "Next:",
        "  cd /a/my_service",
        "  make run",
        "  make test",
    ]


def test_report_says_what_bent_the_plan():
    """A plan that was made smaller says why."""
    lines = post.report("x", Path("x"), {"max_connections": 100, "instances": 8}, sizing, machine(2, 2048))
    assert lines[1] == "  3 workers x 3 threads"
    assert lines[3].startswith("  shrunk by the database")


def test_report_on_a_machine_that_is_too_small():
    """A machine that cannot hold the service is told so; the bake stands."""
    lines = post.report("x", Path("x"), {"max_connections": 100, "instances": 1}, sizing, machine(1, 128))
    assert lines[0].startswith("x does not fit this machine; it may fit another one: 128 MiB")
    assert lines[-2:] == ["  make run", "  make test"]


def test_report_on_an_unknown_machine():
    """A machine whose size cannot be read costs the plan, not the project."""
    unknown = SimpleNamespace(cpus=lambda: 1 / 0, memory_mib=lambda: 1)
    lines = post.report("x", Path("x"), {"max_connections": 100, "instances": 1}, sizing, unknown)
    assert lines[0] == "This machine's cpus and memory cannot be read, so no plan is shown: division by zero"
    assert lines[-1] == "  make test"


def test_what_a_bake_prints(cli: Run, template: Path, tmp_path: Path):
    """The real command prints the report, and its cd is good for a path with spaces and quotes."""
    folder = tmp_path / "it's a folder"
    folder.mkdir()
    result = cli(template, "--no-input", "project_name=Zoë's \\ 'x' 😀", cwd=folder)
    assert result.stderr == ""
    lines = result.stdout.splitlines()
    assert lines[0].startswith("Zoë's \\ 'x' 😀 on this machine (")
    assert shlex.split(lines[-3]) == ["cd", str(folder / "zoe_s_x")]
    assert lines[-2:] == ["  make run", "  make test"]


def test_report_in_a_terminal_without_unicode(
    cli: Run, template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A name that the terminal cannot show is escaped, not a crash."""
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    assert r"Zo\xeb on this machine" in cli(template, "--no-input", "project_name=Zoë", cwd=tmp_path).stdout
    assert r"author_name 'Zo\xeb ' begins" in cli(template, "--no-input", "author_name=Zoë ", cwd=tmp_path).stderr


def test_no_bytecode_is_left(cli: Run, template: Path, tmp_path: Path):
    """Reading the arithmetic leaves no bytecode, in the template or in the project."""
    cli(template, "--no-input", cwd=tmp_path)
    assert [*template.rglob("__pycache__"), *tmp_path.rglob("__pycache__")] == []


def test_hooks_can_be_declined(cli: Run, template: Path, tmp_path: Path):
    """Without hooks, for those who do not trust them, the files are the same."""
    cli(template, "--no-input", "--accept-hooks=no", cwd=tmp_path)
    assert (tmp_path / "my_service" / "flask_pooling" / "sizing.py").is_file()


def test_hooks_run_on_the_standard_library(project: Path):
    """The hooks import nothing that has to be installed: not even site-packages."""
    for path in (project / "flask_pooling" / "sizing.py", project / "flask_pooling" / "machine.py"):
        subprocess.run([sys.executable, "-I", "-S", "-B", path], check=True, timeout=60)
