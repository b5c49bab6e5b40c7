"""A baked project passes its own checks, with the defaults and with answers that are unusual and right."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
import serving
from baking import AWKWARD, SEED, Bake, with_hypothesis, with_pytest_flask
from needs import missing

INSIDE = Path(__file__).parent / "inside"
LIBRARY = Path(__file__).parent / "library"  # not collected here
# A whole production's .env, and what libpq and gunicorn read by themselves.
SHELL = {
    "APP_ENV": "production",
    "APP_INSTANCES": "7",
    "APP_JOB": "worker",
    "APP_JOBS": "worker=2x4",
    "DATABASE_URL": "postgresql://app:hunter2@db.invalid/production",
    "DB_BUDGET_CHECK": "off",
    "DB_MAX_CONNECTIONS": "20",
    "DB_POOLER": "pgbouncer",
    "DB_POOL_SIZE": "1",
    "FLASK_DEBUG": "1",
    "GUNICORN_CMD_ARGS": "--workers 9",
    "PGHOST": "db.invalid",
    "PGOPTIONS": "-c statement_timeout=1",
    "PGPORT": "5433",
    "PGUSER": "nobody",
    "PORT": "80",
    "PROMETHEUS_MULTIPROC_DIR": "/nonexistent",
    "SECRET_KEY": "short",
    "SQLALCHEMY_POOL_SIZE": "20",
    "WEB_CONCURRENCY": "2",
    "WEB_HOST": "::",
    "WEB_TRUSTED_PROXIES": "3",
}


def check(command: list[str | Path], cwd: Path, timeout: int = 600) -> str:
    """Run a command that has to succeed, and return what it printed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | {"PATH": path}, capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def results(output: str) -> list[dict[str, int]]:
    """Return the result of each run of pytest, from its closing lines."""
    lines = re.findall(r"^(\d+ passed.*) in .*s", output, re.MULTILINE)
    return [{word: int(count) for count, word in re.findall(r"(\d+) (\w+)", line)} for line in lines]


def test_lint_and_types(installed: Path):
    """ruff and mypy --strict find nothing in what the defaults bake."""
    check(["make", "lint", "typecheck"], installed)


def test_the_suite_on_both_databases(installed: Path, capsys: pytest.CaptureFixture[str]):
    """`make test`: on SQLite and on a real Postgres, and every test runs in one of the two; none is skipped."""
    output = check(["make", "test"], installed)
    databases = re.findall(r"-m pytest --database (\w+)", output)
    assert databases == ["sqlite", "postgres"], output
    chosen, left_out = {}, {}
    for database, run in zip(databases, results(output), strict=True):
        listed = check([installed / ".venv/bin/pytest", "--collect-only", "--database", database], installed)
        counted = re.search(r"^(\d+)/\d+ tests collected \((\d+) deselected\)", listed, re.MULTILINE)
        assert counted, listed
        chosen[database], left_out[database] = map(int, counted.groups())
        assert run.pop("passed") == chosen[database], output
        assert set(run) <= {"deselected"}, output
    assert chosen["sqlite"] >= left_out["postgres"]
    assert chosen["postgres"] >= left_out["sqlite"]
    with capsys.disabled():
        print(f"\n{output}", end="")


SOMEBODYS_TABLES = """
    create table spatial_ref_sys (srid int primary key); insert into spatial_ref_sys values (4326);
    alter extension plpgsql add table spatial_ref_sys;
    create table by_hand (id int); insert into by_hand values (1);
    create schema tiger; create table tiger.notes (id int); insert into tiger.notes values (1)
"""


def test_the_suite_on_somebodys_own_server(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """With Docker's superuser, 20 connections, and tables of an extension, as PostGIS has them, and of somebody: the
    suite passes, and leaves those as they are. `make migrate` does not write that they are dropped."""
    with serving.postgres(copy, tmp_path / "data", "test", max_connections=20) as url:
        url = url.replace("//app@", "//postgres@")
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(SOMEBODYS_TABLES)
        monkeypatch.setenv("TEST_DATABASE_URL", url)
        monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # this pytest's, and not the project's
        files = [f"tests/test_{name}.py" for name in ("migrations", "notes", "server")]
        check([copy / ".venv/bin/python", "-m", "pytest", "--database", "postgres", *files], copy)
        with psycopg.connect(url, autocommit=True) as connection:
            for table in ("spatial_ref_sys", "by_hand", "tiger.notes"):
                assert connection.execute(f"table {table}").fetchall(), table
            connection.execute("drop table by_hand")
        done = serving.run("make migrate m=nothing", copy, TEST_DATABASE_URL=url)
        assert "Alembic finds nothing to migrate" in done.stdout


@pytest.mark.parametrize("name", AWKWARD)
def test_types_of_awkward_answers(installed: Path, bake: Bake, tmp_path: Path, name: str):
    """mypy does not mind them."""
    project = bake(into=tmp_path / "it's a folder, & more", **AWKWARD[name])
    check([installed / ".venv/bin/mypy", "app/defaults.py"], project)


# Texts go through the same places, so these stand for all; test_awkward.py has looked at each.
@pytest.mark.parametrize(
    ("texts", "numbers", "database"),
    [
        ("quotes", "smallest numbers", "sqlite"),
        ("syntax", "largest numbers", "sqlite"),
        # The slug names the database, the application and a lock; the smallest numbers leave a pool of one.
        ("forty characters", "smallest numbers", "postgres"),
    ],
)
def test_the_suite_of_awkward_answers(
    installed: Path,
    bake: Bake,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    texts: str,
    numbers: str,
    database: str,
):
    """Nothing in the suite depends on the answers, nor on the order of the tests: it is random, and two run at once. It
    does not see either what is set in the shell that runs it. It goes with pytest-flask, which is beside it in one."""
    project = bake(into=tmp_path / "it's a folder, & more", **AWKWARD[texts], **AWKWARD[numbers])
    beside = [with_pytest_flask(tmp_path / "pytest-flask")] if texts == "syntax" else []
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (INSIDE, *beside))))
    for variable, value in SHELL.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.setenv("SEED", str(SEED))
    pytest_ = [installed / ".venv/bin/python", "-m", "pytest", "-n", "2", "-p", "shuffled"]
    print(f"SEED={SEED}")  # shown where it fails; in the environment, it repeats the run
    (run,) = results(check([*pytest_, "--database", database], project))
    assert set(run) <= {"passed", "deselected"}


def pythons() -> dict[str, str]:
    """Find every Python from 3.11 on, by its version: on the PATH, and where pyenv and uv keep them."""
    home = Path.home()
    folders = [Path(folder) for folder in os.environ["PATH"].split(os.pathsep)]
    pyenv = Path(os.environ.get("PYENV_ROOT", home / ".pyenv"))
    if os.access(pyenv, os.R_OK | os.X_OK):
        folders += pyenv.glob("versions/*/bin")
    folders += home.glob(".local/share/uv/python/*/bin")
    found = {}
    folders = [folder for folder in folders if os.access(folder, os.R_OK | os.X_OK)]
    for path in sorted({path for folder in folders for path in folder.glob("python3.[0-9]*")}):
        if re.fullmatch(r"python3\.\d+", path.name) and int(path.name.partition(".")[2]) >= OLDEST:
            asked = subprocess.run([path, "-c", ASKED], capture_output=True, text=True, timeout=60, check=False)
            if asked.returncode == 0:  # a shim of pyenv's may lead nowhere
                found[asked.stdout.strip()] = str(path)
    return found


OLDEST = 11
ASKED = "import sys, ssl, sqlite3; print('%d.%d' % sys.version_info[:2])"
OTHERS = {version: path for version, path in pythons().items() if int(version[2:]) != sys.version_info.minor}


@pytest.mark.parametrize("version", sorted(OTHERS, key=lambda version: int(version.partition(".")[2])))
def test_the_suite_on_every_python(bake: Bake, tmp_path: Path, version: str):
    """The Python that runs these tests has run the suite above; so do all others that are here, on SQLite."""
    project = bake(into=tmp_path)
    output = check(["make", "test-sqlite", f"PYTHON={OTHERS[version]}"], project)
    assert f"{version}." in check([project / ".venv/bin/python", "--version"], project)
    (run,) = results(output)
    assert set(run) <= {"passed", "deselected"}, output


def test_the_python_of_the_image_is_one_of_them(template: Path):
    """Where the Dockerfile's Python is on the machine, it is found."""
    wanted = json.loads((template / "cookiecutter.json").read_text())["_python_version"]
    there = [path for path in (Path.home() / ".pyenv" / "versions").glob(f"{wanted}.*") if path.is_dir()]
    assert not there or wanted in pythons()


@pytest.fixture(scope="module")
def with_the_librarys_tests(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The installed project, with the tests of the library beside its own, and what these need besides, as it is pinned
    for the template's own tests."""
    with_hypothesis(installed / ".venv")
    project = tmp_path_factory.mktemp("library") / "my_service"
    shutil.copytree(installed, project, ignore=shutil.ignore_patterns(".venv", "instance"))
    (project / ".venv").symlink_to(installed / ".venv")
    shutil.copytree(LIBRARY, project / "tests" / "library")
    return project


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_the_librarys_suite(with_the_librarys_tests: Path, database: str):
    """Its own tests, on both databases; ruff and mypy --strict look at them as well."""
    python = with_the_librarys_tests / ".venv" / "bin" / "python"
    suite = [python, "-m", "pytest", "tests/library", "--database", database, "-n", "2"]
    for need in missing().values() if "LEAVE_NOTHING_OUT" not in os.environ else ():
        suite += [f"--deselect=tests/{test}" for test in need.tests if test.startswith("library/")]
    (run,) = results(check(suite, with_the_librarys_tests))
    assert set(run) <= {"passed", "deselected"}
    if database == "sqlite":
        check(["make", "lint", "typecheck"], with_the_librarys_tests)


MANY_PLANS = """
import sys
sys.path.insert(0, ".")
import hypothesis
from tests.library import test_sizing
many = hypothesis.settings(max_examples=1000, deadline=None, database=None, derandomize=False, print_blob=True)
for name in sorted(vars(test_sizing)):
    test = getattr(test_sizing, name)
    if hasattr(test, "hypothesis"):
        print(name)
        hypothesis.seed(int(sys.argv[1]))(many(test))()
"""


def test_the_promises_hold_over_3_000_plans(with_the_librarys_tests: Path):
    """The library's suite tries a hundred of each; here it is a thousand, by another seed each time."""
    project = with_the_librarys_tests
    print(f"SEED={SEED}")
    checked = check([project / ".venv/bin/python", "-c", MANY_PLANS, str(SEED)], project).split()
    assert len(checked) == 3
