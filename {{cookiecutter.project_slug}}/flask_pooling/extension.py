"""The Flask extension: `flask_pooling.init_app(app, db)` after `db.init_app(app)`."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.engine import Engine

from flask_pooling import cli, engine, health, metrics, middleware, page
from flask_pooling.settings import Settings, SettingsError, dead_keys

log = logging.getLogger(__name__)


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
