"""Migrations: they lead to the models and back again, on both databases."""

from collections.abc import Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from flask import Flask
from flask_migrate import downgrade, upgrade

from app.extensions import db


@pytest.fixture
def empty(app: Flask) -> Iterator[None]:
    """A database with nothing in it; the tables are there again afterwards."""
    with app.app_context():
        drop_everything()
        yield
        drop_everything()
        upgrade()


def drop_everything() -> None:
    for key, metadata in db.metadatas.items():
        with db.engines[key].begin() as connection:
            metadata.drop_all(connection)
            connection.execute(sa.text("drop table if exists alembic_version"))


def differences() -> list[Any]:
    found: list[Any] = []
    for key, metadata in db.metadatas.items():
        with db.engines[key].connect() as connection:
            context = MigrationContext.configure(connection, opts={"compare_type": True})
            found += compare_metadata(context, metadata)
    return found


@pytest.mark.usefixtures("empty")
def test_models_and_migrations_agree() -> None:
    """It fails if a model was changed without a migration. A second upgrade has nothing to do."""
    upgrade()
    upgrade()
    assert differences() == []


@pytest.mark.usefixtures("empty")
def test_down_leaves_nothing_and_up_again_works() -> None:
    """Every migration can be undone."""
    upgrade()
    downgrade(revision="base")
    assert set(sa.inspect(db.engine).get_table_names()) <= {"alembic_version"}
    upgrade()
    assert differences() == []


@pytest.mark.sqlite
def test_no_two_migrations_follow_the_same_one(app: Flask) -> None:
    """As after a merge of two branches: `flask db merge heads` joins them."""
    assert len(ScriptDirectory(app.extensions["migrate"].directory).get_heads()) <= 1
