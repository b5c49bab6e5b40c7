"""The pool of each environment, asserted on the live engine: what app/config.py says is what is in force."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy as sa
from flask import Flask

from app import create_app
from app.config import Settings
from app.extensions import db
from flask_pooling import SettingsError

MakeApp = Callable[..., Flask]


def pool_of(app: Flask) -> sa.Pool:
    with app.app_context():
        return db.engine.pool


@pytest.mark.sqlite
@pytest.mark.parametrize("web", [True, False])
def test_testing_has_a_null_pool_on_a_file(make_app: MakeApp, web: bool) -> None:
    """A real NullPool: on an in-memory database Flask-SQLAlchemy would silently put a StaticPool in its place."""
    app = make_app(web=web)
    assert type(pool_of(app)) is sa.NullPool
    assert str(app.config["SQLALCHEMY_DATABASE_URI"]).endswith(".db")


@pytest.mark.sqlite
@pytest.mark.parametrize("web", [True, False])
def test_development_has_a_queue_pool_of_the_plan(make_app: MakeApp, web: bool) -> None:
    """On SQLite too: a connection for each thread, and none on top."""
    pool = pool_of(make_app(web=web, APP_ENV="development", WEB_THREADS=3))
    assert isinstance(pool, sa.QueuePool)
    assert (pool.size(), pool._max_overflow) == (3, 0)


@pytest.mark.sqlite  # no connection is made: once is enough
@pytest.mark.usefixtures("production")
def test_a_web_worker_in_production_has_a_queue_pool_of_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many connections as threads, no overflow, and no wait longer than DB_POOL_TIMEOUT."""
    monkeypatch.setattr("flask_pooling.process.in_gunicorn", True)
    pool = pool_of(create_app())
    assert isinstance(pool, sa.QueuePool)
    assert (pool.size(), pool._max_overflow) == (Settings.load().plan.threads, 0)
    assert (pool._timeout, pool._pool.use_lifo, pool._pre_ping) == (5, True, False)


@pytest.mark.sqlite
@pytest.mark.usefixtures("production")
def test_a_shell_in_production_has_a_null_pool() -> None:
    """It keeps nothing: the plan does not count it."""
    assert type(pool_of(create_app())) is sa.NullPool


@pytest.mark.sqlite
@pytest.mark.usefixtures("production")
def test_a_job_in_production_has_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """As APP_JOBS says. A job that is not planned is refused."""
    monkeypatch.setenv("APP_JOBS", "worker=2x3,beat=1x1")
    monkeypatch.setenv("APP_JOB", "worker")
    pool = pool_of(create_app())
    assert isinstance(pool, sa.QueuePool)
    assert (pool.size(), pool._max_overflow) == (3, 0)
    monkeypatch.setenv("APP_JOB", "cleaner")
    with pytest.raises(SettingsError, match="'cleaner' is not in APP_JOBS, which has worker, beat"):
        create_app()


@pytest.mark.sqlite
@pytest.mark.usefixtures("production")
def test_the_guides_numbers_work_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 and 0, in force on the live pool; with the sum where they do not fit."""
    monkeypatch.setenv("DB_POOL_SIZE", "20")
    monkeypatch.setenv("DB_MAX_OVERFLOW", "0")
    monkeypatch.setattr("flask_pooling.process.in_gunicorn", True)
    pool = pool_of(create_app())
    assert isinstance(pool, sa.QueuePool)
    assert (pool.size(), pool._max_overflow) == (20, 0)
    monkeypatch.setenv("APP_INSTANCES", "5")
    with pytest.raises(SettingsError, match=r"5 instances x 20 connections .* = 100 > "):
        create_app()


@pytest.mark.sqlite
@pytest.mark.usefixtures("production")
def test_the_form_of_flasks_tutorial(tmp_path: Path) -> None:
    """`create_app({"TESTING": True, ...})` is a test's app, on its own database, whatever APP_ENV says."""
    os.environ.pop("DATABASE_URL")  # `production` brings it back
    url = f"sqlite:///{tmp_path / 'own.db'}"
    app = create_app({"TESTING": True, "SQLALCHEMY_DATABASE_URI": url})
    assert app.testing
    assert type(pool_of(app)) is sa.NullPool
    assert str(db_url(app)) == url


def db_url(app: Flask) -> sa.URL:
    with app.app_context():
        return db.engine.url
