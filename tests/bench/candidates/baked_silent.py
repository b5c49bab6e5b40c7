"""The baked service without its access log and its metrics: what those cost is the difference."""

import pooling.requests
from baked import app
from flask import g
from pooling.errors import note_a_connection
from sqlalchemy import event

from app import requests
from app.extensions import db


def end(response):
    """`app.requests.end` without the line in the log."""
    for name, value in requests.SECURITY_HEADERS.items():
        if name not in response.headers:
            response.headers.add(name, value)
    response.headers["X-Request-ID"] = g.request_id
    return response


after = app.after_request_funcs[None]
after[after.index(requests.end)] = end


class Nothing:
    """In the place of the metrics of requests. The middleware stays, since it is what WEB_TIMEOUT works by."""

    asked = 0

    def requests_of(self, *_):
        Nothing.asked += 1
        return self

    def observe(self, _):
        pass


nothing = Nothing()
pooling.requests.metrics = lambda: nothing
app.test_client().get("/livez")
if not Nothing.asked:
    raise RuntimeError("the metrics are hooked in elsewhere by now")

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
