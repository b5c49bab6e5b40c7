"""PgBouncer and TLS as in the project's docs/connection-pooling.md: each error, and the settings.

tests/inside/guide.py makes all the other errors happen. Those that it leaves to this file are listed
there, and compared here.
"""

import ast
import contextlib
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import psycopg
import pytest

from chaos.harness import (
    DATABASE,
    ROLE,
    Postgres,
    Project,
    end,
    free_port,
    listens,
    open_folder,
    unprivileged,
    wait_for,
)

PGBOUNCER = shutil.which("pgbouncer") or shutil.which("/usr/sbin/pgbouncer")


@contextlib.contextmanager
def pooler(postgres: Postgres, **settings: object) -> Iterator[str]:
    """Run a PgBouncer with these settings; yields the URL of the service's database through it."""
    if not PGBOUNCER:
        pytest.fail("PgBouncer is not installed: apt-get install pgbouncer")
    folder, port = open_folder("pb-"), free_port()
    ours = {
        "listen_addr": "127.0.0.1",
        "listen_port": port,
        "unix_socket_dir": "",
        "auth_type": "any",
        "admin_users": ROLE,
        "logfile": folder / "log",
        "pool_mode": "transaction",
    }
    lines = [f"{name} = {value}" for name, value in (ours | settings).items()]
    database = f"{DATABASE} = host={postgres.host} port={postgres.port} user={ROLE}"
    (folder / "pgbouncer.ini").write_text("\n".join(["[databases]", database, "[pgbouncer]", *lines, ""]))
    process = subprocess.Popen(
        [PGBOUNCER, "-q", folder / "pgbouncer.ini"], **unprivileged(), cwd="/", stderr=subprocess.DEVNULL
    )
    try:
        wait_for(lambda: listens(port), 120, "PgBouncer")
        yield f"postgresql://{ROLE}@127.0.0.1:{port}/{DATABASE}"
    finally:
        end(process, signal.SIGINT)
        shutil.rmtree(folder, ignore_errors=True)


def error_of(action: Callable[[], object]) -> str:
    with pytest.raises(psycopg.Error) as caught:
        action()
    return str(caught.value)


def startup_options(postgres: Postgres) -> str:
    with pooler(postgres) as url:
        return error_of(lambda: psycopg.connect(url, options="-c statement_timeout=15000"))


def no_server_connection_in_time(postgres: Postgres) -> str:
    with (
        pooler(postgres, default_pool_size=1, query_wait_timeout=1) as url,
        psycopg.connect(url) as holder,
        psycopg.connect(url) as waiter,
    ):
        holder.execute("select 1")  # and the transaction stays open
        return error_of(lambda: waiter.execute("select 1"))


def too_many_clients(postgres: Postgres) -> str:
    with pooler(postgres, max_client_conn=1) as url, psycopg.connect(url):
        return error_of(lambda: psycopg.connect(url))


def prepared_on_a_shared_connection(postgres: Postgres) -> str:
    with (
        pooler(postgres, default_pool_size=1) as url,
        psycopg.connect(url, autocommit=True) as one,
        psycopg.connect(url, autocommit=True) as other,
    ):
        one.execute("select 1", prepare=True)
        return error_of(lambda: other.execute("select 1", prepare=True))


# A process of its own, since this one has threads, which a fork would leave behind.
SHARED = """
import os, sys, psycopg
connection = psycopg.connect(sys.argv[1], sslmode="require", autocommit=True)
if os.fork() == 0:
    connection.execute("select 'the child'")
    os._exit(0)
os.wait()
connection.execute("select 'the parent'")
"""


def tls_shared_after_a_fork(postgres: Postgres) -> str:
    """Let PgBouncer speak TLS, which the server of the wheel cannot."""
    folder = open_folder("tls-")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    subprocess.run([*command, "-keyout", key, "-out", certificate], **unprivileged(), capture_output=True, check=True)
    tls = {"client_tls_sslmode": "require", "client_tls_key_file": key, "client_tls_cert_file": certificate}
    try:
        with pooler(postgres, **tls) as url:
            done = subprocess.run([sys.executable, "-c", SHARED, url], capture_output=True, text=True, check=False)
    finally:
        shutil.rmtree(folder)
    return done.stderr


PROVOKED = {
    "SSL error: decryption failed or bad record mac": tls_shared_after_a_fork,
    "unsupported startup parameter: options": startup_options,
    "query_wait_timeout": no_server_connection_in_time,
    "no more connections allowed (max_client_conn)": too_many_clients,
    'prepared statement "_pg3_0" already exists': prepared_on_a_shared_connection,
}
# A forked connection provokes it as well, so that the project's own tests can.
IN_BOTH = {'prepared statement "_pg3_0" already exists'}


@pytest.fixture(scope="module")
def document(baked: Project) -> str:
    return (baked.folder / "docs" / "connection-pooling.md").read_text()


@pytest.mark.parametrize("message", PROVOKED)
def test_errors(message: str, document: str, postgres: Postgres) -> None:
    """The document quotes the very words of PgBouncer, the server or the driver."""
    assert f"\n| `{message}` |" in document
    text = PROVOKED[message](postgres)
    assert message in text, text


def test_none_is_left_out(baked: Project) -> None:
    """The errors that the project's tests leave to the template are provoked here."""
    tests = ast.parse((Path(__file__).parents[1] / "inside" / "guide.py").read_text())
    (left,) = (
        ast.literal_eval(node.value)
        for node in tests.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "PROVOKED_BY_THE_TEMPLATE"
    )
    assert left == PROVOKED.keys() - IN_BOTH


def test_the_settings_in_the_document(document: str, postgres: Postgres) -> None:
    """PgBouncer takes the block as it stands, and the service's database answers through it."""
    (block,) = re.findall(r"^```ini\n(.*?)^```$", document, re.MULTILINE | re.DOTALL)
    ini = ConfigParser()
    ini.read_string(block)
    shown: dict[str, Any] = dict(ini["pgbouncer"])
    with pooler(postgres, **shown) as url:
        with psycopg.connect(url, prepare_threshold=None) as connection:
            assert connection.execute("select count(*) from notes").fetchone() == (0,)
        with psycopg.connect(url.replace(f"/{DATABASE}", "/pgbouncer"), autocommit=True) as console:
            rows = psycopg.ClientCursor(console).execute("show config").fetchall()
    in_force = {row[0]: row[1] for row in rows}
    assert {name: in_force[name] for name in shown} == shown
