"""Workers, threads and database connections that fit the server: one plan, and what holds an app to it.

This package knows nothing of the app around it, and an update of the template replaces it as a whole. The app gives it
its settings and its `db`:

    app.config["SQLALCHEMY_ENGINE_OPTIONS"] = pooling.engine_options(settings, url, process="web")
    db.init_app(app)
    pooling.init_app(app, db, settings, process="web")

gunicorn.conf.py takes its numbers from `settings.plan` and its hooks from `pooling.hooks.Hooks`.
"""

from pooling.engine import CLI, WEB, NullPool, QueuePool, engine_options
from pooling.errors import is_transient, may_have_written, next_handler, reason
from pooling.extension import init_app, run
from pooling.limit import unlimited
from pooling.settings import DatabaseUrl, Seconds, Settings, SettingsError, Whole
from pooling.sizing import Plan, PlanError, plan

__all__ = [
    "CLI", "WEB", "DatabaseUrl", "NullPool", "Plan", "PlanError", "QueuePool", "Seconds", "Settings",
    "SettingsError", "Whole", "engine_options", "init_app", "is_transient", "may_have_written", "next_handler", "plan",
    "reason", "run", "unlimited"
]  # fmt: skip
