"""Fixtures: the template, and projects that it bakes.

The template is tested in a clean copy, so that neither a checkout's leftovers reach a bake nor a bake's the checkout.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from baking import ROOT, SCRATCH, Bake, Run
from cookiecutter.main import cookiecutter
from needs import NEEDS, PATH, missing, needed_by

HERE = Path(__file__).parent
# What is loaded from the template's copy must leave nothing there that would be baked.
sys.dont_write_bytecode = True

# mypy looks at the same packages again and again: each process of the tests has one cache for it.
if "MYPY_CACHE_DIR" in os.environ:
    os.environ["MYPY_CACHE_DIR"] += os.environ.get("PYTEST_XDIST_WORKER", "")

# How long an example takes is the machine's affair.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


# The library's tests run inside a baked project: test_generated.py takes them there.
collect_ignore = ["inside", "library"]

LEFT_OUT = pytest.StashKey[dict[str, list[str]]]()  # the tests by what they lack


def pytest_configure(config: pytest.Config) -> None:
    # A shell ignores Ctrl-C in what it starts in the background, and all that is started from there would, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "LEAVE_NOTHING_OUT" in os.environ:
        return
    lacking, left_out = missing(), config.stash.setdefault(LEFT_OUT, {})
    if any(item.name.startswith("test_the_librarys_suite[") for item in items):
        for tool, need in lacking.items():
            left_out.setdefault(tool, []).extend(test for test in need.tests if test.startswith("library/"))
    for item in items[:]:
        test = f"{item.path.relative_to(HERE).as_posix()}::{item.name}"
        if tools := needed_by(test, lacking):
            items.remove(item)
            config.hook.pytest_deselected(items=[item])
            for tool in tools:
                left_out.setdefault(tool, []).append(test)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # of pytest-xdist, whose workers collect the tests
        session.config.workeroutput["left_out"] = session.config.stash.get(LEFT_OUT, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", {})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    left_out = config.stash.get(LEFT_OUT, {})
    if left_out:
        terminalreporter.section("left out, since something is not here")
    for tool, tests in left_out.items():
        files = {test.partition("::")[0] for test in tests}
        whole = files & {*NEEDS[tool].tests}
        names = whole | {test.partition("[")[0] for test in tests if test.partition("::")[0] not in whole}
        terminalreporter.write_line(f"{tool}: {len(tests)} tests, {', '.join(sorted(names))}. {NEEDS[tool].remedy}")


@pytest.fixture(scope="session", autouse=True)
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The user's own settings for cookiecutter, git and make stay out of the tests, and the tests out of the user's."""
    folder = tmp_path_factory.mktemp("home")
    settings = folder / "cookiecutter.yaml"
    settings.write_text(f"cookiecutters_dir: {folder / 'templates'}\nreplay_dir: {folder / 'replay'}\n")
    gitconfig = folder / "gitconfig"
    gitconfig.write_text("[user]\nname = Tester\nemail = tester@example.org\n[init]\ndefaultBranch = main\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COOKIECUTTER_CONFIG", str(settings))
        patch.setenv("GIT_CONFIG_GLOBAL", str(gitconfig))
        patch.setenv("GIT_CONFIG_NOSYSTEM", "1")
        patch.setenv("PATH", PATH)
        for name in ("ARGS", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", "PYTHONDONTWRITEBYTECODE"):
            patch.delenv(name, raising=False)
        yield
    # As root, a project keeps its Postgres in /var/tmp where nobody else may enter the project's folder.
    for place, folders, _ in os.walk(tmp_path_factory.getbasetemp()):
        data = Path(place, "postgres")
        if data.name in folders and data.is_symlink():
            elsewhere = data.resolve()
            shutil.rmtree(elsewhere, ignore_errors=True)
            elsewhere.with_name(f"{elsewhere.name}.log").unlink(missing_ok=True)
        folders[:] = [each for each in folders if each != ".venv"]


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of this template."""
    return shutil.copytree(
        ROOT, tmp_path_factory.mktemp("template") / "flask-pooling", ignore=shutil.ignore_patterns(*SCRATCH)
    )


@pytest.fixture(scope="session")
def bake(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Bake:
    """Bake a project, into a new folder or the one given, and return where it is."""

    def bake(into: Path | None = None, **answers: str) -> Path:
        into = into or tmp_path_factory.mktemp("baked")
        return Path(cookiecutter(str(template), no_input=True, extra_context=answers, output_dir=str(into)))

    return bake


@pytest.fixture(scope="session")
def project(bake: Bake) -> Path:
    """The project that the defaults bake. Read only: what writes into one bakes its own."""
    return bake()


@pytest.fixture(scope="session")
def installed(bake: Bake, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project that the defaults bake after `make install`, in a folder with a space. It may be run, not changed.

    pytest-xdist's workers share one installation, and each has a project of its own: a service that one of them starts
    is not in the way of another's.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    first, unused = shared / "in a folder" / "my_service", shared / "unused"
    with (shared / "installed.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not unused.exists():
            first.parent.mkdir()
            bake(into=first.parent)
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where uv is, which is faster
            subprocess.run(["make", "install"], cwd=first, env=os.environ | {"PATH": path}, timeout=1200, check=True)
            copy_of(first, unused)
            return first
    return copy_of(unused, tmp_path_factory.mktemp("in a folder") / "my_service")


def copy_of(project: Path, into: Path) -> Path:
    """Copy an installed project, which shares its .venv with the copy."""
    shutil.copytree(project, into, ignore=shutil.ignore_patterns(".venv", "instance"))
    (into / ".venv").symlink_to((project / ".venv").resolve())
    return into


@pytest.fixture
def copy(installed: Path, tmp_path: Path) -> Path:
    """The installed project once more, to be changed."""
    return copy_of(installed, tmp_path / "my_service")


@pytest.fixture(scope="session")
def cli(template: Path) -> Run:
    """The real command: `cookiecutter ARGS...`, in the folder that is given."""

    def cli(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cookiecutter", *map(str, args)]
        env = os.environ | {"PWD": str(cwd)}
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False)

    return cli
