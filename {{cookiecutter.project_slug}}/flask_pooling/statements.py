"""`run`, for single statements."""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa
from flask import current_app
from flask_sqlalchemy.session import Session
from sqlalchemy import Executable, Row
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import lazyload
from sqlalchemy.sql import visitors

from flask_pooling.engine import needs_transactions

if TYPE_CHECKING:
    from flask_pooling.extension import Pooling

# What a session may be asked to do with a cursor of the server, which lives in a transaction. `run` takes all rows.
FOR_A_CURSOR = {"stream_results": False, "yield_per": None}
GET_BIND = Session.get_bind  # Flask-SQLAlchemy's way to choose an engine; an app's own session may have another


def run(
    statement: Executable, parameters: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
) -> Sequence[Row[Any]]:
    """Run one statement that is a whole transaction by itself, and return its rows.

    It takes one round trip where BEGIN, the statement and COMMIT take three; behind PgBouncer, if the role has its time
    limits in the database (`flask pool limit`). The connection is back in the pool before the rows are looked at. Rows
    have columns, not objects: `select(Note)` gives `row.id` and `row.title`, and no relationship. With a list of
    parameters it is one transaction as well, of more round trips.

    Inside a transaction of `db.session` it is a part of that: it sees what the session wrote, a rollback undoes it, and
    it takes no second connection. The statement goes to the database of its own table (`__bind_key__`).

    A `SET` does not belong here: outside a transaction it stays on the connection, for whoever gets that next.
    """
    state: Pooling = current_app.extensions["flask_pooling"]
    if isinstance(statement, sa.Select) and state.has_joined_relationships and _models_in(statement):
        statement = statement.options(lazyload("*"))  # or the join would add columns, and rows
    if FOR_A_CURSOR.keys() & statement.get_execution_options():
        statement = statement.execution_options(**FOR_A_CURSOR)
    engines, scoped = state.db.engines, state.db.session
    clause = statement if len(engines) == 1 else _table_with_a_bind(statement)
    if scoped.registry.has() or scoped.session_factory.class_.get_bind is not GET_BIND:
        session = scoped()
        if session.in_transaction():
            if session.autoflush:
                session.flush()
            connection = session.connection(bind_arguments={"clause": clause})
            return _rows(connection.execute(statement, parameters))
        bind = session.get_bind(clause=clause)
    else:
        # To make a session only to ask it for the engine would cost as much as the statement.
        bind = engines[clause.metadata.info["bind_key"] if isinstance(clause, sa.Table) else None]
    if isinstance(bind, Connection):  # a test that rolls back has put one in the place of the engine
        return _rows(bind.execute(statement, parameters))
    one_by_one = parameters is not None and not isinstance(parameters, Mapping)
    with bind.begin() if one_by_one else _connect(state, bind) as connection:
        return _rows(connection.execute(statement, parameters))


def _models_in(statement: "sa.Select[Any]") -> list[Any]:
    return [described for described in statement.column_descriptions if described.get("entity") is not None]


def _rows(result: "sa.CursorResult[Any]") -> Sequence[Row[Any]]:
    return result.all() if result.returns_rows else []


def _table_with_a_bind(statement: Any) -> Any:
    """The table that decides the database, as Flask-SQLAlchemy wants to be asked for it."""
    for part in visitors.iterate(statement):
        if isinstance(part, sa.Table) and part.metadata.info.get("bind_key") is not None:
            return part
    return statement


def _connect(state: "Pooling", bind: Engine) -> AbstractContextManager[Connection]:
    if needs_transactions(bind):
        return bind.begin()
    if bind not in state.autocommit:
        state.autocommit[bind] = bind.execution_options(isolation_level="AUTOCOMMIT")
    return state.autocommit[bind].connect()
