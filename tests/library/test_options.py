"""The options of the engines: what is the app's own stays, and what would break the plan is refused by name."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.engine import Engine

import flask_pooling
from flask_pooling import SettingsError, process

MakeForeign = Callable[..., tuple[Flask, SQLAlchemy]]


@pytest.fixture
def make_foreign(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[MakeForeign]:
    """A function that makes an app as there are many: it knows nothing of plans but for the one call."""
    monkeypatch.delenv("APP_ENV")
    made: list[tuple[Flask, SQLAlchemy]] = []

    def make(web: bool = True, engine_options: dict[str, Any] | None = None, **config: Any) -> tuple[Flask, SQLAlchemy]:
        monkeypatch.setattr(process, "in_gunicorn", web)
        app, db = Flask("foreign"), SQLAlchemy(engine_options=engine_options or {})
        app.config["SQLALCHEMY_DATABASE_URI"] = environ["DATABASE_URL"]
        app.config.from_mapping(config)
        flask_pooling.init_app(app, db)
        made.append((app, db))
        return app, db

    yield make
    for app, db in made:
        with app.app_context():
            for engine in db.engines.values():
                engine.dispose()


def engine_of(foreign: tuple[Flask, SQLAlchemy], key: str | None = None) -> Engine:
    app, db = foreign
    with app.app_context():
        return db.engines[key]


def refusal(make_foreign: MakeForeign, **given: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        make_foreign(**given)
    (problem,) = caught.value.problems
    return problem


def loud(value: Any) -> str:
    return json.dumps(value)


@pytest.mark.postgres
@pytest.mark.direct
@pytest.mark.parametrize("where", ["config", "constructor", "bind"])
def test_what_is_the_owners_stays(
    make_foreign: MakeForeign, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Whichever way Flask-SQLAlchemy takes it, beside the plan's pool and its limits."""
    theirs = {
        "isolation_level": "SERIALIZABLE",
        "json_serializer": loud,
        "pool_pre_ping": True,
        "pool_recycle": 99,
        "pool_timeout": 4,
        "connect_args": {"application_name": "mine", "options": "-c work_mem=5MB"},
    }
    given: dict[str, Any] = {"config": {"SQLALCHEMY_ENGINE_OPTIONS": theirs}, "constructor": {"engine_options": theirs}}
    given["bind"] = {"SQLALCHEMY_BINDS": {"other": {"url": environ["DATABASE_URL"], **theirs}}}
    monkeypatch.setenv("DB_BINDS", "1")
    engine = engine_of(make_foreign(**given[where]), "other" if where == "bind" else None)
    assert isinstance(engine.pool, sa.QueuePool)
    assert (engine.pool.size(), engine.pool._max_overflow, engine.pool._timeout) == (4, 0, 4)
    assert (engine.pool._pre_ping, engine.pool._recycle) == (True, 99)
    assert engine.dialect._json_serializer is loud
    with engine.connect() as connection:
        said = {name: connection.scalar(sa.text(f"show {name}")) for name in ("application_name", "work_mem")}
        assert said == {"application_name": "mine", "work_mem": "5MB"}
        assert connection.scalar(sa.text("show statement_timeout")) == "15s"
        assert connection.scalar(sa.text("show transaction_isolation")) == "serializable"


@pytest.mark.postgres
@pytest.mark.parametrize(
    ("theirs", "says"),
    [
        ({"pool_size": 20}, "pool_size=20: the plan has 4; leave it out, or set DB_POOL_SIZE=20"),
        ({"pool_size": 0}, "pool_size=0: the plan has 4; leave it out"),
        ({"max_overflow": 10}, "max_overflow=10: the plan has 0; leave it out, or set DB_MAX_OVERFLOW=10"),
        ({"max_overflow": -1}, "max_overflow=-1: the plan has 0; leave it out"),
        ({"poolclass": sa.NullPool}, "poolclass=NullPool: the plan has a QueuePool; leave it out"),
        ({"poolclass": sa.StaticPool}, "poolclass=StaticPool: the plan has a QueuePool; leave it out"),
        ({"creator": print}, "creator: its connections would not have the plan's limits"),
        ({"pool": sa.create_engine("sqlite://").pool}, "pool: a pool of your own is not counted"),
        ({"isolation_level": "AUTOCOMMIT"}, "AUTOCOMMIT: every statement would be committed"),
        ({"execution_options": {"isolation_level": "AUTOCOMMIT"}}, "AUTOCOMMIT: every statement"),
        ({"connect_args": {"autocommit": True}}, "AUTOCOMMIT: every statement"),
    ],
)
@pytest.mark.parametrize("where", ["config", "constructor", "bind"])
def test_what_would_break_the_plan_is_refused(  # noqa: PLR0917  # fixtures and parameters
    make_foreign: MakeForeign,
    environ: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    theirs: dict[str, Any],
    says: str,
    where: str,
) -> None:
    """By its name, with the remedy."""
    monkeypatch.setenv("DB_BINDS", "1")
    bind = {"SQLALCHEMY_BINDS": {"other": {"url": environ["DATABASE_URL"], **theirs}}}
    given = {
        "config": {"SQLALCHEMY_ENGINE_OPTIONS": theirs},
        "constructor": {"engine_options": theirs},
        "bind": bind,
    }
    problem = refusal(make_foreign, **given[where])
    assert says in problem
    assert ("SQLALCHEMY_BINDS['other']" if where == "bind" else "SQLALCHEMY_ENGINE_OPTIONS") in problem


@pytest.mark.postgres
def test_the_remedy_of_a_size_works(make_foreign: MakeForeign, monkeypatch: pytest.MonkeyPatch) -> None:
    """DB_POOL_SIZE=20, as the refusal says."""
    monkeypatch.setenv("DB_POOL_SIZE", "20")
    engine = engine_of(make_foreign(SQLALCHEMY_ENGINE_OPTIONS={"pool_size": "20", "poolclass": sa.QueuePool}))
    assert isinstance(engine.pool, sa.QueuePool)
    assert engine.pool.size() == 20


@pytest.mark.postgres
def test_a_shell_has_a_null_pool_whatever_the_web_workers_have(make_foreign: MakeForeign) -> None:
    """Options that only a QueuePool takes do not reach it, from the constructor either."""
    theirs = {"pool_size": 20, "max_overflow": 5, "pool_timeout": 3, "pool_use_lifo": True, "pool_recycle": 60}
    for given in ({"engine_options": theirs}, {"SQLALCHEMY_ENGINE_OPTIONS": theirs}):
        assert type(engine_of(make_foreign(web=False, **given)).pool) is sa.NullPool


@pytest.mark.postgres
def test_an_uncounted_bind_is_refused(make_foreign: MakeForeign, environ: dict[str, str]) -> None:
    """With the setting that counts it. A shell opens one when it needs it."""
    given = {"SQLALCHEMY_BINDS": {"other": environ["DATABASE_URL"], "file": "sqlite:///x.db"}}
    assert "1 on Postgres ('other'), and the plan counts each; set DB_BINDS=1" in refusal(make_foreign, **given)
    assert make_foreign(web=False, **given)


@pytest.mark.sqlite
@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:", "sqlite:///own.db"])
@pytest.mark.parametrize(
    "more", [{}, {"TESTING": True}, {"SQLALCHEMY_ENGINE_OPTIONS": {"connect_args": {"timeout": 9}}}]
)
def test_an_app_on_sqlite_works_as_before(make_foreign: MakeForeign, url: str, more: dict[str, Any]) -> None:
    """The engine is the one that Flask-SQLAlchemy makes: in memory as well, with no pragma of ours."""
    app = Flask("before")
    app.config.from_mapping({"SQLALCHEMY_DATABASE_URI": url, **more})
    before_db = SQLAlchemy(app)
    before, after = engine_of((app, before_db)), engine_of(make_foreign(SQLALCHEMY_DATABASE_URI=url, **more))
    assert type(after.pool) is type(before.pool)
    with after.connect() as connection:
        assert connection.scalar(sa.text("pragma foreign_keys")) == 0


@pytest.mark.sqlite
def test_an_app_under_test_keeps_its_engines(make_foreign: MakeForeign) -> None:
    """Whatever it configures, on Postgres too: no connection of the plan's is made."""
    given = {"TESTING": True, "SQLALCHEMY_DATABASE_URI": "postgresql+psycopg://nobody@db.invalid/x"}
    pool = engine_of(make_foreign(**given, SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 7})).pool
    assert isinstance(pool, sa.QueuePool)
    assert (pool.size(), pool._max_overflow) == (7, 10)


@pytest.mark.sqlite
def test_the_apps_url_has_the_last_word(make_foreign: MakeForeign, monkeypatch: pytest.MonkeyPatch) -> None:
    """DATABASE_URL in the environment is not asked for where the app has a URL of its own."""
    monkeypatch.setenv("DATABASE_URL", "postgresql://production@db.invalid/rows")
    assert engine_of(make_foreign(SQLALCHEMY_DATABASE_URI="sqlite://")).url.get_backend_name() == "sqlite"


@pytest.mark.sqlite
@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg"])
@pytest.mark.parametrize("rest", ["u:a%2Fb%25c@h/d", "u@/d?host=/tmp/a", "u@/d?options=-c work_mem=5MB"])
def test_a_url_stays_as_it_was_written(make_foreign: MakeForeign, scheme: str, rest: str) -> None:
    """migrations/env.py of older versions of Flask-Migrate hands it to ConfigParser, which takes no new `%`."""
    app, _ = make_foreign(SQLALCHEMY_DATABASE_URI=f"{scheme}://{rest}")
    assert app.config["SQLALCHEMY_DATABASE_URI"] == f"postgresql+psycopg://{rest}"


@pytest.mark.sqlite
def test_a_url_in_another_form(make_foreign: MakeForeign) -> None:
    """A URL that SQLAlchemy would read in another way is written so that it reads the same."""
    app, db = make_foreign(SQLALCHEMY_DATABASE_URI="postgresql://u@%2Ftmp%2Fa/d")
    assert sa.make_url(app.config["SQLALCHEMY_DATABASE_URI"]) == engine_of((app, db)).url
    assert engine_of((app, db)).url.query == {"host": "/tmp/a"}


@pytest.mark.sqlite
def test_psycopg2_is_refused(make_foreign: MakeForeign) -> None:
    """It is never exchanged in silence."""
    problem = refusal(make_foreign, SQLALCHEMY_DATABASE_URI="postgresql+psycopg2://u:hunter2@h/d")
    assert "postgresql+psycopg2:// is not supported; use postgresql://" in problem
    assert "hunter2" not in problem


@pytest.mark.sqlite
def test_dead_keys_are_refused_unless_the_app_uses_them(
    make_foreign: MakeForeign, caplog: pytest.LogCaptureFixture
) -> None:
    """An app may build its options from them; then they are a warning."""
    assert "SQLALCHEMY_POOL_SIZE=20: Flask-SQLAlchemy has ignored" in refusal(make_foreign, SQLALCHEMY_POOL_SIZE=20)
    make_foreign(SQLALCHEMY_POOL_SIZE=20, SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 20})
    assert "SQLALCHEMY_POOL_SIZE=20: Flask-SQLAlchemy has ignored" in caplog.text


@pytest.mark.sqlite
def test_an_app_that_has_its_database_already_is_told_what_to_write() -> None:
    """`db = SQLAlchemy(app)`."""
    app = Flask("bound")
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    with pytest.raises(SettingsError, match=r"write db = SQLAlchemy\(\) and flask_pooling.init_app\(app, db\)"):
        flask_pooling.init_app(app, SQLAlchemy(app))


@pytest.mark.sqlite
@pytest.mark.parametrize(("environment", "status"), [(None, 404), ("development", 404), ("production", 503)])
def test_a_server_that_nobody_planned(
    make_foreign: MakeForeign, monkeypatch: pytest.MonkeyPatch, environment: str | None, status: int
) -> None:
    """In an app that was there before, it is refused only where its environment says that this is production."""
    app, db = Flask("foreign"), SQLAlchemy()
    app.config["SQLALCHEMY_DATABASE_URI"] = "sqlite://"
    monkeypatch.delenv("APP_ENV", raising=False)
    if environment:
        monkeypatch.setenv("APP_ENV", environment)
    flask_pooling.init_app(app, db)
    assert app.test_client().get("/").status_code == status
