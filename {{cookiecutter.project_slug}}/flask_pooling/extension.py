"""The Flask extension: `flask_pooling.init_app(app, db)` after `db.init_app(app)`, and `run` for single statements."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sqlalchemy as sa
from flask import Flask, current_app
from flask_sqlalchemy import SQLAlchemy
from flask_sqlalchemy.session import Session
from sqlalchemy import Executable, Row
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.orm import lazyload
from sqlalchemy.sql import visitors

from flask_pooling import cli, engine, health, metrics, middleware, page
from flask_pooling.settings import Settings, SettingsError, dead_keys

log = logging.getLogger(__name__)

# What a session may be asked to do with a cursor of the server, which lives in a transaction. `run` takes all rows.
FOR_A_CURSOR = {"stream_results": False, "yield_per": None}
GET_BIND = Session.get_bind  # Flask-SQLAlchemy's way to choose an engine; an app's own session may have another


@dataclass(frozen=True, kw_only=True)
class Pooling:
    """What the extension keeps in `app.extensions["flask_pooling"]`."""

    db: SQLAlchemy
    settings: Settings
    process: str
    prober: health.Prober
    probe_app: Flask
    autocommit: dict[Engine, Engine] = field(default_factory=dict)

    @cached_property
    def has_joined_relationships(self) -> bool:
        """Whether a model has a relationship with `lazy="joined"`."""
        model: Any = self.db.Model
        mappers = model.registry.mappers
        return any(each.lazy in {"joined", False} for mapper in mappers for each in mapper.relationships)


def init_app(app: Flask, db: SQLAlchemy, settings: Settings | None = None, *, process: str = engine.CLI) -> None:
    """Watch the engines of `db`, and add /livez, /readyz, the metrics and `flask pool`.

    :param settings: read from the environment when not given.
    :param process: `web` for a worker of gunicorn, the name of a job in APP_JOBS, or `cli` for anything else.
    :raises SettingsError: a key that Flask-SQLAlchemy ignores is in `app.config`, or the plan does not count a pool.
    """
    settings = settings or Settings.load()
    if process not in {engine.WEB, engine.CLI, *settings.app_jobs}:
        raise SettingsError([f"the process {process!r} is neither web nor cli; add it to APP_JOBS or correct it"])
    with app.app_context():
        engines = dict(db.engines)
    if problems := [*dead_keys(app.config), *_not_counted(engines, settings, process)]:
        raise SettingsError(problems)
    for key, each in engines.items():
        engine.watch(each, settings, process, is_own=key is None)
        metrics.watch(each, process)
    prober = health.Prober(engines[None])
    # What the port of the probes serves: without the app's own hooks, since a guard for clients would turn probes away.
    alone = Flask("flask_pooling", static_folder=None)
    known = Pooling(db=db, settings=settings, process=process, prober=prober, probe_app=alone)
    for served in (app, alone):
        served.extensions["flask_pooling"] = known
        for blueprint in (health.bp, metrics.bp, page.bp):
            served.register_blueprint(blueprint)
    app.wsgi_app = middleware.Measured(app, settings)  # type: ignore[method-assign]  # as Flask's manual does it
    if settings.in_production and not middleware.has_the_plan(process):
        app.before_request(middleware.refuse_without_the_plan)
    cli.register(app, type(settings))


def _not_counted(engines: Mapping[str | None, Engine], settings: Settings, process: str) -> list[str]:
    """Pools that could open more connections than the plan gives to this process. A shell opens one when it needs it,
    and has DB_RESERVED_CONNECTIONS for that."""
    on_postgres = {key: each for key, each in engines.items() if each.dialect.name == "postgresql"}
    if process == engine.CLI:
        return []
    planned = engine.QueuePool.of(settings, process)
    most = planned.size + planned.max_overflow
    problems = []
    for key, each in on_postgres.items():
        where = "SQLALCHEMY_ENGINE_OPTIONS" if key is None else f"SQLALCHEMY_BINDS[{key!r}]"
        options = "**flask_pooling.engine_options(settings, url, process=process)"
        remedy = f"set it to {{{options}}}" if key is None else f'set it to {{"url": url, {options}}}'
        pool = each.pool
        if isinstance(pool, sa.QueuePool):
            size, overflow = pool.size(), metrics.most(pool) - pool.size()
            if size < 1 or overflow < 0 or size + overflow > most:
                problems.append(
                    f"{where}: its pool may open {size} + {overflow} connections, and the plan counts {most}; {remedy}"
                )
        elif key is None or not isinstance(pool, sa.NullPool):
            problems.append(f"{where}: the plan does not count a {type(pool).__name__}; {remedy}")
    binds = len(on_postgres) - (None in on_postgres)
    if binds > settings.db_binds:
        names = ", ".join(repr(key) for key in on_postgres if key is not None)
        problems.append(
            f"DB_BINDS={settings.db_binds}: SQLALCHEMY_BINDS has {binds} on Postgres ({names}), and the plan counts"
            f" each; set DB_BINDS={binds}"
        )
    return problems


def run(
    statement: Executable, parameters: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None
) -> Sequence[Row[Any]]:
    """Run one statement that is a whole transaction by itself, and return its rows.

    It takes one round trip where BEGIN, the statement and COMMIT take three (not behind PgBouncer). The connection is
    back in the pool before the rows are looked at. Rows have columns, not objects: `select(Note)` gives `row.id` and
    `row.title`, and no relationship. With a list of parameters it is one transaction as well, of more round trips.

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


def _connect(state: Pooling, bind: Engine) -> AbstractContextManager[Connection]:
    if state.settings.db_pooler != "none" and bind.dialect.name == "postgresql":
        return bind.begin()  # the time limits reach the server inside a transaction only
    if bind not in state.autocommit:
        state.autocommit[bind] = bind.execution_options(isolation_level="AUTOCOMMIT")
    return state.autocommit[bind].connect()
