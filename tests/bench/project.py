"""The base of everything here: a baked project, compiled, and a real Postgres for it, on TCP as in production."""

import contextlib
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import psycopg

HERE = Path(__file__).parent
TEMPLATE = HERE.parent.parent
CANDIDATES = HERE / "candidates"
TOOLS = Path(sys.executable).parent
DATABASE = "bench"
ROWS = 1000
MAX_CONNECTIONS = 200  # all candidates are connected at the same time, one of them at work
# The disk is not what is compared, and it is the noisiest part of a machine.
SERVER_SETTINGS = {"listen_addresses": "127.0.0.1", "fsync": "off", "autovacuum": "off", "timezone": "UTC"}
SEED = f"""
    truncate notes restart identity;
    insert into notes (title, body, created_at, updated_at)
    select 'The title of note ' || n, repeat('word ', 40), timestamptz '2026-01-01' + n * interval '1 minute',
           timestamptz '2026-01-01' + n * interval '1 minute'
    from generate_series(1, {ROWS}) as n;
"""  # noqa: S608


# What the largest page consists of: 100 notes, each of the most characters, of the most bytes.
LONGEST = """
    insert into notes (title, body, created_at, updated_at)
    select repeat('\U0001f35e', 200), repeat('\U0001f35e', 10000), now(), now() from generate_series(1, 100)
"""


@dataclass(frozen=True)
class Project:
    """A baked project and the Postgres that belongs to it."""

    folder: Path
    port: int
    admin: psycopg.Connection

    def url(self, role: str = "app", port: int | None = None) -> str:
        return f"postgresql://{role}@127.0.0.1:{port or self.port}/{DATABASE}"

    def environ(self, **more: str) -> dict[str, str]:
        """Return production's environment, on the defaults; nothing of this shell's reaches a candidate by accident."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "LC_ALL") if name in os.environ}
        production = {"APP_ENV": "production", "SECRET_KEY": "0123456789abcdef" * 4, "DATABASE_URL": self.url()}
        return kept | production | {"PYTHONHASHSEED": "0"} | more

    def run(self, *command: str | Path, **environ: str) -> str:
        """Run a command in the project, and return its output; the first word is one of the environment's programs."""
        return subprocess.run(
            [TOOLS / command[0], *command[1:]],
            cwd=self.folder,
            env=self.environ(**environ),
            check=True,
            capture_output=True,
            text=True,
        ).stdout

    def plan(self) -> dict[str, int]:
        return json.loads(self.run("flask", "pool", "plan", "--json"))

    def reset(self) -> None:
        """Restore the same rows for everybody."""
        self.admin.execute(SEED)
        self.admin.execute("analyze notes")

    def role(self, name: str) -> str:
        """Make a role of one candidate's own, so that its connections can be told from the others'."""
        role = f"bench_{name}".replace("-", "_")
        if not self.admin.execute("select from pg_roles where rolname = %s", [role]).rowcount:
            self.admin.execute(f"create role {role} login in role app")
        return role

    def held(self, role: str) -> int:
        return self.admin.execute("select count(*) from pg_stat_activity where usename = %s", [role]).fetchone()[0]

    def opened(self) -> int:
        """Count the connections since the server started. Its statistics are half a second behind."""
        return self.admin.execute("select sessions from pg_stat_database where datname = %s", [DATABASE]).fetchone()[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def baked() -> Iterator[Project]:
    """Bake a project from the template's defaults in a scratch folder, with Postgres running, migrated and filled."""
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        Path(scratch).chmod(0o711)  # Postgres may have to run as another user
        folder = bake(TEMPLATE, Path(scratch) / "baked")
        for app in CANDIDATES.glob("baked*.py"):
            shutil.copy(app, folder)
        subprocess.run([sys.executable, "-m", "compileall", "-q", folder], env={}, check=True)
        with postgres(folder, Path(scratch) / "postgres") as (port, admin):
            project = Project(folder, port, admin)
            project.run("flask", "db", "upgrade")
            project.reset()
            yield project


def bake(template: Path, into: Path, under: Sequence[str] = ()) -> Path:
    command = [sys.executable, TOOLS / "cookiecutter", template, "--no-input", "--default-config", "--output-dir", into]
    subprocess.run([*under, *command], check=True, capture_output=True)
    return next(into.iterdir())


@contextlib.contextmanager
def postgres(folder: Path, data: Path) -> Iterator[tuple[int, psycopg.Connection]]:
    """Run a Postgres as the project does, with a port besides its socket."""
    port = free_port()
    running = load(folder / "scripts" / "postgres.py").running
    with (
        running(data, DATABASE, max_connections=MAX_CONNECTIONS, settings=SERVER_SETTINGS | {"port": str(port)}),
        psycopg.connect(f"postgresql://postgres@127.0.0.1:{port}/{DATABASE}", autocommit=True) as admin,
    ):
        yield port, admin


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"baked_{path.stem}", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
