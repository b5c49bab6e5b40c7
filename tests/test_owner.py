"""An owner adds a table with a relationship, a login, a second database and a page, in `app/` alone, by the manuals.

tests/inside/owner/members.py is what is added. It runs under the real gunicorn on a real Postgres.
"""

import contextlib
import http.client
import json
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psycopg
import pytest
from baking import PROJECT, ROOT
from serving import CLEAN, free_port, postgres

MEMBERS = ROOT / "tests" / "inside" / "owner" / "members.py"
UV = Path(sys.executable).parent / "uv"
REGISTER = "    app.register_blueprint(notes.bp)\n"
EXTENSIONS = "    from app.extensions import db, migrate\n"
FACTORY = {
    "from app import errors, home, logs, middleware": "from app import errors, home, logs, members, middleware",
    REGISTER: f"""{REGISTER}    app.register_blueprint(members.bp)
    app.register_blueprint(members.public)
    members.login_manager.init_app(app)
    CORS(app)
""",
    EXTENSIONS: f"{EXTENSIONS}    from flask_cors import CORS\n",
}
CONFIG = {
    "    database_url: DatabaseUrl | None = None\n": "    database_url: DatabaseUrl | None = None\n"
    "    reports_url: DatabaseUrl | None = None\n",
    '        "SQLALCHEMY_DATABASE_URI": ': '        "SQLALCHEMY_BINDS": {"reports": settings.reports_url or "sqlite:///reports.db"},\n'
    '        "SQLALCHEMY_DATABASE_URI": ',
}


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's requirements, its tools, and the extensions that the owner adds."""
    venv = tmp_path_factory.mktemp("owner") / "venv"
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, venv], check=True)
    for lock in (ROOT / PROJECT / "requirements" / "dev.txt", ROOT / "requirements" / "deploy.txt"):
        install = [UV, "pip", "install", "--quiet", "--require-hashes", "--python", venv / "bin" / "python", "-r", lock]
        subprocess.run(install, check=True, timeout=300)
    return venv / "bin"


@pytest.fixture(scope="module")
def owned(bake: Any, venv: Path) -> Path:
    """The project with what the owner added, and the migration for it, written on Postgres as `make migrate` does."""
    project = bake()
    (project / ".venv").symlink_to(venv.parent)
    shutil.copy(MEMBERS, project / "app" / "members.py")
    for name, changes in {"app/__init__.py": FACTORY, "app/config.py": CONFIG}.items():
        text = (project / name).read_text()
        for old, new in changes.items():
            assert text.count(old) == 1, (name, old)
            text = text.replace(old, new)
        (project / name).write_text(text)
    done = subprocess.run(
        [venv / "python", "-m", "scripts.migrate", "add members"],
        cwd=project,
        env=CLEAN | {"APP_ENV": "development"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "make upgrade" in done.stdout
    return project


@dataclass
class Service:
    """The running service, and one client of it, with a jar for its cookie."""

    port: int
    url: str
    log: Path
    cookie: str = field(default="")

    def ask(self, method: str, path: str, form: dict[str, str] | None = None, **headers: str) -> tuple[int, Any, Any]:
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)) as connection:
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            if self.cookie:
                sent["Cookie"] = self.cookie
            if form:
                sent["Content-Type"] = "application/x-www-form-urlencoded"
            connection.request(method, path, urlencode(form) if form else None, sent)
            response = connection.getresponse()
            text = response.read().decode()
            if cookies := response.headers.get_all("Set-Cookie"):
                self.cookie = "; ".join(cookie.partition(";")[0] for cookie in cookies)
            kind = response.getheader("Content-Type", "")
            return response.status, json.loads(text) if "json" in kind else text, response.headers


@pytest.fixture(scope="module")
def service(owned: Path, venv: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service")
    port = free_port()
    with postgres(owned, folder / "data", "first") as url:
        with psycopg.connect(url.replace("app@", "postgres@"), autocommit=True) as admin:
            admin.execute("create database second owner app")
        second = url.replace("/first", "/second")
        environ = CLEAN | {
            "DATABASE_URL": url,
            "REPORTS_URL": second,
            "SECRET_KEY": secrets.token_hex(32),
            "PORT": str(port),
            "DB_BINDS": "1",
        }
        subprocess.run([venv / "flask", "db", "upgrade"], cwd=owned, env=environ, check=True, timeout=600)
        log = folder / "log"
        with log.open("wb") as output:
            server = subprocess.Popen([venv / "gunicorn"], cwd=owned, env=environ, stdout=output, stderr=output)
        try:
            made = Service(port, url, log)
            give_up = time.monotonic() + 120
            while True:
                with contextlib.suppress(OSError):
                    if made.ask("GET", "/readyz")[0] == 200:
                        break
                assert server.poll() is None, log.read_text()
                assert time.monotonic() < give_up, log.read_text()
                time.sleep(0.1)
            yield made
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(30)


def test_the_migration_is_as_the_formatter_leaves_it(owned: Path, venv: Path):
    """It names the database's types and not the app's, and passes lint and format."""
    (migration,) = owned.glob("migrations/versions/*_add_members.py")
    assert "app." not in migration.read_text()
    for words in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [venv / "ruff", *words, migration], cwd=owned, capture_output=True, text=True, check=False, timeout=600
        )
        assert done.returncode == 0, done.stdout


def test_a_login_guards_a_blueprint(service: Service):
    """401 for strangers, their books for members; a deleted member's books go with the member."""
    stranger = Service(service.port, service.url, service.log)
    assert stranger.ask("GET", "/members/books")[0] == 401
    member = Service(service.port, service.url, service.log)
    status, _, headers = member.ask("POST", "/public/login", {"name": "ann"})
    assert status == 302
    session, remembered = sorted(headers.get_all("Set-Cookie"), key=lambda cookie: not cookie.startswith("session="))
    assert remembered.startswith("remember_token=")
    for cookie in (session, remembered):
        assert {"Secure", "HttpOnly", "SameSite=Lax"} <= set(cookie.split("; "))
    assert member.ask("POST", "/members/books", {"title": "Emma"})[0] == 302
    assert member.ask("GET", "/members/books")[:2] == (200, ["Emma"])
    assert member.ask("GET", "/public/books")[:2] == (200, 1)
    assert member.ask("DELETE", "/members/me")[0] == 204
    assert member.ask("GET", "/public/books")[:2] == (200, 0)


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_a_guard_whose_connection_dies_lets_nobody_in(service: Service, method: str):
    """503, and never the view: nothing is run once more behind it."""
    member = Service(service.port, service.url, service.log)
    member.ask("POST", "/public/login", {"name": f"bob{method}"})
    with psycopg.connect(service.url.replace("app@", "postgres@"), autocommit=True) as admin:
        admin.execute("alter table members rename to gone")
        try:
            # What the loader asks fails; then the whole server does not answer it in time.
            answers = [member.ask(method, "/members/me" if method == "DELETE" else "/members/books", {"title": "x"})[0]]
            admin.execute("alter table gone rename to members")
            with psycopg.connect(service.url.replace("app@", "postgres@")) as holder:
                holder.execute("lock table members")
                pids = "select pg_terminate_backend(pid) from pg_stat_activity where wait_event_type = 'Lock'"
                ending = subprocess.Popen(
                    ["sh", "-c", f'sleep 1; exec "{sys.executable}" -c "$0" "$1" "$2"', END, service.url, pids]
                )
                path = "/members/me" if method == "DELETE" else "/members/books"
                answers.append(member.ask(method, path, {"title": "x"})[0])
                assert ending.wait(20) == 0
        finally:
            with contextlib.suppress(psycopg.Error):
                admin.execute("alter table gone rename to members")
    assert answers == [500, 503]
    assert member.ask("GET", "/members/books")[:2] == (200, [])


END = """
import sys, psycopg
with psycopg.connect(sys.argv[1].replace("app@", "postgres@"), autocommit=True) as admin:
    assert admin.execute(sys.argv[2]).fetchall()
"""


def test_a_second_database_is_read_in_every_method(service: Service):
    """Not the first one's table of the same name."""
    service.ask("POST", "/api/notes", None, Content_Type="application/json")
    assert service.ask("POST", "/public/reports", {"title": "second"})[1] == {"session": ["second"], "run": ["second"]}
    assert service.ask("GET", "/public/reports")[1] == {"session": ["second"], "run": ["second"]}


ROWS = """
import pytest
from sqlalchemy import func, select
from app.extensions import db
from app.members import Report


@pytest.mark.parametrize("which", ["one", "two"])
def test_rows_of_the_second_database(app, which):
    with app.app_context():
        assert db.session.scalar(select(func.count()).select_from(Report)) == 0
        db.session.add(Report(title=which))
        db.session.commit()
"""


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_tests_find_the_second_database_empty(owned: Path, venv: Path, database: str):
    """One of their own, and not the developer's."""
    file = owned / "tests" / "test_reports.py"
    file.write_text(ROWS)
    developers = list(owned.rglob("reports.db"))  # made by `make migrate`
    before = [path.read_bytes() for path in developers]
    words = [venv / "python", "-m", "pytest", "-p", "no:cacheprovider", "--database", database, file]
    for _ in range(2):
        done = subprocess.run(words, cwd=owned, env=CLEAN, capture_output=True, text=True, check=False, timeout=600)
        assert "2 passed" in done.stdout, done.stdout + done.stderr
    assert [path.read_bytes() for path in developers] == before


def test_flasks_own_ways_work(service: Service):
    """Streaming, Markup and sorted keys in JSON, an extension's headers, a page that loads its style, an own header."""
    assert service.ask("GET", "/public/stream")[:2] == (200, "1\n2\n")
    status, text, headers = service.ask("GET", "/public/markup", Origin="https://example.org")
    assert (status, text) == (200, {"a": "<b>bold</b>", "b": 1})
    assert headers["Access-Control-Allow-Origin"]
    status, page, headers = service.ask("GET", "/public/form")
    assert headers.get_all("Referrer-Policy") == ["same-origin"]
    assert "default-src 'self'" in headers["Content-Security-Policy"]
    (style,) = re.findall('href="([^"]+)"', page)
    assert service.ask("GET", style)[0] == 200


def test_a_mistake_is_a_500_that_is_logged(service: Service):
    """As a problem document, and with its traceback in the log, on one line of JSON."""
    status, problem, _ = service.ask("GET", "/public/fails", X_Request_ID="the-mistake")
    assert (status, problem["status"]) == (500, 500)
    entries = [json.loads(line) for line in service.log.read_text().splitlines()]
    (entry,) = [each for each in entries if "ZeroDivisionError" in each.get("exc_info", "")]
    assert entry["request_id"] == "the-mistake"


IN_PROCESS = """
from flask import got_request_exception
from app import create_app
app = create_app()
app.testing = True
told = []
got_request_exception.connect(lambda sender, exception: told.append(exception), app, weak=False)
try:
    app.test_client().get("/public/fails")
except ZeroDivisionError as error:
    assert told == [error]
    print("raised and told")
app.json.sort_keys = False
print(app.test_client().get("/public/markup").text.strip())
"""


def test_testing_signals_and_json_are_flasks(owned: Path, venv: Path, tmp_path: Path):
    """In development, on SQLite: nothing of a second Postgres is asked for."""
    environ = CLEAN | {"APP_ENV": "development", "DATABASE_URL": f"sqlite:///{tmp_path}/dev.db"}
    words = [venv / "python", "-c", IN_PROCESS]
    done = subprocess.run(words, cwd=owned, env=environ, capture_output=True, text=True, check=False, timeout=600)
    assert done.stdout.splitlines() == ["raised and told", '{"b":1,"a":"<b>bold</b>"}'], done.stderr


def test_a_bind_that_is_not_counted_is_refused_with_the_remedy(owned: Path, venv: Path):
    """When gunicorn starts, without a traceback."""
    nowhere = "postgresql://app@127.0.0.1:1/none"
    environ = CLEAN | {"DATABASE_URL": nowhere, "REPORTS_URL": nowhere, "SECRET_KEY": secrets.token_hex(32)}
    done = subprocess.run(
        [venv / "gunicorn"], cwd=owned, env=environ, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode != 0
    assert "1 on Postgres ('reports'), and the plan counts each; set DB_BINDS=1" in done.stderr
    assert "Traceback" not in done.stderr
