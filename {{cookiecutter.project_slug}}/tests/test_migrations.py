"""Migrations: they lead to the models and back again, on both databases, and several instances may start at once."""

import logging
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from flask import Flask
from flask_migrate import downgrade, upgrade

from app.extensions import db
from tests.serving import ROOT, TOOLS, environment


@pytest.fixture
def empty(make_app: Callable[..., Flask]) -> Iterator[Flask]:
    """A shell's app, on a database with nothing in it; the tables are there again afterwards."""
    app = make_app(web=False)
    with app.app_context():
        drop_everything()
    yield app
    with app.app_context():
        drop_everything()
        upgrade()


def drop_everything() -> None:
    for key, metadata in db.metadatas.items():
        with db.engines[key].begin() as connection:
            metadata.drop_all(connection)
            connection.execute(sa.text("drop table if exists alembic_version"))


def differences(app: Flask) -> list[Any]:
    found: list[Any] = []
    with app.app_context():
        for key, metadata in db.metadatas.items():
            with db.engines[key].connect() as connection:
                context = MigrationContext.configure(connection, opts={"compare_type": True})
                found += compare_metadata(context, metadata)
    return found


def test_models_and_migrations_agree(empty: Flask) -> None:
    """Whoever changes a model and forgets the migration is told here. A second time there is nothing to do."""
    with empty.app_context():
        upgrade()
        upgrade()
    assert differences(empty) == []


def test_down_leaves_nothing_and_up_again_works(empty: Flask) -> None:
    """Every migration can be undone."""
    with empty.app_context():
        upgrade()
        downgrade(revision="base")
        assert set(sa.inspect(db.engine).get_table_names()) <= {"alembic_version"}
        upgrade()
    assert differences(empty) == []


@pytest.mark.postgres
def test_instances_that_start_at_once_do_not_collide(empty: Flask) -> None:
    """One migrates, the others wait for it and find nothing left to do."""
    words: list[str | Path] = [TOOLS / "flask", "db", "upgrade"]
    instances = [subprocess.Popen(words, env=environment(), cwd=ROOT) for _ in range(3)]
    assert [instance.wait(30) for instance in instances] == [0] * 3
    assert differences(empty) == []


OURS = """
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = {revision!r}, {before!r}, None, None


def upgrade():
    {upgrade}


def downgrade():
    pass
"""


@pytest.fixture
def migrations(empty: Flask, tmp_path: Path) -> Path:
    """A copy of the migrations, in which there may be more."""
    return shutil.copytree(empty.extensions["migrate"].directory, tmp_path / "migrations")


def add(migrations: Path, revision: str, upgrade: str) -> None:
    """One more, after the last one."""
    before = ScriptDirectory(str(migrations)).get_current_head()
    (migrations / "versions" / f"{revision}.py").write_text(
        OURS.format(revision=revision, before=before, upgrade=upgrade)
    )


@pytest.mark.sqlite
def test_a_table_that_sqlite_makes_anew_keeps_its_children(empty: Flask, migrations: Path) -> None:
    """SQLite changes a column by making the table anew; ON DELETE CASCADE would delete what refers to the old one."""
    tables = "op.create_table('parents', sa.Column('id', sa.Integer, primary_key=True), sa.Column('name', sa.Text))"
    tables += (
        "\n    op.create_table('children', sa.Column('id', sa.Integer, primary_key=True),"
        " sa.Column('parent_id', sa.Integer, sa.ForeignKey('parents.id', ondelete='CASCADE')))"
    )
    tables += (
        "\n    op.execute(\"insert into parents values (1, 'one')\"); op.execute('insert into children values (1, 1)')"
    )
    add(migrations, "9001", tables)
    add(
        migrations,
        "9002",
        "with op.batch_alter_table('parents', recreate='always') as batch:"
        " batch.add_column(sa.Column('more', sa.Text))",
    )
    with empty.app_context():
        upgrade(str(migrations))
        with db.engine.begin() as connection:
            assert connection.scalar(sa.text("select count(*) from children")) == 1
            assert connection.scalar(sa.text("pragma foreign_keys")) == 1
            connection.execute(sa.text("drop table children"))
            connection.execute(sa.text("drop table parents"))


@pytest.mark.sqlite
@pytest.mark.parametrize("fails", ["1 / 0", "op.execute('delete from parents')"])
def test_a_migration_that_fails_on_sqlite_leaves_nothing(empty: Flask, migrations: Path, fails: str) -> None:
    """As on Postgres: it is one transaction, whether it raises or leaves rows that refer to nothing."""
    tables = "op.create_table('parents', sa.Column('id', sa.Integer, primary_key=True))\n    "
    tables += "op.create_table('children', sa.Column('parent_id', sa.Integer, sa.ForeignKey('parents.id')))\n    "
    tables += "op.execute('insert into parents values (1)'); op.execute('insert into children values (1)')\n    "
    add(migrations, "9001", tables + fails)
    with empty.app_context():
        with pytest.raises((ZeroDivisionError, SystemExit), match=r"division by zero|would leave rows that refer"):
            upgrade(str(migrations))
        assert set(sa.inspect(db.engine).get_table_names()) & {"parents", "children"} == set()


@pytest.mark.postgres
def test_a_locked_table_is_tried_again(
    empty: Flask, migrations: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The wait for a lock is short, because whatever comes meanwhile queues behind it. Here it is shorter still."""
    env = (migrations / "env.py").read_text()
    for patient, impatient in (('LOCK_TIMEOUT = "1s"', 'LOCK_TIMEOUT = "50ms"'), ("SECONDS = 0.5", "SECONDS = 0.05")):
        assert env.count(patient) == 1
        env = env.replace(patient, impatient)
    (migrations / "env.py").write_text(env)
    add(migrations, "9001", "op.create_table('locked', sa.Column('id', sa.Integer))")
    with empty.app_context():
        upgrade(str(migrations))
        add(migrations, "9002", "op.drop_table('locked')")
        with db.engine.connect() as holder:
            holder.execute(sa.text("lock table locked in access share mode"))

            def release(record: logging.LogRecord) -> bool:
                holder.rollback()
                return True

            monkeypatch.setattr(logging.getLogger("migrations"), "filters", [release])
            start = time.monotonic()
            upgrade(str(migrations))
            assert time.monotonic() - start < 4
    said = [record.getMessage() for record in caplog.records if record.name == "migrations"]
    assert said == ["attempt 1 of 10: a table is locked; trying again"]
