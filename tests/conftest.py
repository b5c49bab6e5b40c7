"""How the tests get at the template and at what it bakes.

The template is tested in a clean copy, so that neither a checkout's leftovers reach a bake nor a bake's the checkout.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
from baking import ROOT, SCRATCH, Bake, Run
from cookiecutter.main import cookiecutter

# What is loaded from the template's copy must leave nothing there that would be baked.
sys.dont_write_bytecode = True

# How long an example takes is the machine's affair.
hypothesis.settings.register_profile("patient", deadline=None)
hypothesis.settings.load_profile("patient")


# The library's tests run inside a baked project: test_generated.py takes them there.
collect_ignore = ["library"]

# Network namespaces take root, and only root's Postgres runs as somebody else. As an ordinary user these are left out,
# and it is said; .ci/run leaves nothing out.
NEED_ROOT = ("test_vanish.py",)
LEFT_OUT = pytest.StashKey[int]()


def pytest_configure(config: pytest.Config) -> None:
    # A shell ignores Ctrl-C in what it starts in the background, and all that is started from there would, too.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "root: is about what happens as root")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.geteuid() == 0 or "LEAVE_NOTHING_OUT" in os.environ:
        return
    left_out = [item for item in items if item.path.name in NEED_ROOT or item.get_closest_marker("root")]
    config.stash[LEFT_OUT] = len(left_out)
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if count := config.stash.get(LEFT_OUT, 0):
        where = f"{', '.join(NEED_ROOT)} and test_first_hour.py"
        terminalreporter.write_line(f"left out, since they need root: {count} tests of {where}")


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
        patch.setenv("PATH", f"{os.environ['PATH']}{os.pathsep}/usr/sbin")  # pgbouncer; an ordinary user has it not
        for name in ("ARGS", "MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS", "PYTHONDONTWRITEBYTECODE"):
            patch.delenv(name, raising=False)
        yield


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
    """The project that the defaults bake after `make install`, in a folder with a space. It may be run, not changed."""
    project = bake(into=tmp_path_factory.mktemp("in a folder"))
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where uv is, which is faster
    subprocess.run(["make", "install"], cwd=project, env=os.environ | {"PATH": path}, timeout=600, check=True)
    return project


@pytest.fixture
def copy(installed: Path, tmp_path: Path) -> Path:
    """The installed project once more, to be changed."""
    project = shutil.copytree(installed, tmp_path / "my_service", ignore=shutil.ignore_patterns(".venv", "instance"))
    (project / ".venv").symlink_to(installed / ".venv")
    return project


@pytest.fixture(scope="session")
def cli(template: Path) -> Run:
    """The real command: `cookiecutter ARGS...`, in the folder that is given."""

    def cli(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "cookiecutter", *map(str, args)]
        env = os.environ | {"PWD": str(cwd)}
        return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=60, check=False)

    return cli
