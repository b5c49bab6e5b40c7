"""Migrations as they go wrong in practice: written on one database for the other, two by two, cut short by a lock."""

import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import psycopg
import pytest
from serving import CLEAN, postgres, run

COLUMNS = """
    urgent: Mapped[bool] = mapped_column(default=False, server_default=false())
    public: Mapped[bool] = mapped_column(default=True, server_default=true())
    seen_at: Mapped[datetime] = mapped_column(UtcDateTime, server_default=func.now())
    colour: Mapped[str] = mapped_column(String(20), server_default="white")
    weight: Mapped[int] = mapped_column(server_default=text("1"))
"""
A_ROW = "insert into notes (title, body, created_at, updated_at) values ('a', 'b', '2026-01-01', '2026-01-01')"
SLOW = "op.execute('select pg_sleep(1.5)')"
LIMITS = ("statement_timeout", "idle_in_transaction_session_timeout", "idle_session_timeout")


def development(url: str) -> dict[str, str]:
    return {"APP_ENV": "development", "DATABASE_URL": url}


@pytest.fixture(scope="module")
def cluster(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with postgres(installed, tmp_path_factory.mktemp("cluster") / "data", "service") as url:
        yield url


@pytest.fixture
def server(cluster: str) -> str:
    """The URL of a database that is new for each test."""
    with psycopg.connect(
        cluster.replace("//app@", "//postgres@").replace("/service?", "/postgres?"), autocommit=True
    ) as admin:
        for name in ("service", "second"):
            admin.execute(f"drop database if exists {name} with (force)")
        admin.execute("alter role app reset all")
        admin.execute("create database service owner app")
    return cluster


def follow(project: Path, name: str, *, after: str, body: str = "pass") -> Path:
    """Write a migration by hand."""
    path = project / "migrations" / "versions" / f"{name}.py"
    path.write_text(
        f'"""{name}."""\n\nimport sqlalchemy as sa\nfrom alembic import op\n\n'
        f'revision = "{name}"\ndown_revision = "{after}"\n\n\n'
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
    for default in ('sa.text("false")', 'sa.text("true")', "sa.func.now()", 'server_default="white"', 'sa.text("1")'):
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
        "SQLALCHEMY_BINDS": {"audit-log": os.environ["AUDIT_URL"]},
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
    anchor = '        "SQLALCHEMY_DATABASE_URI": settings.database.render_as_string(hide_password=False),\n'
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
    kinds: Mapped[list[Kind]] = mapped_column(ARRAY(EnumOf(Kind)).with_variant(JSON(), "sqlite"))
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
    """Types of enums, arrays of them, a value more, JSONB and casts in defaults: made, taken away, and back again, on
    both databases."""
    models = copy / "app" / "models.py"
    before = models.read_text()
    text = before.replace("\nclass Note(", CLASSES) + ENUMS
    text = text.replace("from sqlalchemy import ", "from sqlalchemy import ARRAY, JSON, false, func, ")
    text = text.replace(
        "from datetime import UTC, datetime\n", "from datetime import UTC, datetime\nfrom enum import Enum\n"
    )
    text = text.replace(
        "from sqlalchemy.engine",
        "from sqlalchemy import Enum as EnumOf\n"
        "from sqlalchemy.dialects.postgresql import JSONB\nfrom sqlalchemy.engine",
    )
    both = [{"APP_ENV": "development"}, {"APP_ENV": "development", "DATABASE_URL": server}]
    grown = text.replace('BIG = "big"', 'BIG = "big"\n    MIDDLE = "middle"')
    for changed, message in ((text, "more"), (grown, "grown"), (before, "less")):
        models.write_text(changed)
        done = run(f"make migrate m={message}", copy)
        assert done.returncode == 0, done.stdout
        on_sqlite = message != "less"  # whose way back has an array without a type for SQLite
        assert ("Mind: on SQLite, up, down and up again failed" in done.stdout) is not on_sqlite
        (path,) = (copy / "migrations" / "versions").glob(f"*_{message}.py")
        linted = run(
            f".venv/bin/ruff check {path} && .venv/bin/ruff format --check {path} && .venv/bin/mypy {path}", copy
        )
        assert linted.returncode == 0, linted.stdout
        for more in both if on_sqlite else both[1:]:
            done = run("for to in upgrade downgrade upgrade; do .venv/bin/flask db $to || exit 1; done", copy, **more)
            assert done.returncode == 0, path.read_text() + done.stdout
    done = run(".venv/bin/flask db downgrade base && .venv/bin/flask db upgrade", copy, **both[1])
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
    """A table with a check, a computed column and indexes on expressions. Where SQLite does not read what Postgres has
    kept of it, `make migrate` says in which line."""
    models = copy / "app" / "models.py"
    before = models.read_text()
    text = before + SHOP
    text = text.replace(
        "from sqlalchemy import ", "from sqlalchemy import CheckConstraint, Computed, Index, Numeric, text, "
    )
    text = text.replace(
        "from datetime import UTC, datetime\n", "from datetime import UTC, datetime\nfrom decimal import Decimal\n"
    )
    for changed, message, minds in ((text, "shops", False), (before, "no_shops", True)):
        models.write_text(changed)
        done = run(f"make migrate m={message}", copy)
        assert done.returncode == 0, done.stdout
        assert (f"_{message}.py, line " in done.stdout) is minds, done.stdout
    more = {"APP_ENV": "development", "DATABASE_URL": server}
    done = run(".venv/bin/flask db upgrade && .venv/bin/flask db downgrade", copy, **more)
    assert done.returncode == 0, done.stdout
    with closing(psycopg.connect(server)) as connection:
        connection.execute("insert into shops (name, price) values ('A', 3)")
        assert connection.execute("select id, twice from shops").fetchall() == [(1, 6)]
        with pytest.raises(psycopg.IntegrityError):
            connection.execute("insert into shops (name, price) values ('A', 0)")
    assert run(".venv/bin/flask db upgrade", copy, **more).returncode == 0


IMPORTS = """from pgvector.sqlalchemy import VECTOR
from sqlalchemy import CheckConstraint, UniqueConstraint
from sqlalchemy.dialects.postgresql import ExcludeConstraint
from sqlalchemy_utils import EmailType

"""
MEMBER = """

class Member(db.Model):
    __tablename__ = "members"

    id: Mapped[int] = mapped_column(primary_key=True)
    mail: Mapped[str] = mapped_column(EmailType)
    spot: Mapped[list[float]] = mapped_column(VECTOR(3))
    age: Mapped[int] = mapped_column(CheckConstraint("age > 0", name="age"))
"""
OLDER = """    shoe: Mapped[int] = mapped_column(CheckConstraint("shoe > 0", name="shoe"), server_default="1")
    __table_args__ = (
        CheckConstraint("age < 200", name="old"),
        UniqueConstraint("shoe"),
        ExcludeConstraint(("age", "="), name="ex_age"),
    )
"""


def test_types_of_other_packages_and_constraints_of_columns(copy: Path, tmp_path: Path):
    """Imports and types are written, and what Alembic does not see is named."""
    packages = tmp_path / "packages"
    uv = Path(sys.executable).parent / "uv"
    install = [uv, "pip", "install", "--quiet", "--no-deps", "--target", packages, "sqlalchemy-utils", "pgvector"]
    subprocess.run(install, check=True, timeout=300)
    models, versions = copy / "app" / "models.py", copy / "migrations" / "versions"
    before = models.read_text().replace("from app.extensions", f"{IMPORTS}from app.extensions", 1)
    models.write_text(before + MEMBER)
    done = run('make migrate m="members"', copy, PYTHONPATH=str(packages))
    (path,) = versions.glob("*_members.py")
    written = path.read_text()
    assert "import sqlalchemy_utils.types.email\n" in written
    assert "import pgvector.sqlalchemy.vector\n" in written
    assert 'sa.CheckConstraint("age > 0", name=op.f("ck_members_age"))' in written
    # This Postgres has no such extension.
    assert "Mind: on Postgres, up, down and up again failed: " in done.stdout
    assert 'type "vector" does not exist' in done.stdout
    path.unlink()
    models.write_text(before + MEMBER.replace("VECTOR(3)", "EmailType"))
    done = run('make migrate m="members"', copy, PYTHONPATH=str(packages))
    assert "Mind: " not in done.stdout
    models.write_text(before + MEMBER.replace("VECTOR(3)", "EmailType") + OLDER)
    done = run('make migrate m="older"', copy, PYTHONPATH=str(packages))
    (path,) = versions.glob("*_older.py")
    for name in ("ck_members_shoe", "ck_members_old", "uq_members_shoe"):
        assert name in path.read_text()
    assert "Mind: ex_age of the models is not written: Alembic does not see it; add it by hand" in done.stdout
    assert done.stdout.count("Mind: ") == 1


IN_A_SCHEMA = """

class Entry(db.Model):
    __tablename__ = "entries"
    __table_args__ = {"schema": "audit"}

    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(DOMAIN("positive", Integer, check="value > 0"))
"""


def test_what_has_to_be_written_by_hand_is_named(copy: Path, server: str):
    """A schema is not made, and a domain is not dropped. With both in the migration there is nothing more to find."""
    models = copy / "app" / "models.py"
    text = models.read_text().replace(
        "from sqlalchemy.engine", "from sqlalchemy.dialects.postgresql import DOMAIN\nfrom sqlalchemy.engine", 1
    )
    models.write_text(text + IN_A_SCHEMA)
    more = {"DATABASE_URL": server}
    done = run('make migrate m="entries"', copy, **more)
    assert 'schema "audit" does not exist' in done.stdout
    (path,) = (copy / "migrations" / "versions").glob("*_entries.py")
    written = path.read_text().replace(
        "    op.create_table(", '    op.execute("create schema audit")\n    op.create_table('
    )
    path.write_text(written.replace('schema="audit")\n', 'schema="audit")\n    op.execute("drop schema audit")\n'))
    done = run('make migrate m="nothing"', copy, **more)
    assert "Alembic finds nothing to migrate" in done.stdout
    done = run(
        "for to in upgrade downgrade upgrade; do .venv/bin/flask db $to; done", copy, APP_ENV="development", **more
    )
    assert 'type "positive" already exists' in done.stdout


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
    """A migration may take longer than a request, also outside a transaction, while another connection of it waits."""
    name = f"slow_{whose.partition(' ')[0]}"
    follow(copy, name, after="0001", body=f"{SLOW}\n    with op.get_context().autocommit_block():\n        {SLOW}")
    admin = server.replace("//app@", "//postgres@")
    with psycopg.connect(admin, autocommit=True) as connection:
        for limit in LIMITS:
            connection.execute(f"alter {whose} set {limit} = '1s'".encode())
        done = run(
            f".venv/bin/flask db upgrade {name} && .venv/bin/flask db downgrade 0001", copy, **development(server)
        )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("url", "body", "says"),
    [
        ("postgresql://app@127.0.0.1:9/service", "pass", "the database cannot be reached; check DATABASE_URL: "),
        ("{server}/../nowhere", "pass", 'database "nowhere" does not exist'),
        ("{nobody}", "pass", 'role "nobody" does not exist'),
        ("{server}", "op.execute('select 1 / 0')", "wrong.py, line 11: division by zero"),
        ("{server}", "op.execute('drop table pg_class')", "wrong.py, line 11: must be owner of table pg_class"),
        ("{server}", "op.execute('nonsense')", 'wrong.py, line 11: syntax error at or near "nonsense"'),
        ("{server}", "op.drop_table('missing')", 'wrong.py, line 11: table "missing" does not exist'),
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
    """libpq's own variables are meant for another server."""
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
        "the database is at 0001, which migrations/versions does not have; get the code that has it"
    )
    second = text.replace('revision = "0001"', 'revision = "0002"').replace("revision = None", 'revision = "0001"')
    first.with_name("0002_more.py").write_text(second)
    assert last_word(copy) == "migrations/versions has no '0001', which another migration follows; get it back"


TYPING_ERRORS = {
    "upgrade nope": "Can't locate revision identified by 'nope'; flask db history lists the revisions",
    "downgrade nope": "Can't locate revision identified by 'nope'; flask db history",
    "stamp nope": "Can't locate revision identified by 'nope'; flask db history",
    "upgrade nope@head": "Can't locate revision identified by 'nope'; flask db history",
    "show nope": "Can't locate revision identified by 'nope'",
    "merge nope 0001": "Can't locate revision identified by 'nope'",
    "upgrade +7": "Relative revision +7 didn't produce 7 migrations",
    "downgrade head-7": "Walked too far",
}


def test_a_typing_error_is_named(copy: Path):
    """Nobody is told that code is missing, or to delete anything."""
    assert run("make upgrade", copy).returncode == 0
    for words, says in TYPING_ERRORS.items():
        done = run(f"APP_ENV=development .venv/bin/python -m flask db {words}", copy)
        assert done.returncode == 1
        assert says in done.stdout.splitlines()[-1]
        assert not any(word in done.stdout for word in ("delete", "get the code", "Traceback"))


def last_word(project: Path) -> str:
    said = run("APP_ENV=development .venv/bin/python -m flask db upgrade", project)
    assert said.returncode == 1
    assert "Traceback" not in said.stdout
    return said.stdout.splitlines()[-1]


def test_instances_that_start_at_once_do_not_collide(installed: Path, server: str):
    """One migrates, the others wait for it and find nothing left to do."""
    command = [installed / ".venv" / "bin" / "flask", "db", "upgrade"]
    instances = [subprocess.Popen(command, env=CLEAN | development(server), cwd=installed) for _ in range(3)]
    assert [instance.wait(120) for instance in instances] == [0] * 3
    with psycopg.connect(server) as connection:
        assert connection.execute("select version_num from alembic_version").fetchall() == [("0001",)]


FAMILY = """op.create_table('parents', sa.Column('id', sa.Integer, primary_key=True), sa.Column('name', sa.Text))
    op.create_table('children', sa.Column('id', sa.Integer, sa.ForeignKey('parents.id', ondelete='CASCADE')))
    op.execute("insert into parents values (1, 'one')")
    op.execute('insert into children values (1)')"""


def test_a_table_that_sqlite_makes_again_keeps_its_children(copy: Path):
    """SQLite changes a column by making the table again; ON DELETE CASCADE would delete what refers to the old one. A
    migration that fails leaves nothing, as on Postgres."""
    follow(copy, "family", after="0001", body=FAMILY)
    follow(
        copy,
        "again",
        after="family",
        body="with op.batch_alter_table('parents', recreate='always') as batch:\n"
        "        batch.add_column(sa.Column('more', sa.Text))",
    )
    done = run("make upgrade", copy)
    assert done.returncode == 0, done.stdout
    with closing(sqlite3.connect(copy / "instance" / "my_service.db")) as connection:
        assert connection.execute("select count(*) from children").fetchall() == [(1,)]
        follow(copy, "fails", after="again", body="op.create_table('half', sa.Column('id', sa.Integer))\n    1 / 0")
        assert "ZeroDivisionError" in run("make upgrade", copy).stdout
        assert "half" not in tables(connection)


UPDATE = "op.execute('update notes set body = body')"
TABLE = "op.create_table('half', sa.Column('id', sa.Integer))"
BLOCK = "with op.get_context().autocommit_block():\n        "
INDEX = "op.execute('create index concurrently half_done on notes (title)')"


@pytest.fixture
def impatient(copy: Path, server: str) -> Iterator[tuple[Path, psycopg.Connection]]:
    """The project with shorter waits, and somebody who holds a row of notes."""
    env = copy / "migrations" / "env.py"
    text = env.read_text()
    for patient, short in (('LOCK_TIMEOUT = "1s"', 'LOCK_TIMEOUT = "50ms"'), ("SECONDS = 0.5", "SECONDS = 0.05")):
        assert text.count(patient) == 1
        text = text.replace(patient, short)
    env.write_text(text)
    assert run(".venv/bin/flask db upgrade", copy, **development(server)).returncode == 0
    with closing(psycopg.connect(server)) as holder:
        holder.execute(A_ROW)
        holder.commit()
        holder.execute("select * from notes for update")
        yield copy, holder


@pytest.mark.parametrize(
    "body",
    [
        UPDATE,
        f"{TABLE}\n    {UPDATE}",
        "with op.batch_alter_table('notes') as batch:\n        batch.add_column(sa.Column('more', sa.Text))",
    ],
)
def test_a_locked_table_is_tried_again(impatient: tuple[Path, psycopg.Connection], server: str, body: str):
    """The wait for a lock is short, because whatever comes meanwhile queues behind it. What the run has done before
    stays done."""
    project, holder = impatient
    follow(project, "before", after="0001", body="op.create_table('before', sa.Column('id', sa.Integer))")
    follow(project, "locked", after="before", body=body)
    command = [project / ".venv" / "bin" / "flask", "db", "upgrade"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environ = CLEAN | development(server) | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=project, env=environ, **pipes) as upgrade:
        said = ""
        while "attempt 1 of 10: a table is locked; trying again\n" not in said:
            line = upgrade.stdout.readline()
            assert line, said
            said += line
        holder.rollback()
        said += upgrade.stdout.read()
    assert upgrade.returncode == 0, said
    assert said.count("upgraded to before") == said.count("upgraded to locked") == 1


@pytest.mark.parametrize(
    "body",
    [
        f"{BLOCK}{INDEX}\n    {UPDATE}",
        f"{TABLE}\n    {BLOCK}pass\n    {UPDATE}",
        f"{TABLE}\n    op.execute('COMMIT')\n    {UPDATE}",
        f"{TABLE}\n    op.get_bind().commit()\n    {UPDATE}",
    ],
)
def test_what_is_committed_in_part_is_not_tried_again(
    impatient: tuple[Path, psycopg.Connection], server: str, body: str
):
    """The first error is shown, with its line; what the run has done before stays done."""
    project, _ = impatient
    follow(project, "before", after="0001", body="op.create_table('before', sa.Column('id', sa.Integer))")
    follow(project, "locked", after="before", body=body)
    done = run(".venv/bin/flask db upgrade", project, **development(server))
    assert done.returncode == 1
    first, last = done.stdout.splitlines()
    assert first == "upgraded to before: before."
    assert "canceling statement due to lock timeout" in last
    assert last.endswith("; what the migration has done up to its last commit is not undone")
    with psycopg.connect(server) as connection:
        assert connection.execute("select version_num from alembic_version").fetchall() == [("before",)]


def test_an_index_that_fails_concurrently_is_named(impatient: tuple[Path, psycopg.Connection], server: str):
    """Postgres leaves it, and it is invalid. A second attempt would say that it exists."""
    project, _ = impatient
    body = f"{BLOCK}op.execute(\"set lock_timeout = '50ms'\")\n        op.execute('drop index concurrently pk_missing')"
    follow(project, "locked", after="0001", body=body)
    done = run(".venv/bin/flask db upgrade", project, **development(server))
    assert "an index that was built CONCURRENTLY may be left, and is invalid: drop it" in done.stdout


def test_a_migration_that_commits_by_itself_is_applied(copy: Path, server: str):
    """The statements after its commit count as well, and so does its version."""
    body = f"{TABLE}\n    op.get_bind().commit()\n    op.create_table('whole', sa.Column('id', sa.Integer))"
    follow(copy, "commits", after="0001", body=body)
    follow(copy, "last", after="commits")
    done = run(".venv/bin/flask db upgrade", copy, **development(server))
    assert done.returncode == 0, done.stdout
    with psycopg.connect(server) as connection:
        assert {"half", "whole"} <= tables(connection)
        assert connection.execute("select version_num from alembic_version").fetchall() == [("last",)]
