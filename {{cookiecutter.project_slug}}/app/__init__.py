"""The application factory: it puts the parts of the service together."""

from collections.abc import Mapping
from typing import Any

from flask import Flask
from werkzeug.middleware.proxy_fix import ProxyFix

import flask_pooling
from app.config import POOLS, Settings, for_flask


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    """Build the app.

    :param config: values that a test changes, as in Flask's tutorial; `{"TESTING": True}` takes the settings of tests.
    :raises SettingsError: the settings cannot be used.
    """
    # Imported here, so that gunicorn.conf.py can import app.config without the rest.
    from app import errors, home, logs, middleware, models, notes
    from app.extensions import db, migrate

    config = config or {}
    settings = Settings.load(app_env="testing") if config.get("TESTING") else Settings.load()

    app = Flask(__name__)
    app.config.from_mapping(for_flask(settings))
    app.config.from_mapping(config)
    app.extensions["settings"] = settings
    logs.init_app(settings)

    flask_pooling.init_app(app, db, settings, pools=POOLS[settings.app_env])
    migrate.init_app(app, db)

    errors.init_app(app)
    middleware.init_app(app)
    app.register_blueprint(home.bp)
    app.register_blueprint(notes.bp)
    app.shell_context_processor(lambda: {"db": db, "models": models})

    if hops := settings.web_trusted_proxies:
        # Not X-Forwarded-Host: many proxies pass on what the client sent. Add x_host=hops if yours sets it.
        app.wsgi_app = ProxyFix(app.wsgi_app, x_for=hops, x_proto=hops, x_prefix=hops)  # type: ignore[method-assign]
    return app
