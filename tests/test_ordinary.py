"""The manuals of Flask, SQLAlchemy, Alembic, pydantic and gunicorn, followed in a project: it works here, too."""

import json
import pwd
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from serving import CLEAN, ask, free_port, metrics_folders, postgres, run, served

SECRET = secrets.token_hex(32)
GUNICORN = "exec .venv/bin/gunicorn"
END_OF_FACTORY = "    return app\n"


@pytest.fixture(scope="module")
def server(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with postgres(installed, tmp_path_factory.mktemp("postgres") / "data", "my_service") as url:
        migrated = run(
            ".venv/bin/flask db upgrade", installed, APP_ENV="production", DATABASE_URL=url, SECRET_KEY=SECRET
        )
        assert migrated.returncode == 0, migrated.stdout
        yield url


def production(url: str, **more: str) -> dict[str, str]:
    return {"APP_ENV": "production", "DATABASE_URL": url, "SECRET_KEY": SECRET, "DB_MAX_CONNECTIONS": "100"} | more


def add(path: Path, text: str, *, before: str = "") -> None:
    old = path.read_text()
    assert before in old
    path.write_text(old.replace(before, text + before) if before else old + text)


def test_a_factory_that_asks_the_database(copy: Path, server: str):
    """The master keeps no connection: the plan has none for it, and the next start would count it."""
    asks = "    with app.app_context():\n        db.create_all()\n"
    add(copy / "app" / "__init__.py", asks, before=END_OF_FACTORY)
    settings = production(server, APP_INSTANCES="1", WEB_CONCURRENCY="2", WEB_THREADS="2")
    for _ in range(2):
        with served(GUNICORN, copy, free_port(), signal.SIGTERM, **settings) as address:
            assert ask(address, "/api/notes")[0] == 200
            with psycopg.connect(server) as connection:
                count = "select count(*) from pg_stat_activity where application_name = 'my_service'"
                assert connection.execute(count).fetchone()[0] <= 4


def test_a_guard_for_clients_lets_probes_pass(copy: Path, server: str):
    """On the port of the probes; on the service's own port it guards all that there is, as in any Flask app."""
    guard = "    @app.before_request\n    def guard():\n        return 'who are you?', 401\n\n"
    add(copy / "app" / "__init__.py", guard, before=END_OF_FACTORY)
    port = free_port()
    with served(GUNICORN, copy, port, signal.SIGTERM, ready=401, **production(server)) as address:
        assert ask(address, "/livez")[0] == 401
        for path in ("/livez", "/readyz", "/metrics", "/pool", "/pool.json"):
            assert ask(f"http://127.0.0.1:{port + 1}", path)[0] == 200, path


def test_a_handler_for_the_apps_own_errors(copy: Path):
    """One for SQLAlchemyError gets an IntegrityError, and what is 503 stays that."""
    script = """
import sqlalchemy as sa
from app import create_app
from sqlalchemy.exc import IntegrityError, OperationalError, SQLAlchemyError
app = create_app()
app.register_error_handler(SQLAlchemyError, lambda error: ("mine", 599))
for number, kind in enumerate((IntegrityError, OperationalError)):
    def fail(kind=kind):
        raise kind("select 1", {}, Exception("refused"), connection_invalidated=kind is OperationalError)
    app.add_url_rule(f"/{number}", str(number), fail)
print([app.test_client().get(f"/{number}").status_code for number in range(2)])
"""
    (copy / "script.py").write_text(script)
    assert run("APP_ENV=testing .venv/bin/python script.py", copy).stdout.splitlines()[-1] == "[599, 503]"


INDEX = """\"\"\"An index on a table that is in use.\"\"\"

from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade():
    with op.get_context().autocommit_block():
        op.create_index("ix_notes_title", "notes", ["title"], postgresql_concurrently=True)


def downgrade():
    op.drop_index("ix_notes_title", "notes")
"""
TYPES = """

class Tags(TypeDecorator[list[str]]):
    impl = ARRAY(String)
    cache_ok = True


class Document(TypeDecorator[dict[str, str]]):
    impl = JSON().with_variant(JSONB(), "postgresql")
    cache_ok = True


class Later(TypeDecorator[datetime]):
    impl = UtcDateTime
    cache_ok = True


class Place(UserDefinedType[str]):
    cache_ok = True

    def get_col_spec(self) -> str:
        return "point"


class Trip(db.Model):
    __table_args__ = {"comment": "a comment that is so long that it does not fit in one line " * 3}

    id: Mapped[int] = mapped_column(BigIntegerId, primary_key=True)
    tags: Mapped[list[str]] = mapped_column(Tags)
    document: Mapped[dict[str, str]] = mapped_column(Document)
    later: Mapped[datetime] = mapped_column(Later)
    place: Mapped[str] = mapped_column(Place)
"""


def test_an_index_without_a_lock(copy: Path, server: str):
    """`autocommit_block()`, as Alembic's manual has it, in production and in development."""
    (copy / "migrations" / "versions" / "0002_index.py").write_text(INDEX)
    for environment in ("production", "development"):
        settings = production(server) | {"APP_ENV": environment}
        for command in ("upgrade", "downgrade 0001"):
            done = run(f".venv/bin/flask db {command}", copy, **settings)
            assert done.returncode == 0, done.stdout


def test_types_of_the_apps_own(copy: Path, tmp_path: Path):
    """A migration has what they decorate, imports and variants included; what decorates nothing, it imports."""
    models = copy / "app" / "models.py"
    add(models, TYPES)
    imports = "from sqlalchemy.dialects.postgresql import ARRAY, JSONB\n"
    add(models, imports, before="from sqlalchemy.engine import Dialect\n")
    models.write_text(models.read_text().replace("TypeDecorator\n", "TypeDecorator, JSON\n", 1))
    models.write_text(
        models.read_text().replace(
            "import Mapped, mapped_column\n",
            "import Mapped, mapped_column\nfrom sqlalchemy.types import UserDefinedType\n",
        )
    )
    made = run('make migrate m="trips"', copy)
    assert made.returncode == 0, made.stdout
    (path,) = copy.glob("migrations/versions/*_trips.py")
    written = path.read_text()
    for kind in (
        "postgresql.ARRAY(sa.String())",
        "with_variant(postgresql.JSONB",
        "sa.DateTime(timezone=True)",
        "app.models.Place()",
    ):
        assert kind in written
    with postgres(copy, tmp_path / "data", "my_service") as url:
        for command in ("upgrade", "downgrade 0001", "upgrade"):
            done = run(f".venv/bin/flask db {command}", copy, **production(url))
            assert done.returncode == 0, done.stdout
        with psycopg.connect(url) as connection:
            kinds = "select column_name, udt_name from information_schema.columns where table_name = 'trip'"
            found = dict(connection.execute(kinds).fetchall())
    assert found == {"id": "int8", "tags": "_varchar", "document": "jsonb", "later": "timestamptz", "place": "point"}
    linted = run(
        ".venv/bin/python -m ruff check migrations && .venv/bin/python -m ruff format --check migrations", copy
    )
    assert linted.returncode == 0, linted.stdout


SETTINGS = """    smtp_user: str | None = None
    smtp_password: SecretStr | None = None
    cache_size: int = Field(1, validation_alias=AliasChoices("CACHE_SIZE", "CACHE_ENTRIES"))

    @model_validator(mode="after")
    def _smtp(self) -> "Settings":
        if bool(self.smtp_user) != bool(self.smtp_password):
            raise ValueError("SMTP_USER and SMTP_PASSWORD go together")
        return self

"""


@pytest.mark.parametrize(
    ("environ", "problems"),
    [
        ({"SMTP_USER": "x"}, ["SMTP_USER and SMTP_PASSWORD go together"]),
        ({"SMTP_USER": "x", "PORT": "x"}, ["PORT='x': Input should be a valid integer"]),
        ({"CACHE_ENTRIES": "many"}, ["CACHE_SIZE=***: Input should be a valid integer"]),
    ],
)
def test_validators_of_pydantic(copy: Path, environ: dict[str, str], problems: list[str]):
    """One for the whole model, and names to choose from."""
    config = copy / "app" / "config.py"
    add(config, SETTINGS, before="    def problems(self)")
    config.write_text(
        config.read_text().replace(
            "from pydantic import AfterValidator,",
            "from pydantic import AfterValidator, AliasChoices, model_validator,",
        )
    )
    for command in ("check", "plan"):
        said = run(f".venv/bin/flask pool {command}", copy, APP_ENV="development", **environ)
        assert "Traceback" not in said.stdout
        assert command == "plan" or said.returncode == 1
        assert said.returncode == 0 or problems[0] in said.stdout, said.stdout


def test_an_environment_of_the_owners(copy: Path, server: str):
    """It has production's rules. Without a row in POOLS it is refused in one line."""
    config = copy / "app" / "config.py"
    line = '    PRODUCTION = "production"\n'
    config.write_text(config.read_text().replace(line, line + '    STAGING = "staging"\n'))
    environ = production(server) | {"APP_ENV": "staging"}
    said = run(".venv/bin/gunicorn", copy, **environ)
    assert said.returncode != 0
    assert "APP_ENV=staging: has no row in POOLS of app/config.py" in said.stdout
    assert "Traceback" not in said.stdout
    row = '    "production": (QueuePool, NullPool),'
    config.write_text(config.read_text().replace(row, f'    "staging": (QueuePool, NullPool),\n{row}'))
    said = run(".venv/bin/gunicorn", copy, **{name: value for name, value in environ.items() if name != "SECRET_KEY"})
    assert "SECRET_KEY is not set" in said.stdout
    with served(GUNICORN, copy, free_port(), signal.SIGTERM, **environ) as address:
        assert [ask(address, path)[0] for path in ("/api/notes", "/metrics", "/pool")] == [200, 404, 404]


def test_a_database_without_an_encoding(copy: Path, server: str):
    """SQL_ASCII says of no text what it is; psycopg would answer in bytes."""
    with psycopg.connect(server.replace("postgresql://app@", "postgresql://postgres@"), autocommit=True) as connection:
        connection.execute(
            "create database ascii encoding 'SQL_ASCII' locale 'C' locale_provider libc template template0 owner app"
        )
    url = server.replace("/my_service?", "/ascii?")
    assert run(".venv/bin/flask db upgrade", copy, **production(url)).returncode == 0
    with served(GUNICORN, copy, free_port(), signal.SIGTERM, **production(url)) as address:
        assert ask(address, "/api/notes", "POST", title="Zoë")[1]["title"] == "Zoë"


def test_workers_of_another_user(copy: Path, server: str):
    """`gunicorn --user`, started by root: the folder of the metrics is theirs, and they start."""
    log, nobody = copy.parent / "log", pwd.getpwnam("nobody").pw_uid
    command = [copy / ".venv" / "bin" / "gunicorn", "--user", "nobody", "--group", "nogroup"]
    environ = CLEAN | production(server, PORT=str(free_port()))
    with log.open("w") as output:
        gunicorn = subprocess.Popen(
            command, cwd=copy, env=environ, stdout=output, stderr=output, start_new_session=True
        )
    try:
        give_up = time.monotonic() + 120
        while not (folders := metrics_folders(gunicorn.pid)) or log.read_text().count("Booting worker") < 3:
            assert time.monotonic() < give_up, log.read_text()
            time.sleep(0.1)
        assert {folder.stat().st_uid for folder in folders} == {nobody}
        assert {file.stat().st_uid for folder in folders for file in folder.glob("*.db")} == {nobody}
    finally:
        gunicorn.terminate()
        gunicorn.wait(120)  # a worker that is still starting misses gunicorn's signal, and is killed 30 s later
    assert "Permission denied" not in log.read_text()


@pytest.mark.parametrize("command", ["make run", "make plan", "make upgrade"])
def test_an_env_file_that_is_no_text(copy: Path, command: str):
    """As an editor on Windows may leave it."""
    (copy / ".env").write_bytes("WEB_THREADS=2\n".encode("utf-16"))
    said = run(command, copy, PORT=str(free_port()))
    assert said.returncode
    assert ".env: is not UTF-8 at byte 0; save it as UTF-8" in said.stdout
    assert "Traceback" not in said.stdout


def test_an_env_file_of_the_folder_above(copy: Path):
    """The `flask` command would read it, and gunicorn would not: `make` lets neither."""
    (copy.parent / ".env").write_text(f"DATABASE_URL=sqlite:///{copy.parent}/above.db\n")
    assert run("make upgrade", copy).returncode == 0
    assert not (copy.parent / "above.db").exists()
    assert (copy / "instance" / "my_service.db").exists()


@pytest.mark.parametrize(("skip", "instances"), [("", 4), ("1", 2)])
def test_an_env_file_in_production(copy: Path, skip: str, instances: int):
    """The `flask` command reads it there as well, unless FLASK_SKIP_DOTENV is set, as .env.example says."""
    (copy / ".env").write_text("APP_INSTANCES=4\n")
    assert f"{instances} instances x" in run(".venv/bin/flask pool plan", copy, FLASK_SKIP_DOTENV=skip).stdout


def test_a_number_that_is_none(copy: Path):
    """`make prod` needs it before the service says so."""
    said = run("DB_MAX_CONNECTIONS=abc make prod", copy, PORT=str(free_port()))
    assert said.returncode
    assert "DB_MAX_CONNECTIONS='abc': is not a whole number" in said.stdout
    assert "Traceback" not in said.stdout


def test_no_autoflush(copy: Path):
    """`run` flushes the session where a query of the session would."""
    script = """
from app import create_app
from app.extensions import db
from app.models import Note
from flask_pooling import run
from sqlalchemy import select
with create_app().app_context():
    db.create_all()
    db.session.execute(select(1))
    note = Note(title="x")
    with db.session.no_autoflush:
        db.session.add(note)
        run(select(Note.id))
        print(note.id is None)
    run(select(Note.id))
    print(note.id is None)
"""
    (copy / "script.py").write_text(script)
    assert run("APP_ENV=testing .venv/bin/python script.py", copy).stdout == "True\nFalse\n"


# --- what anybody may send -------------------------------------------------------------------------------------------


def head_of(address: str, path: str, *lines: str) -> str:
    """Return the head of an answer to a request with these header lines, as they are."""
    host, _, port = address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port)), timeout=120) as client:
        client.sendall("\r\n".join((f"GET {path} HTTP/1.1", *lines, "Connection: close", "", "")).encode("latin-1"))
        return b"".join(iter(lambda: client.recv(65536), b"")).decode()


FORGED_PREFIXES = (
    "//evil.example", "///evil.example", "@evil.example", "/@evil.example", "/\\evil.example", "\\evil.example",
    "https://evil.example", "javascript:alert(1)", "/..", "/svc/../..", "/./", "/.", "/a//b", "/%2f/evil.example",
    "/\tevil.example", "/a b", "/<script>", '"//evil.example"', '"/\\"', "/a, //evil.example", "evil.example",
    "/é", "/a?b", "/a#b",
)  # fmt: skip
ABSOLUTE = """    from flask import request, url_for

    @app.get("/where/")
    def where():
        return f"{request.root_url} {request.remote_addr} {url_for('notes.page', _external=True)}"

"""


def test_headers_that_anybody_may_send(copy: Path, server: str):
    """They lead nowhere else: neither the links nor the redirects, and gunicorn believes none of its own."""
    add(copy / "app" / "__init__.py", ABSOLUTE, before=END_OF_FACTORY)
    settings = production(server, WEB_TRUSTED_PROXIES="1", WEB_TRUSTED_HOSTS="notes.example.org,.example.net")
    with served(GUNICORN, copy, free_port(), signal.SIGTERM, **settings) as address:
        for prefix in FORGED_PREFIXES:
            head = head_of(address, "/where/", "Host: notes.example.org", f"X-Forwarded-Prefix: {prefix}")
            body = "http://notes.example.org/ 127.0.0.1 http://notes.example.org/api/notes"
            assert head.startswith("HTTP/1.1 400") or head.endswith(body), (prefix, head)
            assert "evil" not in head_of(address, "/where", "Host: notes.example.org", f"X-Forwarded-Prefix: {prefix}")
        for sent, seen in {
            "X-Forwarded-Prefix: /svc": "http://notes.example.org/svc/ 127.0.0.1",
            "X-Forwarded-Prefix: /a/b.c-d_e~f/": "http://notes.example.org/a/b.c-d_e~f/ 127.0.0.1",
            "X-Forwarded-Proto: https": "https://notes.example.org/ 127.0.0.1",
            "X-Forwarded-Proto: javascript": "http://notes.example.org/ 127.0.0.1",
            "X-Forwarded-Host: evil.example": "http://notes.example.org/ 127.0.0.1",
            "X-Forwarded-Port: 666": "http://notes.example.org/ 127.0.0.1",
            "Forwarded: for=6.6.6.6;host=evil.example;proto=https": "http://notes.example.org/ 127.0.0.1",
            "X-Forwarded-For: 6.6.6.6, 9.9.9.9": "http://notes.example.org/ 9.9.9.9",
            "X-Forwarded-For: 9.9.9.9:5678": "http://notes.example.org/ 9.9.9.9",
            "X-Forwarded-For: [2001:db8::1]:5678": "http://notes.example.org/ 2001:db8::1",
            "X-Forwarded-For: 2001:db8::1": "http://notes.example.org/ 2001:db8::1",
            "X-Forwarded-For: <script>": "http://notes.example.org/ 127.0.0.1",
            "X-Forwarded-For: unknown": "http://notes.example.org/ 127.0.0.1",
            "X-Forwarded-For: fe80::1%<b>": "http://notes.example.org/ 127.0.0.1",
            "Script-Name: //evil.example": "http://notes.example.org/ 127.0.0.1",
            "SCRIPT_NAME: //evil.example": "http://notes.example.org/ 127.0.0.1",
            "X-Forwarded-Ssl: on": "http://notes.example.org/ 127.0.0.1",
            "X-Forwarded-Protocol: ssl": "http://notes.example.org/ 127.0.0.1",
            "X-Original-URL: /elsewhere": "http://notes.example.org/ 127.0.0.1",
            "X-HTTP-Method-Override: DELETE": "http://notes.example.org/ 127.0.0.1",
        }.items():
            head = head_of(address, "/where/", "Host: notes.example.org", sent)
            assert head.partition("\r\n\r\n")[2].startswith(seen + " "), (sent, head)
        for host in ("evil.example", "example.org", "notes.example.org.evil.example", "127.0.0.1", "[::1]", "@", ""):
            assert head_of(address, "/where/", f"Host: {host}").startswith("HTTP/1.1 400"), host
            for probe in ("/livez", "/readyz"):
                assert head_of(address, probe, f"Host: {host}").startswith("HTTP/1.1 200"), host
        for host in ("notes.example.org:8000", "example.net", "a.b.example.net"):
            assert head_of(address, "/where/", f"Host: {host}").startswith("HTTP/1.1 200"), host


LOG_IN = """    from flask import session

    @app.get("/in")
    def log_in():
        session["who"] = 1
        return ""

"""


def test_a_secure_cookie_over_http_is_said(copy: Path, server: str):
    """Once: the first deploy is often plain HTTP, where browsers drop the cookie and no login lasts."""
    add(copy / "app" / "__init__.py", LOG_IN, before=END_OF_FACTORY)
    port = free_port()
    log, settings = copy.parent / f"{port}.log", production(server, WEB_TRUSTED_PROXIES="1", WEB_CONCURRENCY="1")
    with served(GUNICORN, copy, port, signal.SIGTERM, **settings) as address:
        ask(address, "/livez")
        assert "Secure" in head_of(address, "/in", "Host: x", "X-Forwarded-Proto: https")
        assert "Secure cookie was set" not in log.read_text()
        for _ in range(2):
            assert "Secure" in head_of(address, "/in", "Host: x")
        assert log.read_text().count("Secure cookie was set") == 1


JOB = """
import logging
import warnings
from app import create_app
app = create_app()
logging.getLogger("job").info("begins")
logging.getLogger("job").debug("a detail")
app.logger.warning("mind this")
warnings.warn("an old function", stacklevel=1)
try:
    1 / 0
except ZeroDivisionError:
    logging.exception("failed")
"""


def test_every_process_logs_alike(copy: Path, server: str):
    """A job, a command, and gunicorn's own access log, which is off unless it is asked for: one JSON object a line."""
    (copy / "job.py").write_text(JOB)
    add(copy / "wsgi.py", "\n\n@app.cli.command('tidy')\ndef tidy():\n    import job\n")
    both, (few, every) = {}, ({"LOG_LEVEL": "warning"}, {"LOG_LEVEL": "DEBUG"})
    for command in (".venv/bin/python job.py", ".venv/bin/flask tidy"):
        for more, expected in (
            (both, ["begins", "mind this", "an old function", "failed"]),
            (few, ["mind this", "an old function", "failed"]),
            (every, ["begins", "a detail", "mind this", "an old function", "failed"]),
        ):
            done = run(command, copy, **production(server), **more)
            entries = [json.loads(line) for line in done.stdout.splitlines()]
            said = [entry["message"] for entry in entries if entry["name"] in {"job", "app", "py.warnings", "root"}]
            assert len(said) == len(expected), done.stdout
            assert all(text in line for text, line in zip(expected, said, strict=True)), said
            assert "ZeroDivisionError" in entries[-1]["exc_info"]
    port = free_port()
    with served(f"{GUNICORN} --access-logfile -", copy, port, signal.SIGTERM, **production(server)) as address:
        ask(address, "/api/notes")
    entries = [json.loads(line) for line in (copy.parent / f"{port}.log").read_text().splitlines()]
    assert [entry for entry in entries if "GET /api/notes HTTP/1.1" in entry["message"]]


def posted(*lines: str, body: bytes) -> bytes:
    head = ("POST /api/notes HTTP/1.1", "Host: x", "Connection: close", "Content-Type: application/json", *lines)
    return "\r\n".join((*head, "", "")).encode() + body


def in_json(body: bytes) -> bytes:
    return posted(f"Content-Length: {len(body)}", body=body)


def in_chunks(body: bytes) -> bytes:
    return posted("Transfer-Encoding: chunked", body=body)


NO_REQUESTS = {
    400: (
        in_json(b"[" * 20_000), in_json(b'{"a":' * 20_000), in_json(b"[" * 900_000), in_json(b""),
        in_json(b'{"a": "\xff"}'),
        in_json(b'{"title": "a", "body": ' + b"9" * 5000 + b"}"),
        in_chunks(b"zz\r\nabc\r\n0\r\n\r\n"), in_chunks(b"3\r\nabcd\r\n0\r\n\r\n"), in_chunks(b"30\r\nabc"),
        in_chunks(b"3\r\nabc\r\n"), in_chunks(b"f" * 20 + b"\r\nabc"), in_chunks(b"-1\r\nabc"),
        in_chunks(b"0\r\nbad trailer\r\n\r\n"),
        posted("Content-Length: 500", body=b"abc"), posted("Content-Length: 5000", body=b"abc"),
        posted("Content-Length: 3", "Content-Length: 4", body=b"abcd"), posted("Content-Length: +3", body=b"abc"),
    ),
    422: (
        in_json(b'{"title": "\\ud800"}'), in_json(b'{"title": "\\u0000"}'), in_json(b'{"title": "a", "body": NaN}'),
        in_json(b"[]"), in_json(b"null"),
    ),
}  # fmt: skip


def test_what_is_no_request_is_the_clients_fault(installed: Path, server: str):
    """And no error of the service's: bodies that do not parse, that break off, or that say two lengths."""
    with served(GUNICORN, installed, free_port(), signal.SIGTERM, **production(server)) as address:
        host, _, port = address.removeprefix("http://").partition(":")
        for status, requests in NO_REQUESTS.items():
            for request in requests:
                with socket.create_connection((host, int(port)), timeout=20) as client:
                    client.sendall(request)
                    client.shutdown(socket.SHUT_WR)
                    assert client.recv(65536).startswith(b"HTTP/1.1 %d" % status), request[:300]
