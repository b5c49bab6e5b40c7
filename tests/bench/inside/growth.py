"""Small instances: `python growth.py INSTANCES CONNECTIONS URL...`. Each is a process with the service's own engine.
It sends statements on CONNECTIONS that it holds, until something is written to standard input.

Prints how many connections could not be opened, and in the end how many statements were answered.
"""

import os
import select
import struct
import sys

import sqlalchemy as sa

from app.config import Settings
from flask_pooling.engine import engine_options

STATEMENT = sa.text("select pg_sleep(0.1)")  # so that all wait for the server, and not for this machine's cpus
COUNT = struct.Struct("!I")

settings = Settings.load()
instances, each, urls = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
stop_read, stop_write = os.pipe()
count_read, count_write = os.pipe()


def serve(url: sa.URL) -> None:
    options = engine_options(settings, url, process="web") | {"pool_size": each, "max_overflow": 0}
    engine, held, failed, answered = sa.create_engine(url, **options), [], 0, 0
    for _ in range(each):
        try:
            held.append(engine.connect().execution_options(isolation_level="AUTOCOMMIT"))
        except sa.exc.OperationalError:
            failed += 1
    os.write(count_write, COUNT.pack(failed))
    while not select.select([stop_read], [], [], 0)[0]:
        for connection in held:
            try:
                connection.execute(STATEMENT)
            except sa.exc.DBAPIError:
                break
            answered += 1
    os.write(count_write, COUNT.pack(answered))
    os._exit(0)


def total() -> int:
    return sum(COUNT.unpack(os.read(count_read, COUNT.size))[0] for _ in range(instances))


for number in range(instances):
    if os.fork() == 0:
        os.close(stop_write)
        serve(sa.make_url(urls[number % len(urls)]).set(drivername="postgresql+psycopg"))
os.close(stop_read)
print(total(), flush=True)
sys.stdin.read(1)
os.close(stop_write)
print(total(), flush=True)
for _ in range(instances):
    os.wait()
