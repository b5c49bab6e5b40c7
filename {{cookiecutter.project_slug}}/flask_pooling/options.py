"""Merge the plan's pool into the options that an app gives to its engines. The owner's options stay.

The app's configuration has the last word on every URL. An option that would break the plan is refused by name.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from psycopg.pq import Conninfo
from sqlalchemy.engine import URL

from flask_pooling import engine, urls
from flask_pooling.process import CLI, WEB
from flask_pooling.settings import Settings

Pools = tuple[type[engine.NullPool] | type[engine.QueuePool], type[engine.NullPool] | type[engine.QueuePool]]

# The plan sets these. All other options of a pool stay the owner's: pool_pre_ping, pool_recycle ...
SIZES = {"pool_size": "DB_POOL_SIZE", "max_overflow": "DB_MAX_OVERFLOW"}
PLANNED = {"poolclass", *SIZES}
OF_A_QUEUE = {"pool_timeout", "pool_use_lifo"}  # a NullPool takes neither: TypeError
AROUND_THE_PLAN = {
    "pool": "a pool of your own is not counted by the plan",
    "creator": "its connections would not have the plan's limits; for a password use SQLAlchemy's do_connect event",
}
AUTOCOMMIT = "every statement would be committed, and nothing rolled back; use flask_pooling.run for one statement"


@dataclass(kw_only=True)
class Merged:
    """The options of the engines of an app, by bind key. None is the first engine's key."""

    options: dict[str | None, dict[str, Any]]
    names: dict[str | None, str] = field(default_factory=dict)  # the application_name of our connections
    watched: set[str | None] = field(default_factory=set)  # the keys of engines that have the plan's pool
    problems: list[str] = field(default_factory=list)


def given(app: Flask, db: SQLAlchemy) -> dict[str | None, dict[str, Any]]:
    """Collect the options of each engine, with its URL, as Flask-SQLAlchemy does."""
    # The constructor's. There is no public way to ask for them. tests/library/test_options.py fails when this changes.
    always: dict[str, Any] = db._engine_options
    found: dict[str | None, dict[str, Any]] = {}
    for key, value in (app.config.get("SQLALCHEMY_BINDS") or {}).items():
        found[key] = {**always, **(value if isinstance(value, dict) else {"url": value})}
    first = {**always, **app.config.get("SQLALCHEMY_ENGINE_OPTIONS", {})}
    if (url := app.config.get("SQLALCHEMY_DATABASE_URI")) is not None:
        first["url"] = url
    if "url" in first:
        found[None] = {**found.get(None, {}), **first}
    return found


def merge(app: Flask, db: SQLAlchemy, settings: Settings, process: str, pools: Pools | None) -> Merged:
    """Put the plan's pool into the options of every engine that the plan counts.

    :param pools: the pool of a web worker or a job, and of any other process. By default Postgres outside of tests has
        a QueuePool and a NullPool, and any other engine is as the app makes it.
    """
    merged = Merged(options=given(app, db), names={None: settings.service_name})
    for key, theirs in merged.options.items():
        where = "SQLALCHEMY_ENGINE_OPTIONS" if key is None else f"SQLALCHEMY_BINDS[{key!r}]"
        is_postgres = str(theirs["url"]).startswith("postgres")
        if pools is None and (app.testing or not is_postgres):
            continue
        try:
            url = _usable(theirs["url"]) if is_postgres else sa.make_url(theirs["url"])
        except ValueError as error:
            merged.problems.append(f"{'SQLALCHEMY_DATABASE_URI' if key is None else where}: {error}")
            continue
        told = _told(url, theirs) if is_postgres else url
        pool = (pools or (engine.QueuePool, engine.NullPool))[process == CLI]
        ours = engine.engine_options(settings, told, process=process, pool=pool)
        merged.problems += _refused(theirs, ours, where, process)
        left = PLANNED if "pool_size" in ours else PLANNED | OF_A_QUEUE
        kept = {name: value for name, value in theirs.items() if name not in left}
        both = kept.get("connect_args", {}), ours["connect_args"]  # for Postgres, ours say what theirs say
        arguments = {**both[not is_postgres], **both[is_postgres]}
        merged.options[key] = {**ours, **kept, "connect_args": arguments, "url": url}
        merged.watched.add(key)
        merged.names[key] = urls.said(told).get("application_name") or settings.service_name
    return merged


def bind(app: Flask, db: SQLAlchemy, merged: Merged) -> None:
    """Call `db.init_app(app)` with these options."""
    options = {key: dict(each) for key, each in merged.options.items()}
    if (first := options.pop(None, None)) is not None:
        url = first.pop("url")
        # A string where the app had a string: migrations/env.py of older versions of Flask-Migrate reads it.
        app.config["SQLALCHEMY_DATABASE_URI"] = _as_given(app.config.get("SQLALCHEMY_DATABASE_URI"), url)
        app.config["SQLALCHEMY_ENGINE_OPTIONS"] = first
    app.config["SQLALCHEMY_BINDS"] = options
    always, db._engine_options = db._engine_options, {}  # the constructor's are merged already
    try:
        db.init_app(app)
    finally:
        db._engine_options = always


def _usable(url: Any) -> URL:
    """Return a URL of Postgres with psycopg as its driver.

    :raises ValueError: it cannot be used, or would change the driver in silence.
    """
    found: URL = urls.database_url(_text(url))
    means_psycopg2 = sa.make_url("postgresql://").get_dialect().driver == "psycopg2"  # SQLAlchemy 2.0's default
    if _text(url).startswith("postgresql:") and means_psycopg2 and importlib.util.find_spec("psycopg2"):
        raise ValueError("postgresql:// is psycopg2 here, and the pools need psycopg 3; write postgresql+psycopg://")
    return found


def _text(url: Any) -> str:
    return url.render_as_string(hide_password=False) if isinstance(url, URL) else str(url)


def _as_given(theirs: Any, url: Any) -> str:
    """Return the app's own text with the driver, if it means the same. SQLAlchemy would write %2F for a /, and the
    env.py of Flask-Migrate before 2.5 fails on that."""
    given, rendered = _text(theirs).partition("://"), _text(url)
    same = rendered.partition("://")[0] + "://" + given[2]
    return same if given[1] and sa.make_url(same) == sa.make_url(rendered) else rendered


def _told(url: URL, theirs: Mapping[str, Any]) -> URL:
    """Add the parameters that `connect_args` give to libpq. The URL that is returned is for reading alone."""
    known = {option.keyword.decode() for option in Conninfo.get_defaults()}
    said = theirs.get("connect_args", {}).items()
    return url.update_query_dict({name: str(value) for name, value in said if name in known})


def _refused(theirs: Mapping[str, Any], ours: Mapping[str, Any], where: str, process: str) -> Iterator[str]:
    """Name each option that would break the plan, or that the plan would change in silence."""
    for name, why in AROUND_THE_PLAN.items():
        if theirs.get(name) is not None:
            yield f"{where}: {name}: {why}; leave it out"
    levels = [theirs.get("isolation_level"), theirs.get("execution_options", {}).get("isolation_level")]
    if "AUTOCOMMIT" in levels or theirs.get("connect_args", {}).get("autocommit"):
        yield f"{where}: AUTOCOMMIT: {AUTOCOMMIT}"
    arguments, planned = theirs.get("connect_args", {}), ours["connect_args"]
    if arguments.get("prepare_threshold") and planned.get("prepare_threshold", 0) is None:
        yield f"{where}: prepare_threshold: a pooler does not know what was prepared; leave it out"
    if process != WEB or "pool_size" not in ours:
        return  # a shell or a job shares this configuration, and has a pool of its own
    for name, variable in SIZES.items():
        if name in theirs and int(theirs[name]) != ours[name]:
            set_it = f", or set {variable}={theirs[name]}" if int(theirs[name]) > 0 else ""
            yield f"{where}: {name}={theirs[name]}: the plan has {ours[name]}; leave it out{set_it}"
    if theirs.get("poolclass") not in {None, sa.QueuePool, ours["poolclass"]}:
        yield f"{where}: poolclass={theirs['poolclass'].__name__}: the plan has a QueuePool; leave it out"
