"""The baked service without its access log and its metrics: what those cost is the difference."""

from sqlalchemy import event

import flask_pooling.middleware
from app import middleware
from flask_pooling.errors import note_a_connection

logged = 0


class Log:
    """In the place of the access log. The middleware stays, since it is what sets the headers."""

    def info(self, *_, **__):
        global logged
        logged += 1


class Nothing:
    """In the place of the metrics of requests. The middleware stays, since it is what WEB_TIMEOUT works by."""

    asked = 0

    def requests_of(self, *_):
        Nothing.asked += 1
        return self

    def observe(self, _):
        pass


middleware.log, nothing = Log(), Nothing()
flask_pooling.middleware.metrics = lambda: nothing

from baked import app  # noqa: E402

from app.extensions import db  # noqa: E402

app.test_client().get("/livez")
if not Nothing.asked or not logged:
    raise RuntimeError("the log or the metrics are hooked in elsewhere by now")

with app.app_context():
    engine = db.engine
silenced = 0
for name in ("connect", "checkout", "checkin"):
    for listener in list(getattr(engine.pool.dispatch, name)):
        if listener.__module__ == "flask_pooling.metrics":
            event.remove(engine, name, listener)
            silenced += 1
if silenced != 3:
    raise RuntimeError(f"the pool's metrics are hooked in elsewhere by now; found {silenced}")
# That one of them also tells the error handler that there was a connection is no part of what metrics cost.
event.listen(engine, "checkout", lambda *_: note_a_connection())
