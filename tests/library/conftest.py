"""The machinery's own tests run on the app of plain.py. `make_plain` makes it, `plain` is one of a web worker."""

import logging
import os
import shutil
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from flask import Flask
from gunicorn.app.wsgiapp import WSGIApplication
from sqlalchemy.engine import Engine, make_url

import flask_pooling
from flask_pooling import extension, gunicorn, metrics, process
from tests.library.plain import create_app, db
from tests.serving import ROOT, free_port, wait_until


def superuser(url: str) -> "psycopg.Connection[Any]":
    """Connect to our own Postgres; to be used as a context manager."""
    as_superuser = make_url(url).set(drivername="postgresql", username="postgres")
    return psycopg.connect(as_superuser.render_as_string(hide_password=False), autocommit=True)


@pytest.fixture
def make_plain(environ: dict[str, str]) -> Iterator[Callable[..., Flask]]:
    """A function that makes apps on this run's database: `make_plain()`, `make_plain(WEB_THREADS=3)`,
    `make_plain(web=False)`. Their tables are dropped, and their engines disposed of."""
    made: list[Flask] = []

    def make(*, web: bool = True, job: str | None = None, binds: dict[str, Any] | None = None, **more: object) -> Flask:
        kind = job or (flask_pooling.WEB if web else flask_pooling.CLI)
        with pytest.MonkeyPatch.context() as patch:
            for name, value in more.items():
                patch.setenv(name, str(value))
            app = create_app(process=kind, binds=binds)
        app.testing = True
        made.append(app)
        return app

    yield make
    for app in made:
        with app.app_context():
            for engine in db.engines.values():
                engine.dispose()


@pytest.fixture
def plain(make_plain: Callable[..., Flask]) -> Iterator[Flask]:
    """The app of a web worker, with its table."""
    app = make_plain()
    with app.app_context():
        db.create_all(bind_key=None)
    yield app
    with app.app_context():
        db.drop_all(bind_key=None)


@pytest.fixture
def through_pgbouncer(own_postgres: str, tmp_path: Path) -> Iterator[str]:
    """The URL of the run's database through a PgBouncer in transaction mode."""
    port, host = free_port(), make_url(own_postgres).query["host"]
    config = tmp_path / "pgbouncer.ini"
    users = tmp_path / "users.txt"
    users.write_text('"app" ""\n')
    config.write_text(
        f"[databases]\n* = host={host}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nadmin_users = app\n"
        f"auth_type = trust\nauth_file = {users}\npool_mode = transaction\nunix_socket_dir =\n"
    )
    program = shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"
    config.chmod(0o644)
    account = ["-u", "nobody"] if os.geteuid() == 0 else []  # it refuses to run as root
    with (tmp_path / "pgbouncer.log").open("wb") as log:
        process = subprocess.Popen([program, *account, config], stdout=log, stderr=log)
    url = f"postgresql://app@127.0.0.1:{port}/{make_url(own_postgres).database}"
    try:
        wait_until(lambda: process.poll() is not None or _listens(port))
        assert process.poll() is None, (tmp_path / "pgbouncer.log").read_text()
        yield url
    finally:
        process.kill()
        process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="session")
def other_database(database_kind: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URL of a second database, on the same server."""
    if database_kind == "sqlite":
        return f"sqlite:///{tmp_path_factory.mktemp('other')}/other.db"
    url: str = request.getfixturevalue("own_postgres")
    with superuser(url) as connection:
        connection.execute("create database other owner app")
    return make_url(url).set(database="other").render_as_string(hide_password=False)


@pytest.fixture
def two(make_plain: Callable[..., Flask], other_database: str) -> Iterator[Flask]:
    """A web worker's app with two databases, and one row in each."""
    app, both = make_plain(binds={"other": other_database}, DB_BINDS=1), [None, "other"]
    with app.app_context():
        db.create_all(bind_key=both)
        for key, engine in db.engines.items():
            with engine.begin() as connection:
                connection.execute(sa.text("insert into items (name) values (:name)"), {"name": key or "first"})
    yield app
    with app.app_context():
        db.drop_all(bind_key=both)


def engine_of(app: Flask, bind_key: str | None = None) -> Engine:
    with app.app_context():
        return db.engines[bind_key]


def load(monkeypatch: pytest.MonkeyPatch, *words: str, **environ: object) -> Any:
    """Make gunicorn with its configuration, as if it had been started with these words. It serves nothing."""
    for name, value in environ.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(metrics, "keep_in", lambda folder: None)
    monkeypatch.setattr(gunicorn, "shared_memory", lambda: None)  # there the tests look for what was left behind
    monkeypatch.setattr(extension, "registered", weakref.WeakSet())  # a process of its own has no apps yet
    monkeypatch.setattr(process, "in_gunicorn", False)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["gunicorn", *words])
    return WSGIApplication()


def start(monkeypatch: pytest.MonkeyPatch, *words: str, **environ: object) -> None:
    """Do what gunicorn does before it serves, for a start that is refused there: SystemExit has the message."""
    app = load(monkeypatch, *words, **environ)
    server = SimpleNamespace(cfg=app.cfg, app=app, log=logging.getLogger(__name__))
    app.cfg.nworkers_changed(server, app.cfg.workers, None)
    if app.cfg.preload_app:
        app.wsgi()
    app.cfg.on_starting(server)
