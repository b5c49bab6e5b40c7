"""The cost of the liveness check at checkout, on a real pooled connection: microseconds for each, as a JSON list."""

import json
import sys
import timeit
from pathlib import Path

sys.path.insert(0, str(Path.cwd()))

from app import create_app
from app.extensions import db
from flask_pooling import process
from flask_pooling.engine import ConnectionGuard

CHECKS = 20_000

process.in_gunicorn = True  # a web worker's pool
with create_app().app_context():
    engine = db.engine
guard = next(each for each in engine.pool.dispatch.checkout if each.__qualname__.startswith(ConnectionGuard.__name__))
proxy = engine.raw_connection()
connection, record = proxy.dbapi_connection, proxy._connection_record
timings = timeit.repeat(lambda: guard(connection, record, proxy), number=CHECKS, repeat=7)
print(json.dumps([seconds / CHECKS * 1e6 for seconds in timings]))
