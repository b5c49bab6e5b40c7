"""The blocks of docs/plan/, started with the real programs: each opens as much as the page says, and no more."""

import contextlib
import json
import os
import pwd
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromium
import psycopg
import pytest
from baking import ROOT
from serving import CLEAN, STARTING_SECONDS, free_port, postgres, run
from test_deploy import UV, listens, running, superuser, wait_for

PAGE = ROOT / "docs" / "plan" / "index.html"
# One instance of two workers with three threads, and a pool that is as large with its overflow.
PLAN = "instances=1&workers=2&threads=3&pool_size=2&max_overflow=1"
EACH, ALL = 3, 6  # connections of a worker, and of the instance
REQUESTS = 20  # at the same time, of which only as many may hold a connection as there are
LOCK = "select pg_advisory_xact_lock_shared(1)"
# An app around each block. A request takes a connection, or one to each database, and waits with it for the test.
FLASK = f"""
from flask import Flask
from sqlalchemy import text

app = Flask(__name__)

@app.get("/")
def hold():
    with engine.connect() as connection:
        connection.execute(text("{LOCK}"))
    return "held"
"""
FLASK_SQLALCHEMY = f"""
from sqlalchemy import text

@app.get("/")
def hold():
    with db.engines["bind1"].connect() as second:
        second.execute(text("select 1"))
        db.session.execute(text("{LOCK}"))
    return "held"
"""
FASTAPI = f"""
from fastapi import Response
from sqlalchemy import text

@app.get("/threads")
async def threads():
    return Response(str(current_default_thread_limiter().total_tokens))

@app.get("/")
def hold():
    with engine.connect() as connection:
        connection.execute(text("{LOCK}"))
    return "held"
"""
DJANGO = f"""
import os

os.environ["DJANGO_SETTINGS_MODULE"] = "settings"

from django.core.wsgi import get_wsgi_application
from django.db import connection, transaction
from django.http import HttpResponse
from django.urls import path

def hold(request):
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("{LOCK}")
    return HttpResponse("held")

app, urlpatterns = get_wsgi_application(), [path("", hold)]
"""
DJANGO_SETTINGS = """
SECRET_KEY, ALLOWED_HOSTS, ROOT_URLCONF = "for the test", ["127.0.0.1"], "main"
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[chromium.Page]:
    with chromium.opened() as page:
        yield page


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A venv with the frameworks."""
    venv = tmp_path_factory.mktemp("blocks") / "venv"
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, venv], check=True)
    lock = ["--require-hashes", "--requirement", ROOT / "requirements" / "blocks.txt"]
    install = [UV, "pip", "install", "--quiet", "--python", venv / "bin" / "python", *lock]
    subprocess.run(install, check=True, timeout=300)
    return venv / "bin"


@pytest.fixture(scope="module")
def server(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Postgres with the databases `app` and `second`: the URL of the first."""
    with postgres(installed, tmp_path_factory.mktemp("planned") / "data", "app") as url:
        with superuser(url) as connection:
            connection.execute("alter system set fsync = off")  # else a busy disk holds up its end
            connection.execute("select pg_reload_conf()")
            connection.execute("create database second owner app")
        yield url


def blocks(browser: chromium.Page, query: str) -> dict[str, str]:
    """Return the page's blocks by name, and its one line as `sum`."""
    browser.open(f"{PAGE.as_uri()}?{query}")
    assert browser.ask("id('error').textContent") == ""
    found = browser.ask("[...document.querySelectorAll('pre')].map((pre) => [pre.id.slice(6), pre.textContent])")
    return dict(found) | {"sum": browser.ask("id('sum').textContent")}


def connected(url: str, name: str) -> int:
    """Count the connections with that application_name."""
    with superuser(url) as connection:
        row = connection.execute("select count(*) from pg_stat_activity where application_name = %s", [name]).fetchone()
    assert row
    return int(row[0])


def most_opened(url: str, name: str, port: int, expected: int) -> int:
    """Count the connections while more requests than a service can serve at once hold or want one, and after all
    of them were answered."""
    statuses: list[int] = []

    def request() -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=STARTING_SECONDS) as answer:
            statuses.append(answer.status)

    clients: list[threading.Thread] = []
    with superuser(url) as holder:
        holder.execute("select pg_advisory_lock(1)")
        while len(clients) < REQUESTS or (connected(url, name) < expected and len(clients) < REQUESTS * 10):
            clients.append(threading.Thread(target=request))
            clients[-1].start()
        wait_for(lambda: connected(url, name) >= expected)
        opened = connected(url, name)
    for client in clients:
        client.join()
    assert statuses == [200] * len(clients)
    return max(opened, connected(url, name))


def environment(url: str, name: str) -> dict[str, str]:
    address = url.replace("postgresql://", "postgresql+psycopg://")
    return CLEAN | {
        "DATABASE_URL": address,
        "BIND1_DATABASE_URL": address.replace("/app?", "/second?"),
        "PGAPPNAME": name,
        "WEB_CONCURRENCY": "1",  # which gunicorn and uvicorn read, and the block overrules
    }


def opens(url: str, folder: Path, command: list[Any], port: int, expected: int) -> int:
    name, log = folder.name[:40], folder / "log"
    with running(command, folder, environment(url, name) | {"HOME": str(folder)}, log):
        wait_for(lambda: listens(port), log=log)
        if command[0].name == "uvicorn":
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/threads", timeout=STARTING_SECONDS) as answer:
                assert answer.read() == b"%d" % EACH
        return most_opened(url, name, port, expected)


@pytest.mark.parametrize("name", ["sqlalchemy", "flask-sqlalchemy", "django", "fastapi"])
def test_a_block_opens_what_the_page_says(
    browser: chromium.Page, programs: Path, server: str, tmp_path: Path, name: str
):
    """gunicorn with the copied gunicorn.conf.py, or uvicorn with the copied number of workers, around the copied block:
    with 20 requests at the same time it opens the instance's connections, no more, and answers all of them."""
    more = "&binds=1" if name == "flask-sqlalchemy" else ""
    copied = blocks(browser, PLAN + more)
    folder, port, expected = tmp_path / f"block-{name}", free_port(), ALL * (2 if more else 1)
    folder.mkdir()
    (folder / "gunicorn.conf.py").write_text(copied["gunicorn"])
    after = {"sqlalchemy": FLASK, "flask-sqlalchemy": FLASK_SQLALCHEMY, "fastapi": FASTAPI}
    command = [programs / "gunicorn", "main:app", "--bind", f"127.0.0.1:{port}"]
    if name == "django":
        host = server.partition("host=")[2]
        settings = replaced(copied["django"], ('"HOST": "db"', f'"HOST": "{host}"'))
        (folder / "settings.py").write_text(settings + DJANGO_SETTINGS)
        (folder / "main.py").write_text(DJANGO)
    else:
        (folder / "main.py").write_text(copied[name] + after[name])
    if name == "sqlalchemy":
        settings = run(
            f"'{programs}/gunicorn' --print-config main:app", folder, **environment(server, "printed")
        ).stdout
        shown = dict(
            re.findall(r"^(workers|worker_class|threads|worker_connections|keepalive) += (\S+)$", settings, re.M)
        )
        assert shown.pop("worker_class") == "gthread"
        assert shown == {"workers": "2", "threads": "3", "worker_connections": "3", "keepalive": "0"}
    if name == "fastapi":
        words = re.search(r"# uvicorn (.*)", copied[name])
        assert words
        command = [programs / "uvicorn", *words[1].split(), "--port", str(port)]
    assert f" x 2 workers x (2 + 1){' x 2 databases' if more else ''} = {expected} of " in copied["sum"]
    assert opens(server, folder, command, port, expected) == expected


def test_sync_workers(browser: chromium.Page, programs: Path, server: str, tmp_path: Path):
    """Each has one thread and one connection."""
    copied, port = blocks(browser, "instances=1&worker_class=sync&workers=3"), free_port()
    (tmp_path / "gunicorn.conf.py").write_text(copied["gunicorn"])
    (tmp_path / "main.py").write_text(copied["sqlalchemy"] + FLASK)
    command = [programs / "gunicorn", "main:app", "--bind", f"127.0.0.1:{port}"]
    assert opens(server, tmp_path, command, port, 3) == 3


REPETITIONS = 12
REPEATED = """
if __name__ == "__main__":
    from django.test import Client

    client = {}
    print([client.get("/").status_code for _ in range(12)])
"""


def replaced(text: str, *pairs: tuple[str, str]) -> str:
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return text


def test_pgbouncer(browser: chromium.Page, programs: Path, server: str, tmp_path: Path):
    """A PgBouncer takes the copied pgbouncer.ini. So many clients may come and not one more, and it opens so many
    connections. Through it, each framework's block repeats a statement more often than psycopg leaves it unprepared."""
    copied = blocks(browser, f"{PLAN}&pooler=pgbouncer&max_connections=20")
    sizes = {name: int(size) for name, size in re.findall(r"^(\w+) = (\d+)$", copied["pgbouncer"], re.MULTILINE)}
    assert "= 6 clients of pgbouncer, which opens at most 7 of 7 connections" in copied["sum"]
    assert (sizes["max_client_conn"], sizes["max_db_connections"]) == (16, 7)
    port, host = free_port(), server.partition("host=")[2]
    ini = replaced(
        copied["pgbouncer"],
        ("/etc/pgbouncer", str(tmp_path)),
        ("host=db port=5432", f"host={host} port=5432"),
        ("0.0.0.0", "127.0.0.1"),  # noqa: S104
        ("6432", str(port)),
    )
    (tmp_path / "pgbouncer.ini").write_text(f"{ini}\nunix_socket_dir =\nadmin_users = app\n")
    (tmp_path / "userlist.txt").write_text('"app" "secret"\n')
    account: dict[str, Any] = {}
    if os.geteuid() == 0:  # whom PgBouncer refuses
        nobody = pwd.getpwnam("nobody")
        account = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        for folder in (tmp_path, *tmp_path.parents):
            if not folder.stat().st_mode & 0o001:
                folder.chmod(folder.stat().st_mode | 0o011)
    with superuser(server) as connection:
        connection.execute("alter role app password 'secret'")
    through, log = f"postgresql://app:secret@127.0.0.1:{port}/app", tmp_path / "log"
    with running(["/usr/sbin/pgbouncer", tmp_path / "pgbouncer.ini"], tmp_path, CLEAN, log, **account):
        wait_for(lambda: listens(port), log=log)
        with psycopg.connect(f"{through[:-3]}pgbouncer", autocommit=True) as admin:
            shown = {row[0]: row[1] for row in psycopg.ClientCursor(admin).execute("show config").fetchall()}
        assert {name: int(shown[name]) for name in sizes} == sizes | {"listen_port": port}
        for name, app, ask in (
            ("sqlalchemy", FLASK, "app.test_client()"),
            ("django", DJANGO, "Client(SERVER_NAME='127.0.0.1')"),
        ):
            folder = tmp_path / f"through-{name}"
            folder.mkdir()
            block = copied[name]
            if name == "django":
                place = ('"HOST": "db"', f'"HOST": "127.0.0.1", "PORT": {port}')
                settings = replaced(block, place, ('"PASSWORD": "..."', '"PASSWORD": "secret"'))
                (folder / "settings.py").write_text(settings + DJANGO_SETTINGS)
                block = ""
            (folder / "main.py").write_text(block + app + REPEATED.format(ask))
            said = run(f"'{programs}/python' main.py", folder, **environment(through, name))
            assert (said.returncode, said.stdout) == (0, f"{[200] * REPETITIONS}\n")
        clients = [psycopg.connect(through, prepare_threshold=None) for _ in range(sizes["max_client_conn"])]
        with pytest.raises(psycopg.OperationalError, match="no more connections allowed"):
            psycopg.connect(through)
        holding = [threading.Thread(target=hold, args=(client,)) for client in clients]
        with superuser(server) as holder:
            holder.execute("select pg_advisory_lock(1)")
            for thread in holding:
                thread.start()
            ours = "select count(*) from pg_stat_activity where usename = 'app'"
            wait_for(lambda: holder.execute(ours).fetchall() == [(sizes["max_db_connections"],)])
        for thread in holding:
            thread.join()


def hold(client: "psycopg.Connection[Any]") -> None:
    """Hold a connection of the pooler's until the test lets go, or be told that none is free."""
    with contextlib.suppress(psycopg.OperationalError):
        client.execute(LOCK)
    client.close()


def test_the_roles_limit(browser: chromium.Page, server: str):
    """The copied ALTER ROLE lets so many in, and not one more."""
    copied = blocks(browser, f"{PLAN}&jobs=worker%3D2x2")
    limit = int(copied["role"].rpartition("LIMIT ")[2].rstrip(";"))
    assert limit == 6 + 4 + 5  # the web workers, the jobs, and half of what is reserved
    with superuser(server) as connection:
        connection.execute(copied["role"])
    try:
        clients = [psycopg.connect(server) for _ in range(limit)]
        with pytest.raises(psycopg.OperationalError, match='too many connections for role "app"'):
            psycopg.connect(server)
        for client in clients:
            client.close()
    finally:
        with superuser(server) as connection:
            connection.execute("alter role app connection limit -1")


@pytest.mark.parametrize(
    "query", ["jobs=worker%3D2x4", "pooler=pgbouncer&poolers=3&max_overflow=2", "worker_class=sync"]
)
def test_the_environment(browser: chromium.Page, installed: Path, query: str):
    """With the copied environment, `flask pool plan` says the same line on a machine of that size."""
    copied = blocks(browser, f"instances=3&cpus=2&memory_mib=1024&{query}")
    environ = dict(line.split("=", 1) for line in copied["environment"].splitlines())
    said = run(".venv/bin/flask pool plan --cpus 2 --memory-mib 1024", installed, **environ)
    assert copied["sum"] in said.stdout


LIMITS = """
import json
from flask_pooling.settings import PLANNED_WITH, Settings

limits = {}
for number, name in PLANNED_WITH.items():
    for limit in Settings.model_fields[name].metadata:
        limits.setdefault(number, {}).update({k: getattr(limit, k) for k in ("ge", "le") if hasattr(limit, k)})
print(json.dumps(limits))
"""


def test_the_limits_are_those_of_the_settings(browser: chromium.Page, installed: Path):
    """A number that the page takes, the environment takes, and the other way around."""
    said = run(f".venv/bin/python -c '{LIMITS}'", installed).stdout
    limits = {number: [found["ge"], found["le"]] for number, found in json.loads(said).items() if found}
    assert len(limits) >= 10
    browser.open(PAGE.as_uri())
    fields = browser.ask("Object.fromEntries(Object.entries(FIELDS).map(([name, f]) => [name, [f.least, f.most]]))")
    assert {number: fields[number] for number in limits} == limits
