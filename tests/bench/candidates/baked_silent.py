"""The baked service without its access log and its metrics: what those cost is the difference."""

from baked import app
from flask import g
from pooling.errors import note_a_connection
from pooling.requests import Measured
from sqlalchemy import event

from app import requests
from app.extensions import db


def end(response):
    """`app.requests.end` without the line in the log."""
    for name, value in requests.SECURITY_HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers["X-Request-ID"] = g.request_id
    return response


after = app.after_request_funcs[None]
after[after.index(requests.end)] = end

if not isinstance(app.wsgi_app, Measured):
    raise RuntimeError("the metrics are hooked in elsewhere by now")
app.wsgi_app = app.wsgi_app.app

with app.app_context():
    engine = db.engine
silenced = 0
for name in ("connect", "checkout", "checkin"):
    for listener in list(getattr(engine.pool.dispatch, name)):
        if listener.__module__ == "pooling.metrics":
            event.remove(engine, name, listener)
            silenced += 1
if silenced != 3:
    raise RuntimeError(f"the pool's metrics are hooked in elsewhere by now; found {silenced}")
# That one of them also tells the error handler that there was a connection is no part of what metrics cost.
event.listen(engine, "checkout", lambda *_: note_a_connection())
