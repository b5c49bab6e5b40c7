"""The baked files: these and only these, as a careful engineer would have typed them."""

import json
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
from baking import PROJECT, files

BAKED = [
    ".dockerignore",
    ".env.example",
    ".gitattributes",
    ".github/dependabot.yml",
    ".github/workflows/ci.yml",
    ".github/workflows/image.yml",
    ".gitignore",
    ".pre-commit-config.yaml",
    "AGENTS.md",
    "Dockerfile",
    "Makefile",
    "Procfile",
    "README.md",
    "app/__init__.py",
    "app/config.py",
    "app/defaults.py",
    "app/errors.py",
    "app/extensions.py",
    "app/home.py",
    "app/logs.py",
    "app/models.py",
    "app/notes.py",
    "app/middleware.py",
    "app/static/style.css",
    "app/templates/index.html",
    "compose.yaml",
    "requirements.txt",
    "deploy/kubernetes/deployment.yaml",
    "deploy/kubernetes/hpa.yaml",
    "deploy/kubernetes/kustomization.yaml",
    "deploy/kubernetes/migrate.yaml",
    "deploy/kubernetes/pdb.yaml",
    "deploy/kubernetes/service.yaml",
    "deploy/monitoring/alerts.yml",
    "deploy/monitoring/grafana/dashboard.json",
    "deploy/monitoring/prometheus.yml",
    "deploy/nginx/app.conf.template",
    "deploy/nginx/http.conf.template",
    "deploy/nginx/https.conf.template",
    "deploy/pgbouncer/pgbouncer.ini",
    "deploy/systemd/web.service",
    "deploy/systemd/web.socket",
    "docs/connection-pooling.md",
    "docs/deploy.md",
    "docs/jobs.md",
    "docs/metrics.md",
    "docs/recipes.md",
    "gunicorn.conf.py",
    "locustfile.py",
    "migrations/alembic.ini",
    "migrations/__init__.py",
    "migrations/env.py",
    "migrations/writing.py",
    "migrations/script.py.mako",
    "migrations/versions/0001_notes.py",
    "flask_pooling/RECORD",
    "flask_pooling/__init__.py",
    "flask_pooling/__main__.py",
    "flask_pooling/budget.py",
    "flask_pooling/cli.py",
    "flask_pooling/engine.py",
    "flask_pooling/errors.py",
    "flask_pooling/extension.py",
    "flask_pooling/health.py",
    "flask_pooling/fleet.py",
    "flask_pooling/holds.py",
    "flask_pooling/gunicorn.py",
    "flask_pooling/version.py",
    "flask_pooling/watchdog.py",
    "flask_pooling/machine.py",
    "flask_pooling/metrics.py",
    "flask_pooling/options.py",
    "flask_pooling/page.py",
    "flask_pooling/py.typed",
    "flask_pooling/probes.py",
    "flask_pooling/process.py",
    "flask_pooling/middleware.py",
    "flask_pooling/settings.py",
    "flask_pooling/sizing.py",
    "flask_pooling/statements.py",
    "flask_pooling/templates/flask_pooling/pool.html",
    "flask_pooling/urls.py",
    "pyproject.toml",
    "requirements/dev.in",
    "requirements/dev.txt",
    "requirements/load.in",
    "requirements/load.txt",
    "requirements/lock",
    "requirements/prod.in",
    "requirements/prod.txt",
    "scripts/__init__.py",
    "scripts/migrate.py",
    "scripts/postgres.py",
    "scripts/prod.py",
    "wsgi.py",
]
# Files whose own braces are not the template's: they are copied, not rendered.
BRACED = re.compile(r"\.github/|flask_pooling/|app/templates/|docs/recipes|migrations/script|deploy/|tests/")
# Split, so that this file does not hold what it looks for.
OPENING = ("{" + "{", "{" + "%", "{" + "#")


@pytest.fixture(scope="module")
def texts(project: Path) -> dict[str, str]:
    """Every baked file, as text. There is no other kind: this fails on one that is not."""
    return {name: text.decode() for name, text in files(project).items()}


def test_these_files_and_only_these(texts: dict[str, str]):
    """The exact list of what a bake leaves, tests apart."""
    baked = {name for name in texts if not name.startswith("tests/")}
    assert {"missing": set(BAKED) - baked, "not listed": baked - set(BAKED)} == {"missing": set(), "not listed": set()}


def test_one_test_file_a_module(texts: dict[str, str]):
    """The suite is files that pytest collects, and what they share."""
    tests = [Path(name).name for name in texts if name.startswith("tests/")]
    assert "conftest.py" in tests
    assert [name for name in tests if not re.fullmatch(r"\w+\.py", name)] == []


def test_no_braces_are_left(texts: dict[str, str]):
    """Nothing unrendered is left in a file, or in the name of one."""
    for name, text in texts.items():
        assert not any(brace in name for brace in OPENING)
        if not BRACED.match(name):
            assert [line for line in text.splitlines() if any(brace in line for brace in OPENING)] == [], name
            assert "cookiecutter." not in text, name


def test_nothing_is_conditional(template: Path):
    """Every bake has the same content: the template has no `if` and no loop."""
    copied = json.loads((template / "cookiecutter.json").read_text())["_copy_without_render"]
    for path in (template / PROJECT).rglob("*"):
        name = path.relative_to(template / PROJECT)
        if path.is_file() and not any(fnmatch(str(name), pattern) for pattern in copied):  # as cookiecutter does
            assert not re.search(r"\{%-?\s*(if|elif|else|for|macro|include|import)\b", path.read_text()), name


def test_as_a_careful_engineer_types(texts: dict[str, str]):
    """Unix line ends, one at the end, no trailing space, no tab but in a Makefile, and no runs of blank lines."""
    for name, text in texts.items():
        if not text:
            assert name.endswith(("__init__.py", "py.typed")), name
            continue
        assert "\r" not in text, name
        assert re.search(r"[^\n]\n\Z", text), f"{name} does not end with one newline"
        assert not text.startswith("\n"), name
        assert not re.search(r"[ \t]$", text, re.MULTILINE), f"{name} has trailing space"
        assert name == "Makefile" or "\t" not in text, f"{name} has a tab"
        most = 2 if name.endswith((".py", ".py.mako")) else 1
        prose = re.sub(r"^```python$.*?^```$", "code", text, flags=re.DOTALL | re.MULTILINE)
        assert "\n" * (most + 2) not in prose, f"{name} has more than {most} blank lines in a row"


def test_nothing_of_this_machine(texts: dict[str, str], template: Path, project: Path):
    """No path of the machine that baked, and no address of a package index."""
    places = {str(template), str(project.parent), f"{Path.home()}/"}
    for name, text in texts.items():
        assert not any(place in text for place in places), name
        assert not re.search(r"--(extra-)?index-url|--find-links|--trusted-host|://\S+/simple\b", text), name


def test_modules_say_what_they_are_for(texts: dict[str, str]):
    """Every Python file that holds code begins with a docstring."""
    for name, text in texts.items():
        if name.endswith(".py") and text:
            assert text.startswith(('"""', "#!")), name


def test_executables(project: Path):
    """A zip loses the executable bit, so nothing may need it but what also runs without: `sh requirements/lock`."""
    executable = [name for name in files(project) if (project / name).stat().st_mode & 0o111]
    assert executable in ([], ["requirements/lock"])


def test_versions_live_once(template: Path, texts: dict[str, str]):
    """The versions of Python, Postgres and nginx are those of cookiecutter.json wherever they are rendered, and nowhere
    else."""
    asked = json.loads((template / "cookiecutter.json").read_text())
    python, postgres = asked["_python_version"], asked["_postgres_version"]
    assert set(re.findall(r"python:(\d+\.\d+)", texts["Dockerfile"])) == {python}
    for name in ("compose.yaml", ".github/workflows/ci.yml"):
        assert set(re.findall(r"postgres:(\d+)", texts[name])) <= {postgres}, name
    assert f"postgres:{postgres}" in texts["compose.yaml"]
    assert f"nginx:{asked['_nginx_version']}\n" in texts["compose.yaml"]
    assert set(re.findall(r"python-version: \W?(\d+\.\d+)", texts[".github/workflows/ci.yml"])) <= {python}
    for path in (template / PROJECT).rglob("*"):
        if path.is_file() and path.parent.name not in {"requirements", "workflows"}:
            assert not re.search(rf"python:{re.escape(python)}|postgres:{postgres}\b|nginx:[0-9]", path.read_text()), (
                path
            )
