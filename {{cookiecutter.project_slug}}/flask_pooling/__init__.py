"""Workers, threads and database connections that fit the server: one plan, and what holds an app to it.

This package knows nothing of the app around it, and an update of the template replaces it as a whole. The app gives it
its settings and its `db`:

    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = flask_pooling.engine_options(settings, url, process="web")
    db.init_app(app)
    flask_pooling.init_app(app, db, settings, process="web")

gunicorn.conf.py takes its numbers from `settings.plan` and its hooks from `flask_pooling.gunicorn.Hooks`.
"""

from flask_pooling.engine import CLI, WEB, NullPool, QueuePool, engine_options
from flask_pooling.errors import is_transient, may_have_written, next_handler, reason, report
from flask_pooling.extension import init_app
from flask_pooling.settings import DatabaseUrl, Seconds, Settings, SettingsError, Whole
from flask_pooling.sizing import Plan, PlanError, plan
from flask_pooling.statements import run
from flask_pooling.watchdog import unlimited

__all__ = [
    "CLI", "WEB", "DatabaseUrl", "NullPool", "Plan", "PlanError", "QueuePool", "Seconds", "Settings",
    "SettingsError", "Whole", "engine_options", "init_app", "is_transient", "may_have_written", "next_handler", "plan",
    "reason", "report", "run", "unlimited"
]  # fmt: skip
