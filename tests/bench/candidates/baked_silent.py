"""The baked service without its access log and its metrics: what those cost is the difference."""

from baked import app
from sqlalchemy import event

from app.observe import Observed

if not isinstance(app.wsgi_app, Observed):
    raise RuntimeError("logs and metrics are hooked in elsewhere by now")
Observed.record = lambda *_: None

engine = app.extensions["statements"]
silenced = 0
for name in ("connect", "checkout", "checkin"):
    for listener in list(getattr(engine.pool.dispatch, name)):
        if listener.__module__ == "app.metrics":
            event.remove(engine, name, listener)
            silenced += 1
if silenced != 3:
    raise RuntimeError(f"the pool's metrics are hooked in elsewhere by now; found {silenced}")
