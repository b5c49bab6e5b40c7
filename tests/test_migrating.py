"""Migrations as they go wrong in practice: written on SQLite for Postgres, two by two, under the limits of a role."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from serving import postgres, run

COLUMNS = """
    urgent: Mapped[bool] = mapped_column(default=False, server_default=false())
    public: Mapped[bool] = mapped_column(default=True, server_default=true())
    seen_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=func.now())
    colour: Mapped[str] = mapped_column(String(20), server_default="white")
    weight: Mapped[int] = mapped_column(server_default=text("1"))
"""
A_ROW = "insert into notes (title, body, created_at, updated_at) values ('a', 'b', '2026-01-01', '2026-01-01')"
SLOW = "op.execute('select pg_sleep(1)')"
LIMITS = ("statement_timeout", "idle_in_transaction_session_timeout", "idle_session_timeout")


@pytest.fixture
def server(installed: Path, tmp_path: Path) -> Iterator[str]:
    with postgres(installed, tmp_path / "data", "service") as url:
        yield url


def follow(project: Path, name: str, *, after: str, body: str = "pass") -> Path:
    """A migration written by hand."""
    path = project / "migrations" / "versions" / f"{name}.py"
    path.write_text(
        f'"""{name}."""\n\nfrom alembic import op\n\nrevision = "{name}"\ndown_revision = "{after}"\n\n\n'
        f"def upgrade() -> None:\n    {body}\n\n\ndef downgrade() -> None:\n    pass\n"
    )
    return path


def test_defaults_of_the_server_fit_both_databases(copy: Path, server: str):
    """`make migrate` compares with a Postgres, whatever development runs on; what it writes goes on SQLite, too."""
    models = copy / "app" / "models.py"
    text = models.read_text() + COLUMNS
    text = text.replace("from sqlalchemy import ", "from sqlalchemy import false, func, text, true, ")
    models.write_text(text)
    made = run('make migrate m="more of a note"', copy)
    assert made.returncode == 0, made.stdout
    (path,) = (copy / "migrations" / "versions").glob("*_more_of_a_note.py")
    written = path.read_text()
    for default in ("sa.false()", "sa.true()", "sa.func.now()", 'server_default="white"', 'sa.text("1")'):
        assert default in written
    where = copy / "instance" / "my_service.db"
    for url, connect in ((None, lambda: sqlite3.connect(where)), (server, lambda: psycopg.connect(server))):
        more = {"APP_ENV": "development"} | ({"DATABASE_URL": url} if url else {})
        assert run(".venv/bin/flask db upgrade 0001", copy, **more).returncode == 0
        with connect() as connection:
            connection.execute(A_ROW)
        done = run(".venv/bin/flask db upgrade", copy, **more)
        assert done.returncode == 0, done.stdout
        with connect() as connection:
            (row,) = connection.execute("select urgent, public, colour, weight, seen_at is null from notes").fetchall()
        assert row == (False, True, "white", 1, False)


SECOND = """    kind: Mapped[Kind] = mapped_column(server_default="BIG")


class Other(db.Model):
    __tablename__ = "others"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[Kind]


class Entry(db.Model):
    __tablename__ = "entries"
    __bind_key__ = "audit-log"

    id: Mapped[int] = mapped_column(primary_key=True)
    what: Mapped[str]
    level: Mapped[Level]
"""
TWO_ENUMS = """
class Kind(Enum):
    BIG = "big"
    SMALL = "small"


class Level(Enum):
    HIGH = "high"
    LOW = "low"


class Note("""
BIND = """
        "SQLALCHEMY_BINDS": {
            "audit-log": {
                "url": os.environ["AUDIT_URL"],
                **engine_options(settings, os.environ["AUDIT_URL"], process),
            }
        },
"""


def tables(connection: sqlite3.Connection | psycopg.Connection) -> set[str]:
    names = "select name from sqlite_master where type = 'table'"
    if isinstance(connection, psycopg.Connection):
        names = "select tablename from pg_tables where schemaname = 'public'"
    return {name for (name,) in connection.execute(names).fetchall()}


def test_a_second_database(copy: Path, server: str):
    """Its tables are written, made and taken back by the same commands, each in its own database."""
    models, config = copy / "app" / "models.py", copy / "app" / "config.py"
    colour = '    colour: Mapped[str] = mapped_column(String(20), server_default="white")\n'
    text = models.read_text().replace("\nclass Note(", TWO_ENUMS) + colour + SECOND
    models.write_text(
        text.replace(
            "from datetime import UTC, datetime\n", "from datetime import UTC, datetime\nfrom enum import Enum\n"
        )
    )
    refused = run('make migrate m="audit"', copy)
    assert "a model has __bind_key__ = 'audit-log', which is not in SQLALCHEMY_BINDS" in refused.stdout
    assert "Traceback" not in refused.stdout
    text = config.read_text()
    anchor = '        "SQLALCHEMY_DATABASE_URI": settings.database,\n'
    assert anchor in text
    config.write_text(text.replace(anchor, anchor + BIND.lstrip("\n")))
    files = (copy / "instance" / "my_service.db", copy / "instance" / "audit.db")
    sqlite = {"AUDIT_URL": "sqlite:///audit.db"}
    for words in ('make migrate m="audit"', "make upgrade", 'make migrate m="nothing" || echo refused'):
        done = run(words, copy, **sqlite)
        assert done.returncode == 0, done.stdout
    assert "Alembic finds nothing to migrate" in done.stdout
    assert done.stdout.endswith("refused\n")
    (path,) = (copy / "migrations" / "versions").glob("*_audit.py")
    written = path.read_text()
    assert "def upgrade_audit_log() -> None:\n" in written
    assert "def downgrade_audit_log() -> None:\n" in written
    for words in ("ruff check .", "ruff format --check .", "mypy", "python -m pytest -q tests/test_migrations.py"):
        done = run(f".venv/bin/{words}", copy, **sqlite)
        assert done.returncode == 0, done.stdout
    second = server.replace("/service?", "/second?")
    with psycopg.connect(server.replace("//app@", "//postgres@"), autocommit=True) as admin:
        admin.execute("create database second owner app")
    for urls, connect in (((None, sqlite["AUDIT_URL"]), sqlite3.connect), ((server, second), psycopg.connect)):
        more = {"APP_ENV": "development", "AUDIT_URL": urls[1]} | ({"DATABASE_URL": urls[0]} if urls[0] else {})
        places = [str(file) for file in files] if urls[0] is None else [server, second]
        for version, found in (
            ("head", [{"notes", "others"}, {"entries"}]),
            ("base", [set(), set()]),
            ("head", [{"notes", "others"}, {"entries"}]),
        ):
            way = "upgrade" if version == "head" else "downgrade"
            done = run(f".venv/bin/flask db {way} {version}", copy, **more)
            assert done.returncode == 0, done.stdout
            for place, names in zip(places, found, strict=True):
                with connect(place) as connection:
                    assert tables(connection) - {"alembic_version", "sqlite_sequence"} == names


ENUMS = """
    state: Mapped[State] = mapped_column(server_default="NEW")
    data: Mapped[dict[str, str]] = mapped_column(JSONB().with_variant(JSON(), "sqlite"), server_default="{}")
    seen_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=func.now())
    done: Mapped[bool] = mapped_column(server_default=false())


class Task(db.Model):
    __tablename__ = "tasks"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[Kind]
    state: Mapped[State]


class Other(db.Model):
    __tablename__ = "others"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[Kind]
    alone: Mapped[Alone]
"""
CLASSES = """
class State(Enum):
    NEW = "new"
    OLD = "old"


class Kind(Enum):
    BIG = "big"
    SMALL = "small"


class Alone(Enum):
    ONE = "one"


class Note("""


def test_what_only_postgres_has(copy: Path, server: str):
    """Types of enums, JSONB and casts in defaults: made, taken away, and back again, on both databases."""
    models = copy / "app" / "models.py"
    before = models.read_text()
    text = before.replace("\nclass Note(", CLASSES) + ENUMS
    text = text.replace("from sqlalchemy import ", "from sqlalchemy import JSON, false, func, ")
    text = text.replace(
        "from datetime import UTC, datetime\n", "from datetime import UTC, datetime\nfrom enum import Enum\n"
    )
    text = text.replace(
        "from sqlalchemy.engine", "from sqlalchemy.dialects.postgresql import JSONB\nfrom sqlalchemy.engine"
    )
    both = [{"APP_ENV": "development"}, {"APP_ENV": "development", "DATABASE_URL": server}]
    for changed, message in ((text, "more"), (before, "less")):
        models.write_text(changed)
        done = run(f"make migrate m={message}", copy)
        assert done.returncode == 0, done.stdout
        (path,) = (copy / "migrations" / "versions").glob(f"*_{message}.py")
        for more in both:
            done = run("for to in upgrade downgrade upgrade; do .venv/bin/flask db $to || exit 1; done", copy, **more)
            assert done.returncode == 0, path.read_text() + done.stdout
    for more in both:
        done = run(".venv/bin/flask db downgrade base && .venv/bin/flask db upgrade", copy, **more)
        assert done.returncode == 0, done.stdout
    with psycopg.connect(server) as connection:
        assert connection.execute("select typname from pg_type where typtype = 'e'").fetchall() == []


SHOP = """

class Shop(db.Model):
    __tablename__ = "shops"
    __table_args__ = (
        CheckConstraint("price > 0 and name <> ''", name="price"),
        Index("ix_shops_lower_name", text("lower(name)")),
        Index("ix_shops_cheap", "price", postgresql_where=text("price < 10"), sqlite_where=text("price < 10")),
    )

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    name: Mapped[str] = mapped_column(String(20))
    price: Mapped[Decimal] = mapped_column(Numeric(8, 2))
    twice: Mapped[Decimal] = mapped_column(Numeric(8, 2), Computed("price * 2"))
"""


def test_what_was_removed_comes_back(copy: Path, server: str):
    """A table with a check, a computed column and indexes on expressions: as Postgres keeps it, SQLite reads it."""
    models = copy / "app" / "models.py"
    before = models.read_text()
    text = before + SHOP
    text = text.replace(
        "from sqlalchemy import ", "from sqlalchemy import CheckConstraint, Computed, Index, Numeric, text, "
    )
    text = text.replace(
        "from datetime import UTC, datetime\n", "from datetime import UTC, datetime\nfrom decimal import Decimal\n"
    )
    for changed, message in ((text, "shops"), (before, "no_shops")):
        models.write_text(changed)
        done = run(f"make migrate m={message}", copy)
        assert done.returncode == 0, done.stdout
    (path,) = (copy / "migrations" / "versions").glob("*_no_shops.py")
    for more in ({"APP_ENV": "development"}, {"APP_ENV": "development", "DATABASE_URL": server}):
        done = run(".venv/bin/flask db upgrade && .venv/bin/flask db downgrade", copy, **more)
        assert done.returncode == 0, path.read_text() + done.stdout
        url = more.get("DATABASE_URL")
        connection = psycopg.connect(url) if url else sqlite3.connect(copy / "instance" / "my_service.db")
        with closing(connection):
            connection.execute("insert into shops (name, price) values ('A', 3)")
            assert connection.execute("select id, twice from shops").fetchall() == [(1, 6)]
            with pytest.raises((psycopg.IntegrityError, sqlite3.IntegrityError)):
                connection.execute("insert into shops (name, price) values ('A', 0)")
        done = run(".venv/bin/flask db upgrade", copy, **more)
        assert done.returncode == 0, done.stdout


def test_two_that_follow_the_same_one(copy: Path):
    """As after a merge of two branches: one line says how they are joined, and then it goes on."""
    for name in ("left", "right"):
        follow(copy, name, after="0001")
    refused = run("make upgrade", copy)
    assert refused.returncode != 0
    assert "two migrations follow the same one" in refused.stdout
    assert 'flask db merge -m "merge" heads' in refused.stdout
    assert "Traceback" not in refused.stdout
    merged = run('.venv/bin/flask db merge -m "merge" heads && make upgrade', copy, APP_ENV="development")
    assert merged.returncode == 0, merged.stdout


@pytest.mark.parametrize("whose", ["role app", "database service"])
def test_limits_of_a_role_or_a_database_are_for_requests(copy: Path, server: str, whose: str):
    """A migration may take longer than a request, and another connection of it waits meanwhile."""
    name = f"slow_{whose.partition(' ')[0]}"
    follow(copy, name, after="0001", body=SLOW)
    admin = server.replace("//app@", "//postgres@")
    with psycopg.connect(admin, autocommit=True) as connection:
        for limit in LIMITS:
            connection.execute(f"alter {whose} set {limit} = '200ms'".encode())
        try:
            done = run(
                f".venv/bin/flask db upgrade {name} && .venv/bin/flask db downgrade 0001",
                copy,
                APP_ENV="development",
                DATABASE_URL=server,
            )
        finally:
            connection.execute(f"alter {whose} reset all".encode())
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("url", "body", "says"),
    [
        ("postgresql://app@127.0.0.1:9/service", "pass", "the database cannot be reached; check DATABASE_URL: "),
        ("{server}/../nowhere", "pass", 'database "nowhere" does not exist'),
        ("{nobody}", "pass", 'role "nobody" does not exist'),
        ("{server}", "op.execute('select 1 / 0')", "wrong.py, line 10: division by zero"),
        ("{server}", "op.execute('drop table pg_class')", "wrong.py, line 10: must be owner of table pg_class"),
        ("{server}", "op.execute('nonsense')", 'wrong.py, line 10: syntax error at or near "nonsense"'),
        ("{server}", "op.drop_table('missing')", 'wrong.py, line 10: table "missing" does not exist'),
    ],
)
def test_an_error_of_the_database_is_one_line(copy: Path, server: str, url: str, body: str, says: str):
    """No traceback: which migration, which line, and what the database says."""
    follow(copy, "wrong", after="0001", body=body)
    url = url.replace("{server}/../nowhere", server.replace("/service?", "/nowhere?"))
    url = url.replace("{nobody}", server.replace("//app@", "//nobody@")).replace("{server}", server)
    done = run(".venv/bin/flask db upgrade", copy, APP_ENV="development", DATABASE_URL=url)
    assert done.returncode == 1
    assert says in done.stdout
    assert "Traceback" not in done.stdout
    lines = [line for line in done.stdout.splitlines() if not line.startswith("upgraded to ")]
    assert len(lines) == 1, done.stdout


def test_the_postgres_of_the_project_sees_nothing_of_the_shell(installed: Path):
    """What libpq reads by itself is meant for another server."""
    shell = {"PGPORT": "5433", "PGSERVICE": "none", "PGHOSTADDR": "127.0.0.1", "PGOPTIONS": "-c statement_timeout=1"}
    done = run('make migrate m="nothing"', installed, **shell)
    assert "Alembic finds nothing to migrate" in done.stdout
    assert "Traceback" not in done.stdout


def test_a_migration_that_is_gone(copy: Path):
    """One that the database has had, and one that another one follows: one line each, with what to do."""
    first = copy / "migrations" / "versions" / "0001_notes.py"
    text = first.read_text()
    upgraded = run("make upgrade", copy)
    assert upgraded.stdout.splitlines()[-1].startswith("upgraded to 0001: ")
    first.unlink()
    assert last_word(copy) == (
        "Can't locate revision identified by '0001': the database is at a migration that is not in migrations/versions;"
        " get the code that has it or, in development, delete the database in instance/"
    )
    second = text.replace('revision = "0001"', 'revision = "0002"').replace("revision = None", 'revision = "0001"')
    first.with_name("0002_more.py").write_text(second)
    assert last_word(copy) == (
        "migrations/versions has no '0001', which another migration follows; get it back or delete both"
    )


def last_word(project: Path) -> str:
    said = run("APP_ENV=development .venv/bin/python -m flask db upgrade", project)
    assert said.returncode == 1
    assert "Traceback" not in said.stdout
    return said.stdout.splitlines()[-1]
