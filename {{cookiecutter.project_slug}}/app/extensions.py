"""The database, unbound: the factory binds it to an app."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from flask import current_app
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Executable, MetaData
from sqlalchemy.engine import Connection
from sqlalchemy.orm import DeclarativeBase

from app.pools import RequestSession


class Base(DeclarativeBase):
    # Names that migrations can refer to, the same on every database.
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


db = SQLAlchemy(model_class=Base, session_options={"class_": RequestSession})


def run(statement: Executable, values: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Run one statement that is a whole transaction by itself, and return its rows.

    It costs one round trip, where BEGIN and COMMIT around it would make three, and the connection is free again before
    the rows are looked at. For more than one statement use `db.session` and `db.session.commit()`.
    """
    connect: Callable[[], AbstractContextManager[Connection]] = current_app.extensions["one_statement"]
    with connect() as connection:
        result = connection.execute(statement, values)
        names, rows = tuple(result.keys()), result.all()
    return [dict(zip(names, row, strict=True)) for row in rows]
