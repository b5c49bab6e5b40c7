"""What the liveness check at checkout costs, on a real pooled connection: microseconds for each, as a JSON list."""

import json
import sys
import timeit
from pathlib import Path

sys.path.insert(0, str(Path.cwd()))

from app import create_app, pools

CHECKS = 20_000

engine = create_app(web=True).extensions["statements"]
guard = next(check for check in engine.pool.dispatch.checkout if check.__module__ == pools.__name__)
proxy = engine.raw_connection()
connection, record = proxy.dbapi_connection, proxy._connection_record
timings = timeit.repeat(lambda: guard(connection, record, proxy), number=CHECKS, repeat=7)
print(json.dumps([seconds / CHECKS * 1e6 for seconds in timings]))
