"""`run`, for single statements."""

import functools
import operator
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import sqlalchemy as sa
from flask import current_app
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.session import Session
from sqlalchemy import Executable, Row
from sqlalchemy.engine import Connection, Engine, Result
from sqlalchemy.exc import ArgumentError, ResourceClosedError
from sqlalchemy.orm import Mapper, QueryableAttribute, sessionmaker
from sqlalchemy.orm.context import FromStatement
from sqlalchemy.sql import visitors

from flask_pooling.engine import needs_transactions

# The events of a session that a statement causes. If one of them has a listener, the session runs the statement.
SESSION_EVENTS = (
    *("do_orm_execute", "after_begin", "after_transaction_create", "after_transaction_end", "before_commit"),
    *("after_commit", "after_rollback", "after_soft_rollback"),
)
LISTENERS = operator.attrgetter(*SESSION_EVENTS)
OF_A_CURSOR = ("stream_results", "yield_per")
# Options of an engine that have a meaning only in a transaction.
OF_A_TRANSACTION = frozenset({"isolation_level", "postgresql_readonly", "postgresql_deferrable", *OF_A_CURSOR})


def run(
    statement: Executable, parameters: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
) -> Sequence[Row[Any]]:
    """Run one statement, which is a whole transaction, and return its rows.

    It takes one round trip, where BEGIN, the statement and COMMIT take three. Behind PgBouncer that holds if the role
    has its time limits in the database (`flask pool limit`). The connection is back in the pool before you look at the
    rows. A row has columns, named as the attributes are, and no relationship: `select(Note)` gives `row.id` and
    `row.title`. With a list of parameters it is one transaction of more round trips.

    Inside a transaction of `db.session` it is a part of that: it sees what the session wrote, a rollback undoes it, and
    it takes no second connection. The statement goes to the database of its own table (`__bind_key__`).

    Listeners for a session's events, a session class of your own and execution options of sessions have their effect:
    then `db.session` runs the statement, in a transaction. There is a transaction as well if the engine has another
    isolation level than READ COMMITTED, or a listener for `begin`.

    Do not run a `SET`: outside a transaction it stays on the connection for the next user. Do not use
    `with_for_update`: the lock would end with the statement.

    :raises ArgumentError: the statement asks for objects or a cursor.
    """
    db: SQLAlchemy = current_app.extensions["flask_pooling"].db
    session = _session_to_look_at(db)
    for_a_connection = _for_a_connection(statement)
    if for_a_connection is None or session.in_transaction() or not _is_plain(session):
        return _run_by_session(db.session(), len(db.engines), statement, parameters)
    bind = _bind(session, len(db.engines), statement)
    if isinstance(bind, Connection):  # a test that rolls back has put it in the place of the engine
        return _rows(bind.execute(for_a_connection, parameters))
    is_many = parameters is not None and not isinstance(parameters, Mapping)
    with bind.connect() as connection:
        if is_many or _wants_transactions(connection):
            with connection.begin():
                return _rows(connection.execute(for_a_connection, parameters))
        # An engine with this option would cost more: SQLAlchemy would look for listeners at every step.
        connection.execution_options(isolation_level="AUTOCOMMIT")
        return _rows(connection.execute(for_a_connection, parameters))


def _rows(result: Result[Any]) -> Sequence[Row[Any]]:
    try:
        return result.all()
    except ResourceClosedError:  # the statement returns no rows; not every kind of result says so beforehand
        return []


# --- the session -----------------------------------------------------------------------------------------------------


def _session_to_look_at(db: SQLAlchemy) -> Any:
    """Return the current session. If there is none yet, return one that is kept for this: it has the same listeners,
    and a new one for each request would cost as much as the statement."""
    factory = db.session.session_factory
    if db.session.registry.has() or not isinstance(factory, sessionmaker) or "execution_options" in factory.kw:
        return db.session()
    return _kept(factory)


@functools.lru_cache(maxsize=8)
def _kept(factory: "sessionmaker[Any]") -> Any:
    return factory()


def _is_plain(session: Any) -> bool:
    """Return whether this is Flask-SQLAlchemy's own session, with nothing attached that affects a statement."""
    kind = type(session)  # made by sessionmaker, for listeners
    return (
        kind.__bases__ == (Session,)
        and kind.get_bind is Session.get_bind
        and kind.execute is Session.execute
        and not getattr(session, "execution_options", None)  # since SQLAlchemy 2.1
        and not any(LISTENERS(session.dispatch))
    )


def _run_by_session(session: Any, engines: int, statement: Executable, parameters: Any) -> Sequence[Row[Any]]:
    chosen = {"bind": _bind(session, engines, statement)} if type(session).get_bind is Session.get_bind else {}
    with nullcontext() if session.in_transaction() else session.begin():
        if session.autoflush:
            session.flush()
        rows = _rows(session.execute(_with_columns(statement), parameters, bind_arguments=chosen))
        if rows and any(sa.inspect(value, raiseerr=False) for value in rows[0]):
            raise ArgumentError("run() gives rows, not objects; name the columns, as in returning(Note.id, Note.title)")
        return rows


# --- the statement ---------------------------------------------------------------------------------------------------


# A cache, for statements that are built once.
_known: "WeakKeyDictionary[Executable, Executable | None]" = WeakKeyDictionary()


def _for_a_connection(statement: Executable) -> Executable | None:
    """Rewrite the statement so that a connection gives the rows that a session would give. Return None if only a
    session knows the names of the values."""
    if (known := _known.get(statement, ...)) is not ...:
        return known
    for option in OF_A_CURSOR:
        if statement.get_execution_options().get(option):
            raise ArgumentError(f"run() takes all rows at once, so {option} has no effect; use db.session.execute")
    described = [getattr(statement, "entity_description", {}), *getattr(statement, "column_descriptions", ())]
    mappers = {sa.inspect(each["entity"]).mapper for each in described if each.get("entity") is not None}
    if isinstance(statement, sa.UpdateBase):
        _known[statement] = statement if all(map(_has_the_names_of_its_table, mappers)) else None
    else:
        _known[statement] = statement if all(map(_is_read_as_its_table, mappers)) else _with_columns(statement)
    return _known[statement]


def _with_columns(statement: Executable) -> Executable:
    """Put columns in the place of models, named as the attributes are."""
    if isinstance(statement, FromStatement):
        return statement.element
    if not isinstance(statement, sa.Select):
        return statement
    columns: list[Any] = []
    for described in statement.column_descriptions:
        expression: Any = described["expr"]
        if mapper := _mapper(expression):
            columns += [getattr(expression, each.key).label(each.key) for each in mapper.column_attrs]
        else:
            is_attribute = isinstance(expression, QueryableAttribute)
            columns.append(expression.label(described["name"]) if is_attribute else expression)
    return statement.with_only_columns(*columns, maintain_column_froms=True)


def _mapper(expression: Any) -> Mapper[Any] | None:
    """Return the mapper, if this is a model or an alias of one."""
    found = sa.inspect(expression, raiseerr=False)
    is_model = getattr(found, "is_mapper", False) or getattr(found, "is_aliased_class", False)
    return found.mapper if is_model else None


@functools.cache
def _has_the_names_of_its_table(mapper: Mapper[Any]) -> bool:
    return all(
        isinstance(each.columns[0], sa.Column) and each.key == each.columns[0].key for each in mapper.column_attrs
    )


@functools.cache
def _is_read_as_its_table(mapper: Mapper[Any]) -> bool:
    """Return whether a connection gives all attributes of a model. It reads only columns that are loaded at once."""
    has_all = _has_the_names_of_its_table(mapper) and not any(each.deferred for each in mapper.column_attrs)
    return has_all and all(each.lazy not in {"joined", False} for each in mapper.relationships)


# --- the database ----------------------------------------------------------------------------------------------------


def _bind(session: Any, engines: int, statement: Any) -> Engine | Connection:
    """Return the database of the first table with a `__bind_key__`. Flask-SQLAlchemy looks at a write's table only."""
    for part in visitors.iterate(statement) if engines > 1 else ():
        if isinstance(part, sa.Table) and part.metadata.info.get("bind_key") is not None:
            statement = part
            break
    bind: Engine | Connection = session.get_bind(clause=statement)
    return bind


def _wants_transactions(connection: Connection) -> bool:
    """Return whether AUTOCOMMIT would weaken a setting of the engine, or leave out a listener."""
    engine = connection.engine
    ends = engine.dispatch.commit or engine.dispatch.rollback
    if needs_transactions(engine) or ends or not OF_A_TRANSACTION.isdisjoint(engine.get_execution_options()):
        return True
    return engine.dialect.name == "postgresql" and connection.default_isolation_level != "READ COMMITTED"
