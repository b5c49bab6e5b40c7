"""The database, unbound: the factory binds it to an app."""

from collections.abc import Mapping, Sequence
from typing import Any

from flask import current_app
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Executable, MetaData, Row
from sqlalchemy.engine import Engine
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


def run(statement: Executable, values: Mapping[str, Any] | None = None) -> Sequence[Row[Any]]:
    """Run one statement that is a whole transaction by itself, and return its rows.

    It costs one round trip, where BEGIN and COMMIT around it would make three, and the connection is free again before
    the rows are looked at. For more than one statement use `db.session` and `db.session.commit()`.
    """
    engine: Engine = current_app.extensions["statements"]
    with engine.begin() as connection:
        return connection.execute(statement, values).all()
