"""The Flask extension: `flask_pooling.init_app(app, db)` in place of `db.init_app(app)`."""

import logging
import os
import weakref
from dataclasses import dataclass

from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.engine import Engine

from flask_pooling import cli, engine, health, metrics, middleware, options, page, version
from flask_pooling import process as processes
from flask_pooling.settings import Settings, SettingsError, dead_keys
from flask_pooling.sizing import Plan

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, eq=False)
class Pooling:
    """The extension's state, in `app.extensions["flask_pooling"]`."""

    app: Flask
    db: SQLAlchemy
    settings: Settings
    process: str
    first: Engine  # of the database that the budget check and readiness ask
    engines: dict[str, tuple[Engine, str]]  # of each server, with the application_name of its web workers' connections
    prober: health.Prober
    probe_app: Flask

    def servers(self) -> list[tuple[Plan, Engine, str]]:
        """Return the plan of each Postgres server, with the engine that asks it and its application_name."""
        plans = self.settings.plan.servers
        every = [(plans[name], *asked) for name, asked in self.engines.items()]
        return [each for each in every if each[1].dialect.name == "postgresql"]


registered: "weakref.WeakSet[Pooling]" = weakref.WeakSet()  # of this process; gunicorn's hooks look at them


def init_app(
    app: Flask,
    db: SQLAlchemy,
    settings: Settings | None = None,
    *,
    pools: options.Pools | None = None,
    process: str | None = None,
) -> None:
    """Give the engines of `db` the pools of the plan, and the app /livez, /readyz, the metrics and `flask pool`. Call
    it in place of `db.init_app(app)`.

    The app's own configuration stays, and has the last word on every URL. An app under test, or on SQLite, has the
    engines that it had.

    :param settings: read from the environment when not given.
    :param pools: the pool of a web worker or a job, and of any other process, whatever the database is.
    :param process: `web` for a worker of gunicorn, the name of a job in APP_JOBS, or `cli` for anything else. By
        default the process finds out what it is.
    :raises SettingsError: with all problems of the settings and of the engines' options.
    """
    processes.refuse_lost_hooks()
    if "sqlalchemy" in app.extensions:
        how = "write db = SQLAlchemy() and flask_pooling.init_app(app, db), which calls db.init_app(app)"
        raise SettingsError([f"this app has its database already, without the plan: {how}"])
    if problems := [*version.problems()]:
        raise SettingsError(problems)
    settings = settings or Settings.load(name=app.import_name.partition(".")[0].strip("_"))
    kind = processes.of(settings) if process is None else processes.checked(process, settings)
    merged = options.merge(app, db, settings, kind, pools)
    given = app.config if settings.strict else {**os.environ, **app.config}
    problems = [*dead_keys(given, merged.options.get(None)), *merged.problems]
    if kind != processes.CLI and not problems:
        problems += _more_binds_than_planned(merged, settings)
    if problems:
        raise SettingsError(problems)
    options.bind(app, db, merged)
    with app.app_context():
        engines = dict(db.engines)
    for key, each in engines.items():
        engine.empty_at_fork(each)
        if key in merged.watched:
            engine.watch(each, settings, kind, is_own=key is None)
            metrics.watch(each, kind)
    first = engines.get(None) or next(iter(engines.values()))
    asked = {"": (first, merged.names[None])}
    for server in settings.db_bind_servers:
        if (key := server.split("+")[0]) in merged.names:
            asked[server] = engines[key], merged.names[key]
    # The port of the probes serves this app, without the owner's hooks: a guard for clients would turn probes away.
    alone = Flask("flask_pooling", static_folder=None)
    prober = health.Prober(first)
    known = Pooling(
        app=app, db=db, settings=settings, process=kind, first=first, engines=asked, prober=prober, probe_app=alone
    )
    registered.add(known)
    for served in (app, alone):
        served.extensions["flask_pooling"] = known
        for blueprint in (health.bp, metrics.bp, page.bp):
            served.register_blueprint(blueprint)
    app.wsgi_app = middleware.Measured(app)  # type: ignore[method-assign]  # as Flask's manual does it
    if settings.refuses_strangers and not processes.has_the_plan(kind):
        app.before_request(middleware.refuse_without_the_plan)
    cli.register(app, type(settings))


def _more_binds_than_planned(merged: options.Merged, settings: Settings) -> list[str]:
    """Name DB_BINDS if there are more Postgres databases than it says, and names that only DB_BIND_SERVERS has: the
    plan counts a pool for each. A shell has DB_RESERVED_CONNECTIONS for its connections."""
    elsewhere = [key for name in settings.db_bind_servers for key in name.split("+")]
    if missing := [repr(key) for key in elsewhere if key not in merged.options]:
        return [f"DB_BIND_SERVERS: {', '.join(missing)} is not in SQLALCHEMY_BINDS; leave it out"]
    watched = [key for key in merged.options if key not in {None, *elsewhere} and key in merged.watched]
    names = [repr(key) for key in watched if merged.options[key]["url"].get_backend_name() == "postgresql"]
    if len(names) <= settings.db_binds:
        return []
    said = f"SQLALCHEMY_BINDS has {len(names)} on Postgres ({', '.join(names)}), and the plan counts each"
    how = f"set DB_BINDS={len(names)}, or name those on another server in DB_BIND_SERVERS"
    return [f"DB_BINDS={settings.db_binds}: {said}; {how}"]
