"""What stands around the app and repeats it: README.md, .env.example, the Makefile, the container files. They agree."""

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import serving

from app import config, defaults

pytestmark = pytest.mark.sqlite  # no database in it: once is enough

ROOT = Path(__file__).parent.parent
TABLE_ROW = re.compile(r"^\| `([A-Z_]+)` \| (.+?) \| (.+) \|$", re.MULTILINE)
BAKED = {"APP_INSTANCES": defaults.INSTANCES, "DB_MAX_CONNECTIONS": defaults.MAX_CONNECTIONS}


def text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def schema_defaults() -> dict[str, str]:
    """Every variable with its default as one writes it; nothing where there is none, or the plan decides."""
    loaded = {name: field.load_default for name, field in config.EnvSchema().fields.items()}
    return {
        name: "" if default is None else f"{default:g}" if isinstance(default, float) else str(default)
        for name, default in loaded.items()
    }


def targets() -> list[str]:
    """What `make` can be asked for."""
    phony = re.search(r"^\.PHONY: (.+)$", text("Makefile"), re.MULTILINE)
    assert phony
    return phony[1].split()


def make(*args: str) -> subprocess.CompletedProcess[str]:
    inherited = ("MAKEFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "MFLAGS")  # from the `make test` that runs this
    environ = {name: value for name, value in os.environ.items() if name not in inherited}
    return subprocess.run(["make", *args], cwd=ROOT, env=environ, capture_output=True, text=True, check=False)


def test_env_example_is_every_default() -> None:
    """The commented lines of .env.example are all variables with exactly their defaults, and there are no others."""
    assert dict(re.findall(r"^# ([A-Z_]+)=(.*)$", text(".env.example"), re.MULTILINE)) == schema_defaults()
    assert [line for line in text(".env.example").splitlines() if line and not line.startswith("# ")] == []


@pytest.mark.parametrize("name", ["README.md", "app/config.py"])
def test_table_of_variables(name: str) -> None:
    """The table lists all variables in the schema's order, each with its default."""
    rows = TABLE_ROW.findall(text(name))
    defaults_of = schema_defaults()
    assert [variable for variable, _, _ in rows] == list(defaults_of)
    for variable, default, _ in rows:
        if variable in BAKED:
            assert (default, defaults_of[variable]) == ("baked", str(BAKED[variable]))
        elif defaults_of[variable]:
            assert default == defaults_of[variable]
        else:
            assert " " in default, f"{variable} has no default in the schema, so the table has to say where it is from"


def test_tables_are_the_same() -> None:
    """README.md and the module that parses the variables say the same of each."""
    assert TABLE_ROW.findall(text("README.md")) == TABLE_ROW.findall(text("app/config.py"))


def test_help_lists_every_target() -> None:
    """`make` alone names every target, with what it does."""
    listed = re.findall(r"^  make ([a-z-]+) +\S", make().stdout, re.MULTILINE)
    assert listed == targets()


def test_every_target_can_be_made() -> None:
    """Nothing that a target needs is missing from the Makefile."""
    planned = make("--dry-run", *targets(), "m=what changed")
    assert planned.returncode == 0, planned.stderr


@pytest.mark.parametrize("name", ["README.md", ".github/workflows/ci.yml"])
def test_named_targets_exist(name: str) -> None:
    """Whatever is said of `make SOMETHING` can be made."""
    named = re.findall(r"(?:`|\$ |run: |=\S+ )make ([a-z-]+(?: [a-z-]+(?![a-z=-]))*)", text(name))
    assert named
    assert {target for words in named for target in words.split()} <= set(targets())


def test_named_files_exist() -> None:
    """Every path that README.md names is there."""
    folder, file = r"(?:app|docs|migrations|requirements|scripts|tests)/[\w./-]*", r"[\w.-]+\.(?:py|yaml|toml)"
    named = re.findall(rf"`({folder}|{file})`", text("README.md"))
    assert len(named) > 10
    assert [path for path in named if not (ROOT / path).exists()] == []


def test_compose_has_the_baked_numbers() -> None:
    """The server, the fleet and the plan get the same two numbers, and a copy may finish before it is killed."""
    compose = text("compose.yaml")
    for place in ("APP_INSTANCES: ", "replicas: ", "DB_MAX_CONNECTIONS: ", '"max_connections='):
        variable = "APP_INSTANCES" if place in {"APP_INSTANCES: ", "replicas: "} else "DB_MAX_CONNECTIONS"
        assert f"{place}$" + "{" + f"{variable}:-{BAKED[variable]}" + "}" in compose
    grace = re.findall(r"^  app:.*?stop_grace_period: (\d+)s$", compose, re.MULTILINE | re.DOTALL)
    assert int(grace[0]) > int(schema_defaults()["WEB_GRACEFUL_TIMEOUT"])


def test_secrets_have_no_default() -> None:
    """Nothing that starts the service comes with a secret in it."""
    for name in ("compose.yaml", "Dockerfile", ".env.example"):
        given = re.findall(r"(?:SECRET_KEY|PASSWORD)(?:=|: )(.*)$", text(name), re.MULTILINE)
        assert [value for value in given if value and not value.startswith(("${", "$(openssl"))] == []
    for variable in ("SECRET_KEY", "POSTGRES_PASSWORD"):
        used = text("compose.yaml").count("${" + variable)
        assert used == text("compose.yaml").count("${" + variable + ":?") > 0


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    """Answers /readyz with its `status`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(stub.status if self.path == "/readyz" else 404)  # type: ignore[attr-defined]
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as stub:
        thread = threading.Thread(target=stub.serve_forever, args=(0.01,))
        thread.start()
        yield stub
        stub.shutdown()
        thread.join()


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1), (500, 1), (404, 1)])
def test_container_is_as_healthy_as_it_says(
    server: ThreadingHTTPServer, tmp_path: Path, status: int, code: int
) -> None:
    """The image's health check passes on a 200 alone. Docker knows no other codes than 0 and 1."""
    server.status = status  # type: ignore[attr-defined]
    assert health_check(server.server_port, tmp_path) == code


def test_container_that_does_not_answer_is_unhealthy(server: ThreadingHTTPServer, tmp_path: Path) -> None:
    """Nor is nobody at home healthy."""
    port = server.server_port
    server.server_close()
    assert health_check(port, tmp_path) == 1


def health_check(port: int, folder: Path) -> int:
    command = re.search(r"^HEALTHCHECK .*?CMD (\[.+?\])$", text("Dockerfile"), re.MULTILINE | re.DOTALL)
    assert command
    return serving.run(json.loads(command[1]), {"WEB_PROBE_PORT": str(port)}, folder).returncode


def test_pre_commit_runs_the_tools_of_the_venv() -> None:
    """Each hook's program is one that requirements/dev.txt installs, so its version stands nowhere else."""
    tools = re.findall(r"entry: \.venv/bin/(\S+)", text(".pre-commit-config.yaml"))
    assert tools == ["ruff", "ruff", "mypy"]
    for tool in tools:
        assert re.search(rf"^{tool}==", text("requirements/dev.txt"), re.MULTILINE)
        assert shutil.which(tool, path=str(Path(sys.executable).parent))
