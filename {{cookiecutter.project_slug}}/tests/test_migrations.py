"""Migrations: they lead to the models and back again, on both databases."""

from collections.abc import Callable, Iterator
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
def others(make_app: Callable[..., Flask]) -> Iterator[set[str]]:
    """The tables that are not the models', such as PostGIS' own, in a database with nothing else in it. The models'
    tables are there again afterwards."""
    with make_app(web=False).app_context():  # a migration takes two connections, and the plan's pool may have one
        drop_everything()
        yield tables()
        drop_everything()
        upgrade()


def drop_everything() -> None:
    for key, metadata in db.metadatas.items():
        with db.engines[key].begin() as connection:
            metadata.drop_all(connection)
            connection.execute(sa.text("drop table if exists alembic_version"))


def tables() -> set[str]:
    return {name for engine in db.engines.values() for name in sa.inspect(engine).get_table_names()}


def differences(others: set[str]) -> list[Any]:
    found: list[Any] = []
    for key, metadata in db.metadatas.items():
        with db.engines[key].connect() as connection:
            only_ours = {"include_name": lambda name, kind, _: kind != "table" or name not in others}
            context = MigrationContext.configure(connection, opts={"compare_type": True, **only_ours})
            found += compare_metadata(context, metadata)
    return found


def test_models_and_migrations_agree(others: set[str]) -> None:
    """It fails if a model was changed without a migration. A second upgrade has nothing to do."""
    upgrade()
    upgrade()
    assert differences(others) == []


def test_down_leaves_nothing_and_up_again_works(others: set[str]) -> None:
    """Every migration can be undone."""
    upgrade()
    downgrade(revision="base")
    assert tables() <= others | {"alembic_version"}
    upgrade()
    assert differences(others) == []


@pytest.mark.sqlite
def test_no_two_migrations_follow_the_same_one(app: Flask) -> None:
    """As after a merge of two branches: `flask db merge heads` joins them."""
    assert len(ScriptDirectory(app.extensions["migrate"].directory).get_heads()) <= 1
