"""The two packages: `app/` is yours, and `flask_pooling/` knows nothing of it."""

import ast
from pathlib import Path

import pytest

pytestmark = pytest.mark.sqlite  # no database in it: once is enough

ROOT = Path(__file__).parent.parent


def imported(module: Path) -> set[str]:
    """The top names of what a module imports, wherever in it."""
    nodes = list(ast.walk(ast.parse(module.read_text())))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "." for node in nodes if isinstance(node, ast.ImportFrom)]
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("module", sorted((ROOT / "flask_pooling").rglob("*.py")), ids=lambda path: path.name)
def test_the_machinery_imports_nothing_of_the_app(module: Path) -> None:
    """So that an update can replace the folder, and another app can copy it."""
    assert imported(module) & {"app", "scripts", "tests", "wsgi"} == set()
