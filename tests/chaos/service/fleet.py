"""Many small copies: `python fleet.py COPIES CONNECTIONS`. Each is a process with the service's own engine, which holds
CONNECTIONS open until something is written to standard input. Prints how many could not be opened."""

import os
import sys

import sqlalchemy as sa

from app.config import Settings
from flask_pooling.engine import engine_options

settings = Settings.load()
copies, each = int(sys.argv[1]), int(sys.argv[2])
options = engine_options(settings, settings.database, process="web")
stop_read, stop_write = os.pipe()
count_read, count_write = os.pipe()

for _ in range(copies):
    if os.fork() == 0:
        os.close(stop_write)
        engine = sa.create_engine(settings.database, **(options | {"pool_size": each, "max_overflow": 0}))
        held, failed = [], 0
        for _ in range(each):
            try:
                held.append(engine.connect())
            except sa.exc.OperationalError:
                failed += 1
        os.write(count_write, f"{failed:4}".encode())
        os.read(stop_read, 1)  # until the parent's end is closed
        os._exit(0)

os.close(stop_read)
print(sum(int(os.read(count_read, 4)) for _ in range(copies)), flush=True)
sys.stdin.read(1)
os.close(stop_write)
for _ in range(copies):
    os.wait()
