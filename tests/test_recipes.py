"""docs/recipes.md is true: every block is applied to a baked project, which is migrated, served and used.

Nothing else is changed in the project but what the document says in words: an API without cookies needs no token.
"""

import contextlib
import csv
import gzip
import http.client
import io
import json
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import psycopg
import pytest
from baking import PROJECT, ROOT, Bake
from serving import CLEAN, STARTING_SECONDS, STOPPING_SECONDS, free_port, postgres, served

UV = Path(sys.executable).parent / "uv"
BLOCK = re.compile(
    r"```(?:python|html|sh)\n(?:# |<!-- )([^\n,]+?)(?:, (at the end|below `[^\n]+`))?(?: -->)?\n(.*?)```", re.DOTALL
)
EXEMPT = "".join(f"login.csrf.exempt({name}.bp)\n" for name in ("comments", "reports", "mail"))
NEVER = "postgresql://app@127.0.0.1:1/none"


def apply(project: Path, name: str, where: str, code: str) -> None:
    """Do with a block what the document tells a reader to do with it."""
    path = project / name
    if not where:
        assert not path.exists(), name
        path.write_text(code)
    elif where == "at the end":
        path.write_text(f"{path.read_text()}\n\n{code}" if name.endswith(".py") else path.read_text() + code)
    else:
        line = where.removeprefix("below `").removesuffix("`")
        lines = path.read_text().splitlines(keepends=True)
        (number,) = [number for number, each in enumerate(lines) if each.strip() == line]
        indent = lines[number][: len(lines[number]) - len(lines[number].lstrip())]
        new = [indent + each if each.strip() else each for each in code.splitlines(keepends=True)]
        path.write_text("".join([*lines[: number + 1], *new, *lines[number + 1 :]]))


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of a venv with the project's requirements, its tools, and what the recipes add."""
    venv = tmp_path_factory.mktemp("recipes") / "venv"
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, venv], check=True)
    for lock in (ROOT / PROJECT / "requirements" / "dev.txt", ROOT / "requirements" / "deploy.txt"):
        install = [UV, "pip", "install", "--quiet", "--require-hashes", "--python", venv / "bin" / "python", "-r", lock]
        subprocess.run(install, check=True, timeout=600)
    return venv / "bin"


def told(command: list[Any], project: Path, **environ: str) -> str:
    """Return what a command prints that succeeds."""
    done = subprocess.run(
        command,
        cwd=project,
        env=CLEAN | environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=1200,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def cooked(bake: Bake, venv: Path) -> Path:
    """The project with all recipes, and the migration that `make migrate` writes for them."""
    project = bake()
    (project / ".venv").symlink_to(venv.parent)
    blocks = BLOCK.findall((project / "docs" / "recipes.md").read_text())
    for name, where, code in blocks:
        apply(project, name, where, code)
    # The recipe that stands first in the document is the last one in the file: each goes right below the same line.
    apply(project, "app/__init__.py", "below `app.register_blueprint(comments.bp)`", EXEMPT)
    told([venv / "ruff", "check", "--fix-only", "."], project)
    told([venv / "ruff", "format", "."], project)
    said = told([venv / "python", "-m", "scripts.migrate", "recipes"], project, APP_ENV="development")
    assert "Mind:" not in said, said
    assert "make upgrade" in said
    (migration,) = project.glob("migrations/versions/*_recipes.py")
    assert "def upgrade_reports()" in migration.read_text()
    return project


class Client:
    """A browser: it keeps its cookies."""

    def __init__(self, address: str) -> None:
        self.place, self.cookies = urlsplit(address).netloc, dict[str, str]()

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, Any]:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        sent["Cookie"] = "; ".join(f"{name}={value}" for name, value in self.cookies.items())
        with contextlib.closing(http.client.HTTPConnection(self.place, timeout=STARTING_SECONDS)) as connection:
            connection.request(method, path, body, sent)
            response = connection.getresponse()
            text = response.read().decode()
            for cookie in response.headers.get_all("Set-Cookie") or ():
                name, _, value = cookie.partition(";")[0].partition("=")
                self.cookies[name] = value
            kind = response.getheader("Content-Type", "")
            return response.status, json.loads(text) if "json" in kind else text, response.headers

    def send(self, path: str, **body: str) -> tuple[int, Any, Any]:
        return self.ask("POST", path, json.dumps(body), Content_Type="application/json")

    def token(self) -> str:
        (token,) = re.findall('name="csrf_token" value="([^"]+)"', self.ask("GET", "/login")[1])
        return token

    def log_in(self, token: str = "", password: str = "a password") -> tuple[int, Any, Any]:  # noqa: S107
        form = {"name": "ann", "password": password, "csrf_token": token}
        return self.ask("POST", "/login", urlencode(form), Content_Type="application/x-www-form-urlencoded")


class Collector(ThreadingHTTPServer):
    """A stand-in for Sentry and for a collector of OpenTelemetry: it keeps what is sent to it."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Kept)
        self.address = f"127.0.0.1:{self.server_port}"
        self.spans: list[bytes] = []
        self.events: list[dict[str, Any]] = []

    def wait_for(self, request_id: str) -> tuple[dict[str, Any] | None, bytes]:
        """Wait for the span of a request, and return its event, if there is one, and the span."""
        give_up = time.monotonic() + STARTING_SECONDS
        while not (spans := [each for each in self.spans if request_id.encode() in each]):
            assert time.monotonic() < give_up, self.spans
            time.sleep(0.05)
        events = [each for each in self.events if each["tags"]["request_id"] == request_id]
        assert len(events) <= 1
        return events[0] if events else None, spans[0]


class Kept(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        body = gzip.decompress(body) if self.headers["Content-Encoding"] == "gzip" else body
        kept: Any = self.server
        if "envelope" in self.path:
            parts = map(json.loads, body.splitlines())
            kept.events += [each for each in parts if "exception" in each]
        else:
            kept.spans.append(body)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def settings(
    cooked: Path, venv: Path, collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, str]]:
    """The environment of every process of the service, whose two databases have been migrated."""
    with postgres(cooked, tmp_path_factory.mktemp("database") / "data", "first") as url:
        with psycopg.connect(url.replace("app@", "postgres@"), autocommit=True) as admin:
            admin.execute("create database second owner app")
        settings = {
            "DATABASE_URL": url,
            "REPORTS_URL": url.replace("/first", "/second"),
            "SECRET_KEY": secrets.token_hex(32),
            "DB_BINDS": "1",
            "APP_JOBS": "worker=1x1",
            "REDIS_URL": f"redis://127.0.0.1:{free_port()}",
            "MAIL_SERVER": f"127.0.0.1:{free_port()}",
            "REMEMBER_DAYS": "7",
            "SENTRY_DSN": f"http://key@{collector.address}/1",
            "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://{collector.address}",
            "OTEL_BSP_SCHEDULE_DELAY": "100",
        }
        told([venv / "flask", "db", "upgrade"], cooked, **settings)
        yield settings


@pytest.fixture(scope="module")
def address(cooked: Path, settings: dict[str, str]) -> Iterator[str]:
    port, command = free_port(), "exec .venv/bin/gunicorn"
    with served(command, cooked, port, signal.SIGTERM, mistakes=True, **settings) as address:
        yield address
    log = (cooked.parent / f"{port}.log").read_text()
    assert log.count('"exc_info"') <= len(TROUBLES), log


@pytest.fixture
def client(address: str) -> Client:
    return Client(address)


def test_a_relation(client: Client, settings: dict[str, str]):
    """Comments are read by a join and by the relation, and go with their note."""
    note = client.send("/api/notes", title="Bread")[1]["id"]
    assert client.ask("GET", f"/comments/{note}")[:2] == (200, {"title": "Bread", "comments": []})
    for text in ("warm", "and fresh"):
        assert client.send(f"/comments/{note}", text=text)[0] == 201
    assert client.ask("GET", f"/comments/{note}")[1]["comments"] == ["warm", "and fresh"]
    assert client.ask("GET", "/comments")[1]["Bread"] == ["warm", "and fresh"]
    assert client.ask("GET", f"/comments/{note + 1_000_000}")[0] == 404
    assert client.ask("DELETE", f"/api/notes/{note}")[0] == 204
    with psycopg.connect(settings["DATABASE_URL"]) as database:
        assert database.execute("select count(*) from comments where note_id = %s", [note]).fetchone() == (0,)


@pytest.fixture(scope="module")
def ann(cooked: Path, venv: Path, settings: dict[str, str]) -> None:
    """A member, made by a second process, as in `make shell`."""
    code = """
from werkzeug.security import generate_password_hash
from app import create_app
from app.extensions import db
from app.login import Member
with create_app().app_context():
    db.session.add(Member(name="ann", password=generate_password_hash("a password")))
    db.session.commit()
"""
    told([venv / "python", "-c", code], cooked, **settings)


@pytest.mark.usefixtures("ann")
def test_a_login_with_a_form(client: Client):
    """A token and the right password let a member in, and nothing less does; the API works without a token."""
    assert client.ask("GET", "/me")[0] == 302
    assert client.log_in()[0] == 400
    assert client.log_in(client.token(), "another password")[0] == 403
    assert client.log_in(client.token())[0] == 302
    assert client.ask("GET", "/me")[:2] == (200, "ann")
    assert client.ask("POST", "/logout", "")[0] == 400
    assert client.send("/api/notes", title="Bread")[0] == 201


@pytest.mark.usefixtures("ann")
def test_a_setting_for_an_extension(client: Client):
    """REMEMBER_DAYS reaches Flask-Login by app.config."""
    sent = time.time()
    headers = client.log_in(client.token())[2]
    (cookie,) = [each for each in headers.get_all("Set-Cookie") if each.startswith("remember_token=")]
    (expires,) = re.findall("Expires=([^;]+)", cookie)
    days = (time.mktime(time.strptime(expires, "%a, %d %b %Y %H:%M:%S GMT")) - time.timezone - sent) / 86_400
    assert round(days) == 7


def test_a_second_database(client: Client, settings: dict[str, str]):
    """Reports are in the second database, and not in the first."""
    assert client.send("/reports", title="of the year")[0] == 201
    assert client.ask("GET", "/reports")[:2] == (200, ["of the year"])
    tables = "select count(*) from pg_tables where tablename = 'reports'"
    for name, there in {"DATABASE_URL": 0, "REPORTS_URL": 1}.items():
        with psycopg.connect(settings[name]) as database:
            assert database.execute(tables).fetchone() == (there,)


def test_a_second_database_that_is_not_counted(cooked: Path, venv: Path):
    """The service refuses to start, and names DB_BINDS=1."""
    environ = {"DATABASE_URL": NEVER, "REPORTS_URL": NEVER, "SECRET_KEY": secrets.token_hex(32)}
    done = subprocess.run(
        [venv / "gunicorn"], cwd=cooked, env=CLEAN | environ, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode != 0
    assert "set DB_BINDS=1" in done.stderr


def listens(place: str) -> bool:
    with contextlib.suppress(OSError), contextlib.closing(http.client.HTTPConnection(place)) as connection:
        connection.connect()
        return True
    return False


@contextlib.contextmanager
def running(command: list[Any], cwd: Path, log: Path, place: str) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=cwd, env=CLEAN, stdout=output, stderr=output)
    try:
        give_up = time.monotonic() + STARTING_SECONDS
        while not listens(place):
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < give_up, log.read_text()
            time.sleep(0.1)
        yield
    finally:
        process.terminate()
        process.wait(STOPPING_SECONDS)


def test_a_mail_in_the_background(client: Client, cooked: Path, venv: Path, settings: dict[str, str], tmp_path: Path):
    """The view queues it, a worker of RQ sends it, and a mail server receives it."""
    redis, mails = urlsplit(settings["REDIS_URL"]), tmp_path / "mails"
    server = ["redis-server", "--port", str(redis.port), "--bind", "127.0.0.1", "--save", "", "--dir", tmp_path]
    receiver = [venv / "python", "-u", "-m", "aiosmtpd", "-n", "-l", settings["MAIL_SERVER"]]
    with (
        running(server, tmp_path, tmp_path / "redis.log", redis.netloc),
        running([*receiver, "-c", "aiosmtpd.handlers.Debugging", "stdout"], tmp_path, mails, settings["MAIL_SERVER"]),
    ):
        note = client.send("/api/notes", title="Bread\nfor all", body="and butter")[1]["id"]
        assert client.send(f"/mail/{note}")[:2] == (202, {"queued": note})
        assert client.send(f"/mail/{note + 1_000_000}")[0] == 404
        worker = [venv / "rq", "worker", "--burst", "--url", settings["REDIS_URL"]]
        said = told(worker, cooked, **settings, APP_JOB="worker")
        assert "Subject: Bread for all" in mails.read_text(), said
        assert "and butter" in mails.read_text()


def test_a_large_csv(client: Client, settings: dict[str, str]):
    """All rows of several pages arrive, each once and whole."""
    with psycopg.connect(settings["DATABASE_URL"]) as database:
        database.execute(
            "insert into notes (title, body, created_at, updated_at)"
            " select 'a, \"b\"' || chr(10) || n, 'body', now(), now() from generate_series(1, 2500) n"
        )
        there = database.execute("select id::text, title, body from notes order by notes.id").fetchall()
    status, text, headers = client.ask("GET", "/notes.csv")
    assert (status, headers["Content-Disposition"]) == (200, "attachment; filename=notes.csv")
    heading, *rows = csv.reader(io.StringIO(text, newline=""))
    assert heading == ["id", "title", "body"]
    assert [tuple(row) for row in rows] == there


def test_a_large_upload(client: Client):
    """One view takes more than the app's limit, and asks for the token all the same."""
    token = client.token()
    part = '--x\r\nContent-Disposition: form-data; name="{}"\r\n\r\n{}\r\n'
    file = '--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n' + "a" * 2**21

    def upload(token: str) -> tuple[int, Any, Any]:
        body = f"{part.format('csrf_token', token)}{file}\r\n--x--\r\n"
        return client.ask("POST", "/upload", body.encode(), Content_Type="multipart/form-data; boundary=x")

    assert upload(token)[:2] == (200, {"name": "a", "bytes": 2**21})
    assert upload("forged")[0] == 400


@pytest.mark.parametrize(("path", "mib"), [("/upload", 21), ("/login", 2)])
def test_an_upload_past_the_limit(client: Client, path: str, mib: int):
    """The view has a limit, too, and the other views have theirs. The answer does not wait for the body."""
    kind = {"Content_Type": "multipart/form-data; boundary=x"}
    assert client.ask("POST", path, Content_Length=str(mib * 2**20), **kind)[0] == 413


TROUBLES = {500: "ConnectionError", 503: "OperationalError"}


def test_sentry_and_tracing(client: Client, collector: Collector, settings: dict[str, str]):
    """Each worker sends spans. A 500 and a 503 of the database are one event each. Both have the request's id."""
    note = client.send("/api/notes", title="Bread")[1]["id"]
    status, _, headers = client.ask("POST", f"/mail/{note}")  # no Redis runs here
    event, span = collector.wait_for(headers["X-Request-ID"])
    assert event["exception"]["values"][-1]["type"] == TROUBLES[status]
    assert b"POST /mail/<int:note_id>" in span
    with psycopg.connect(settings["DATABASE_URL"].replace("app@", "postgres@"), autocommit=True) as admin:
        admin.execute("alter role app connection limit 0")
        admin.execute("select pg_terminate_backend(pid) from pg_stat_activity where usename = 'app'")
        try:
            status, _, headers = client.ask("GET", "/reports")
        finally:
            admin.execute("alter role app connection limit -1")
    event, span = collector.wait_for(headers["X-Request-ID"])
    assert status == 503
    assert event["exception"]["values"][-1]["type"] == TROUBLES[status]
    assert b"GET /reports" in span
    assert b"OperationalError" not in span
    status, _, headers = client.ask("GET", "/reports")
    assert (status, collector.wait_for(headers["X-Request-ID"])[0]) == (200, None)


HELD = '''
"""What holds a connection."""

import factory
import pytest
from factory.alchemy import SQLAlchemyModelFactory
from flask_login import current_user

from app import login
from app.extensions import db
from app.models import Note
from tests.test_login import member


class Notes(SQLAlchemyModelFactory):
    class Meta:
        model = Note
        sqlalchemy_session = db.session
        sqlalchemy_session_persistence = "commit"

    title = factory.Sequence(lambda number: f"note {number}")


def test_factory_boy(app):
    """It makes rows with the session, which requests then see."""
    with app.app_context():
        titles = [Notes().title, Notes().title]
    found = app.test_client().get("/api/notes").get_json()
    assert [note["title"] for note in found["items"]] == titles


@pytest.mark.parametrize(("manual", "held"), [(False, 0), (True, 1)])
def test_the_loader(app, monkeypatch, manual, held):
    """The recipe's holds none; that of Flask-Login's manual holds one until the request ends."""
    app.add_url_rule("/held", view_func=lambda: f"{current_user.name} {db.engine.pool.checkedout()}")
    client = member(app, "ann")
    if manual:
        def load_user(member_id):
            return db.session.get(login.Member, int(member_id))
        monkeypatch.setattr(login.login_manager, "_user_callback", load_user)
    assert client.get("/held").text == f"ann {held}"


def test_the_csv(app):
    """Between two pages of the stream no connection is held."""
    with app.app_context():
        db.session.add_all([Note(title=f"{number}") for number in range(1001)])
        db.session.commit()
        pool = db.engine.pool
    response = app.test_client().get("/notes.csv", buffered=False)
    held = [(len(part), pool.checkedout()) for part in response.response]
    assert len(held) == 3 and {each[1] for each in held} == {0}
'''


@pytest.mark.parametrize(("database", "passed"), [("sqlite", 1), ("postgres", 6)])
def test_two_users_and_the_real_postgres(cooked: Path, venv: Path, database: str, passed: int):
    """The document's tests pass, each on its database. Neither the login nor the CSV holds a connection."""
    (cooked / "tests" / "test_held.py").write_text(HELD)
    files = ["tests/test_login.py", *(["tests/test_held.py"] if database == "postgres" else [])]
    options = ["-p", "no:cacheprovider", "-p", "no:flask"]  # pytest-flask, as the text says
    words = [venv / "python", "-m", "pytest", *options, "--database", database, *files]
    assert f"{passed} passed" in told(words, cooked)


def test_the_sql_is_logged(address: str, cooked: Path, client: Client):
    """Also that of `run`."""
    client.ask("GET", "/reports")
    log = (cooked.parent / f"{urlsplit(address).port}.log").read_text()
    assert "SELECT reports.id, reports.title" in log.replace("\\n", " ")


def test_what_the_text_names_is_there(cooked: Path):
    """Each line of the log, metric, command and variable that a recipe tells a reader to look for."""
    text = (cooked / "docs" / "recipes.md").read_text()
    code = "\n".join(path.read_text() for part in ("flask_pooling", "app") for path in (cooked / part).rglob("*.py"))
    for line in (
        "the database did not serve this request",
        "holds a connection on which nothing has run",
        "app.access",
    ):
        assert f"`{line}`" in text
        assert line in code
    for metric in re.findall(r"`((?:http|db|web)_[a-z_]+)`", text):
        name = metric.removesuffix("_count").removesuffix("_total")
        assert f'"{name}"' in code or f'"{metric}"' in code, metric
    settings = (cooked / ".env.example").read_text()
    for name in re.findall(r"\b(?:DB|WEB|APP)_[A-Z_]+\b", text):
        assert f"# {name}=" in settings, name
    for words in re.findall(r"`flask pool (\w+)", text):
        assert f'"{words}"' in code or f"def {words}" in code, words
    for target in re.findall(r"`make (\w+)", text):
        assert f"\n{target}:" in (cooked / "Makefile").read_text(), target
