"""The application factory: a table of contents of what the service consists of."""

from flask import Flask
from werkzeug.middleware.proxy_fix import ProxyFix

import flask_pooling
from app import config
from app.config import Settings


def create_app(settings: Settings | None = None, *, web: bool = False, job: str | None = None) -> Flask:
    """Build the app.

    :param settings: what to run with; read from the environment when not given.
    :param web: this process is a worker of gunicorn, which keeps a pool (gunicorn.conf.py says so).
    :param job: this process is the job of that name in APP_JOBS, which keeps its share of connections.
    :raises SettingsError: the settings cannot be used.
    """
    # Imported here, so that gunicorn.conf.py can import app.config alone.
    from app import errors, home, logs, middleware, models, notes
    from app.extensions import db, migrate

    settings = settings or Settings.load()
    process = config.process(settings, web=web, job=job)

    app = Flask(__name__)
    app.config.from_mapping(config.for_flask(settings, process))
    app.extensions["settings"] = settings
    logs.init_app(settings)

    db.init_app(app)
    migrate.init_app(app, db)
    flask_pooling.init_app(app, db, settings, process=process)

    errors.init_app(app)
    middleware.init_app(app)
    app.register_blueprint(home.bp)
    app.register_blueprint(notes.bp)
    app.shell_context_processor(lambda: {"db": db, "models": models})

    if hops := settings.web_trusted_proxies:
        # Not X-Forwarded-Host: many proxies pass on whatever the client sent. Add x_host=hops if yours sets it.
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=hops, x_proto=hops, x_prefix=hops)  # type: ignore[method-assign]
    return app
