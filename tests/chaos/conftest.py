"""One project for the whole suite, how long it runs, and the table at the end."""

import os
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chaos import harness
from chaos.sabotage import SABOTAGE

WIDTHS = (34, 36, 52, 46, 30)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="the full loads, minutes each")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "long: only in `make chaos`, since it takes long and proves only that another can fail"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if is_long(config):
        return
    left_out = [item for item in items if item.get_closest_marker("long")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not harness.TABLE or not (is_long(config) or "CHAOS_TABLE" in os.environ):
        return
    terminalreporter.section("chaos")
    for row in [("scenario", "load", "counted", "bar", "result"), *(result.row() for result in harness.TABLE)]:
        cells = [textwrap.wrap(cell, width) or [""] for cell, width in zip(row, WIDTHS, strict=True)]
        for line in range(max(map(len, cells))):
            columns = (
                (cell[line] if line < len(cell) else "").ljust(width) for cell, width in zip(cells, WIDTHS, strict=True)
            )
            terminalreporter.write_line("  ".join(columns).rstrip())


def is_long(config: pytest.Config) -> bool:
    return bool(config.getoption("--long", default=False))


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Return whether the full loads are to run."""
    return is_long(request.config)


@pytest.fixture(scope="session")
def baked(bake: Callable[..., Path], request: pytest.FixtureRequest) -> harness.Project:
    """Install the project of the defaults. CHAOS_VENV names an installed .venv to use instead of making one."""
    folder = bake()
    venv = Path(os.environ.get("CHAOS_VENV") or request.getfixturevalue("installed") / ".venv")
    for parent in {
        *folder.parents,
        *venv.parents,
    }:  # root's Postgres and PgBouncer run as others
        if not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)
    return harness.Project(folder, venv)


@pytest.fixture
def sabotaged(baked: harness.Project, tmp_path: Path) -> Callable[[str], harness.Project]:
    """The project with one protection taken out, by the name it has in sabotage.py."""
    return lambda name: baked.copy(tmp_path, SABOTAGE[name])


@pytest.fixture(scope="session")
def server(baked: harness.Project) -> Iterator[harness.Clusters]:
    """Makes Postgres servers."""
    clusters = harness.Clusters(baked)
    yield clusters
    clusters.remove()


@pytest.fixture
def postgres(server: harness.Clusters) -> Iterator[harness.Postgres]:
    """A server with 100 connections."""
    with server() as postgres:
        yield postgres
