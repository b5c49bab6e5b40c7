"""Migrations: they lead to the models and back again, on both databases, and several copies may start at once."""

import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from flask import Flask
from flask_migrate import downgrade, upgrade

from app import create_app
from app.config import Settings
from app.extensions import Base, db


@pytest.fixture
def empty(
    environ: dict[str, str], database_kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[dict[str, str]]:
    """An environment whose database has nothing in it."""
    if database_kind == "sqlite":
        yield environ | {"DATABASE_URL": f"sqlite:///{tmp_path}/empty.db"}
        return
    with create_app(Settings.from_env(environ), web=False).app_context():
        drop_everything()
    request.getfixturevalue("full_again")
    yield environ


@pytest.fixture(scope="module")
def full_again(environ_for: Any) -> Iterator[None]:
    """For the tests of other files."""
    yield
    with create_app(Settings.from_env(environ_for()), web=False).app_context():
        drop_everything()
        upgrade()


def drop_everything() -> None:
    with db.engine.begin() as connection:
        Base.metadata.drop_all(connection)
        connection.execute(sa.text("drop table if exists alembic_version"))


@pytest.fixture
def app(empty: dict[str, str]) -> Iterator[Flask]:
    made = create_app(Settings.from_env(empty), web=False)
    yield made
    with made.app_context():
        db.engine.dispose()


def differences(app: Flask) -> list[Any]:
    with app.app_context(), db.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        return list(compare_metadata(context, Base.metadata))


def test_models_and_migrations_agree(app: Flask) -> None:
    """Whoever changes a model and forgets the migration is told here."""
    with app.app_context():
        upgrade()
    assert differences(app) == []


def test_down_leaves_nothing_and_up_again_works(app: Flask) -> None:
    """Every migration can be undone."""
    with app.app_context():
        upgrade()
        downgrade(revision="base")
        assert set(sa.inspect(db.engine).get_table_names()) <= {"alembic_version"}
        upgrade()
    assert differences(app) == []


def test_a_second_upgrade_finds_nothing_to_do(app: Flask) -> None:
    """As on every deploy that changes no table."""
    with app.app_context():
        upgrade()
        upgrade()


@pytest.mark.postgres
@pytest.mark.direct
def test_a_migration_keeps_no_connection(app: Flask) -> None:
    """NullPool: what it took out of the reserve is back at once."""
    with app.app_context():
        assert type(db.engine.pool) is sa.NullPool
        upgrade()
        ours = sa.text("select count(*) from pg_stat_activity where application_name like '%/cli'")
        with db.engine.connect() as connection:
            assert connection.scalar(ours) == 1  # this one


@pytest.mark.postgres
def test_copies_that_start_at_once_do_not_collide(empty: dict[str, str], app: Flask) -> None:
    """One migrates, the others wait for it and find nothing left to do."""
    copies = []
    for _ in range(4):
        copy = os.fork()
        if copy == 0:
            failed = True
            try:
                with create_app(Settings.from_env(empty), web=False).app_context():
                    upgrade()
                failed = False
            finally:
                os._exit(failed)
        copies.append(copy)
    assert [os.waitpid(copy, 0)[1] for copy in copies] == [0] * 4
    assert differences(app) == []


@pytest.mark.postgres
def test_a_locked_table_is_tried_again(
    app: Flask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The wait for a lock is short, because whatever comes meanwhile queues behind it. Here it is shorter still."""
    copy = tmp_path / "migrations"
    shutil.copytree(app.extensions["migrate"].directory, copy)
    env = (copy / "env.py").read_text()
    for patient, impatient in {
        'LOCK_TIMEOUT = "1s"': 'LOCK_TIMEOUT = "50ms"',
        "SECONDS = 0.5": "SECONDS = 0.05",
    }.items():
        assert env.count(patient) == 1
        env = env.replace(patient, impatient)
    (copy / "env.py").write_text(env)

    with app.app_context():
        upgrade()
        with db.engine.connect() as holder:
            holder.execute(sa.text("lock table notes in access share mode"))

            def release(record: logging.LogRecord) -> bool:
                holder.rollback()
                return True

            monkeypatch.setattr(logging.getLogger("alembic.env"), "filters", [release])
            start = time.monotonic()
            downgrade(str(copy), revision="base")
            assert time.monotonic() - start < 4
    assert [record.getMessage() for record in caplog.records if record.name == "alembic.env"] == [
        "attempt 1 of 10: a table is locked; trying again"
    ]


@pytest.mark.postgres
def test_a_server_that_is_not_there_is_said_in_one_line(environ: dict[str, str]) -> None:
    """Without a traceback, and without the password."""
    nowhere = environ | {"DATABASE_URL": "postgresql://u:hunter2@127.0.0.1:1/d"}
    with create_app(Settings.from_env(nowhere), web=False).app_context(), pytest.raises(SystemExit) as caught:
        upgrade()
    assert str(caught.value).startswith("the database cannot be reached: ")
    assert "hunter2" not in str(caught.value)
