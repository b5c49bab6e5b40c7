"""Two wings: `app/` is the owner's and small, `flask_pooling/` is the machinery and knows nothing of `app/`."""

import ast
import io
import tokenize
from pathlib import Path

import pytest
from chaos.sabotage import SABOTAGE
from record import version_module

# Lines of code, without comments and docstrings.
MOST_LINES = {
    "app": 470,
    "flask_pooling": 2400,
    "gunicorn.conf.py": 70,
    "scripts": 350,
    "tests": 950,  # the owner's; the library's are tests/library here
}
SILENT = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def modules(project: Path, name: str) -> list[Path]:
    path = project / name
    return sorted(path.rglob("*.py")) if path.is_dir() else [path]


def lines_of_code(path: Path) -> int:
    text = path.read_text()
    prose = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            ast.get_docstring(node, clean=False) is not None
        ):
            prose.update(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    code = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in SILENT:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code - prose)


def imported(path: Path) -> set[str]:
    """Return the packages that a module imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize(("name", "most"), MOST_LINES.items())
def test_sizes(project: Path, name: str, most: int):
    """A newcomer can read the whole of it."""
    counted = {str(path.relative_to(project)): lines_of_code(path) for path in modules(project, name)}
    assert counted
    assert sum(counted.values()) <= most, counted


def test_the_wall(project: Path):
    """`flask_pooling/` imports nothing that is around it, so that it can be copied into another app as it stands."""
    around = {path.stem for path in project.iterdir() if path.name != "flask_pooling"} | {"", "gunicorn_conf"}
    assert {"app", "wsgi", "scripts", "tests", "migrations"} <= around
    for path in modules(project, "flask_pooling"):
        assert imported(path) & around == set(), path.name


def test_the_record_of_the_library_is_current(project: Path):
    """`flask pool version` says "unmodified" of a project that was just made. After a change: `make record`."""
    recorded = dict(line.split()[::-1] for line in (project / "flask_pooling" / "RECORD").read_text().splitlines())
    assert recorded == version_module().hashes()


def test_the_factory_is_a_table_of_contents(project: Path):
    """`create_app` fits on a screen."""
    assert lines_of_code(project / "app" / "__init__.py") <= 45


@pytest.mark.parametrize("name", SABOTAGE)
def test_what_is_sabotaged_is_there(project: Path, name: str):
    """The full chaos suite takes each protection out; most of it is not a part of `make test`."""
    for path, line, _ in SABOTAGE[name]:
        assert (project / path).read_text().count(line) == 1, (path, line)
