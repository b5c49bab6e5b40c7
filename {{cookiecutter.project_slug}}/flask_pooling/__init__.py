"""Workers, threads and database connections that fit the server: one plan, to which an app is held.

This package knows nothing of the app around it. In place of `db.init_app(app)`:

    flask_pooling.init_app(app, db)

In gunicorn.conf.py:

    from flask_pooling.gunicorn import configure

    configure(globals(), "microblog:app")
"""

from flask_pooling.version import __version__, problems

try:
    from flask_pooling.engine import NullPool, QueuePool
    from flask_pooling.errors import answer_errors, is_transient, reason, report, retry_after
    from flask_pooling.extension import init_app
    from flask_pooling.options import Pools
    from flask_pooling.process import CLI, WEB
    from flask_pooling.settings import DatabaseUrl, Seconds, Settings, SettingsError
    from flask_pooling.sizing import Plan, PlanError, plan
    from flask_pooling.statements import run
    from flask_pooling.watchdog import unlimited
except ImportError as error:  # of something that an older version does not have
    if too_old := [*problems()]:
        raise ImportError("\n".join(too_old)) from error
    raise

__all__ = [
    "CLI", "WEB", "DatabaseUrl", "NullPool", "Plan", "PlanError", "Pools", "QueuePool", "Seconds", "Settings",
    "SettingsError", "__version__", "answer_errors", "init_app", "is_transient", "plan", "reason", "report",
    "retry_after", "run", "unlimited"
]  # fmt: skip
