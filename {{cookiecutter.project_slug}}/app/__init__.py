"""The application factory: a table of contents of what the service consists of."""

import os
from pathlib import Path
from typing import Any

import msgspec
from flask import Flask, Request, Response
from flask.json import provider
from flask.sessions import SecureCookieSession, SecureCookieSessionInterface, SessionMixin
from werkzeug.middleware.proxy_fix import ProxyFix

from app import cli, config, errors, health, home, logs, metrics, models, notes, observe, pools
from app.config import Settings, SettingsError
from app.extensions import db


def create_app(settings: Settings | None = None, *, web: bool | None = None) -> Flask:
    """Build the app.

    :param settings: what to run with; read from the environment when not given.
    :param web: whether this process is a web worker, which keeps a pool; by default, whether gunicorn runs it.
    :raises SettingsError: the settings cannot be used.
    """
    settings = settings or Settings.from_env(os.environ)
    web = os.environ.get("SERVER_SOFTWARE", "").startswith("gunicorn") if web is None else web

    app = Flask(__name__)
    app.json = JSONProvider(app)
    app.session_interface = Sessions()
    app.config.from_mapping(
        SECRET_KEY=settings.secret_key,
        SESSION_COOKIE_SAMESITE="Lax",
        MAX_CONTENT_LENGTH=config.MAX_BODY_BYTES,
        SQLALCHEMY_DATABASE_URI=settings.database_url,
        SQLALCHEMY_ENGINE_OPTIONS=pools.engine_options(settings, web=web),
    )
    app.extensions["settings"] = settings
    log = logs.access_log(settings.environment)
    app.wsgi_app = observe.Observed(app.wsgi_app, log)  # type: ignore[method-assign]
    if settings.web_trusted_proxies:
        hops = settings.web_trusted_proxies
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=hops, x_proto=hops, x_host=hops)  # type: ignore[method-assign]

    init_database(app, settings, web=web)
    errors.init_app(app)
    for room in (home, health, metrics, notes):
        app.register_blueprint(room.bp)
    app.cli.add_command(cli.pool)
    app.shell_context_processor(lambda: {"db": db, "models": models})
    return app


def init_database(app: Flask, settings: Settings, *, web: bool) -> None:
    """Bind the database, with the pool of this environment and its watchers."""
    dead = config.dead_key_problems(app.config)
    if dead:
        raise SettingsError(dead)
    db.init_app(app)
    with app.app_context():
        engine = db.engine
        db.engines[None] = pools.watch(app, engine, settings, web=web)  # type: ignore[index]  # it is a dict
        metrics.watch(engine)
        app.extensions["prober"] = health.Prober(engine)
    if not web:
        from flask_migrate import Migrate  # noqa: PLC0415  # a web worker needs no Alembic

        Migrate(app, db, directory=str(Path(__file__).parent.parent / "migrations"))


class Sessions(SecureCookieSessionInterface):
    """Flask's own, for requests that have a session. An API's have none, and nothing is looked up for them."""

    def open_session(self, app: Flask, request: Request) -> SecureCookieSession | None:
        return super().open_session(app, request) if "HTTP_COOKIE" in request.environ else self.session_class()

    def save_session(self, app: Flask, session: SessionMixin, response: Response) -> None:
        if session or session.accessed or session.modified:
            super().save_session(app, session, response)


class JSONProvider(provider.JSONProvider):
    """JSON by msgspec, which takes times, UUIDs and dataclasses too, and is faster than the standard library."""

    def dumps(self, obj: Any, **kwargs: Any) -> str:
        return msgspec.json.encode(obj).decode()

    def loads(self, s: str | bytes, **kwargs: Any) -> Any:
        return msgspec.json.decode(s)

    def response(self, *args: Any, **kwargs: Any) -> Response:
        return Response(msgspec.json.encode(self._prepare_response_obj(args, kwargs)), mimetype="application/json")
