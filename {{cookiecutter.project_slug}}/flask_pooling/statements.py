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

# The events that a statement sets off in a session. Where one of them has a listener, the session runs the statement.
SESSION_EVENTS = (
    *("do_orm_execute", "after_begin", "after_transaction_create", "after_transaction_end", "before_commit"),
    *("after_commit", "after_rollback", "after_soft_rollback"),
)
LISTENERS = operator.attrgetter(*SESSION_EVENTS)
OF_A_CURSOR = ("stream_results", "yield_per")
# Options of an engine that mean something in a transaction only.
OF_A_TRANSACTION = frozenset({"isolation_level", "postgresql_readonly", "postgresql_deferrable", *OF_A_CURSOR})


def run(
    statement: Executable, parameters: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
) -> Sequence[Row[Any]]:
    """Run one statement that is a whole transaction by itself, and return its rows.

    It takes one round trip where BEGIN, the statement and COMMIT take three; behind PgBouncer, if the role has its time
    limits in the database (`flask pool limit`). The connection is back in the pool before the rows are looked at. Rows
    have columns, not objects: `select(Note)` gives `row.id` and `row.title`, named as the attributes are, and no
    relationship. With a list of parameters it is one transaction as well, of more round trips.

    Inside a transaction of `db.session` it is a part of that: it sees what the session wrote, a rollback undoes it, and
    it takes no second connection. The statement goes to the database of its own table (`__bind_key__`).

    What is attached to sessions counts here, too. With a listener for a session's events, a session class of your own,
    or execution options of sessions, `db.session` runs the statement, in a transaction. There is a transaction as well
    where the engine has an isolation level other than READ COMMITTED, or a listener for `begin`.

    A `SET` does not belong here: outside a transaction it stays on the connection, for whoever gets that next. Nor does
    `with_for_update`: the lock would end with the statement.

    :raises ArgumentError: the statement asks for what rows cannot have.
    """
    db: SQLAlchemy = current_app.extensions["flask_pooling"].db
    session = _session_to_look_at(db)
    for_a_connection = _for_a_connection(statement)
    if for_a_connection is None or session.in_transaction() or not _is_plain(session):
        return _run_by_session(db.session(), len(db.engines), statement, parameters)
    bind = _bind(session, len(db.engines), statement)
    if isinstance(bind, Connection):  # a test that rolls back has put one in the place of the engine
        return _rows(bind.execute(for_a_connection, parameters))
    is_many = parameters is not None and not isinstance(parameters, Mapping)
    with bind.connect() as connection:
        if is_many or _wants_transactions(connection):
            with connection.begin():
                return _rows(connection.execute(for_a_connection, parameters))
        # An engine with this option would cost more: it makes SQLAlchemy look for listeners at every step.
        connection.execution_options(isolation_level="AUTOCOMMIT")
        return _rows(connection.execute(for_a_connection, parameters))


def _rows(result: Result[Any]) -> Sequence[Row[Any]]:
    try:
        return result.all()
    except ResourceClosedError:  # it is of a statement that returns none, and no kind of result says so beforehand
        return []


# --- the session -----------------------------------------------------------------------------------------------------


def _session_to_look_at(db: SQLAlchemy) -> Any:
    """The current session. Where there is none yet, one that is kept to be looked at: it has the same listeners, and to
    make one for each request would cost as much as the statement."""
    factory = db.session.session_factory
    if db.session.registry.has() or not isinstance(factory, sessionmaker) or "execution_options" in factory.kw:
        return db.session()
    return _kept(factory)


@functools.lru_cache(maxsize=8)
def _kept(factory: "sessionmaker[Any]") -> Any:
    return factory()


def _is_plain(session: Any) -> bool:
    """Whether this is Flask-SQLAlchemy's own session, with nothing attached that a statement would meet."""
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


# For statements that are built once.
_known: "WeakKeyDictionary[Executable, Executable | None]" = WeakKeyDictionary()


def _for_a_connection(statement: Executable) -> Executable | None:
    """The statement as a connection gives the rows that a session would. None: only a session knows the names of its
    values."""
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
    """The statement with columns in the place of models, named as the attributes are."""
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
    """The mapper, if this is a model or an alias of one."""
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
    """Whether a connection, to which a model is the columns that are loaded at once, gives a row of its attributes."""
    has_all = _has_the_names_of_its_table(mapper) and not any(each.deferred for each in mapper.column_attrs)
    return has_all and all(each.lazy not in {"joined", False} for each in mapper.relationships)


# --- the database ----------------------------------------------------------------------------------------------------


def _bind(session: Any, engines: int, statement: Any) -> Engine | Connection:
    """The first table that has a database of its own decides. Flask-SQLAlchemy looks at the table of a write only."""
    for part in visitors.iterate(statement) if engines > 1 else ():
        if isinstance(part, sa.Table) and part.metadata.info.get("bind_key") is not None:
            statement = part
            break
    bind: Engine | Connection = session.get_bind(clause=statement)
    return bind


def _wants_transactions(connection: Connection) -> bool:
    """Whether AUTOCOMMIT would weaken or pass by what the engine was given."""
    engine = connection.engine
    ends = engine.dispatch.commit or engine.dispatch.rollback
    if needs_transactions(engine) or ends or not OF_A_TRANSACTION.isdisjoint(engine.get_execution_options()):
        return True
    return engine.dialect.name == "postgresql" and connection.default_isolation_level != "READ COMMITTED"
