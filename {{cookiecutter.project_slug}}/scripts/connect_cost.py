"""What a pool saves, measured on a real Postgres: DATABASE_URL if that is set, else one of its own."""

import statistics
import sys
import time

import sqlalchemy as sa

from scripts import postgres
from scripts.prod import database

USES = 100
# Each connection is a process of the server: this says which one.
PROCESS = sa.text("select pg_backend_pid()")


def measure(url: str, pool: type[sa.Pool]) -> str:
    """Use a connection a hundred times, as a hundred requests in a row would."""
    engine = sa.create_engine(sa.make_url(url).set(drivername="postgresql+psycopg"), poolclass=pool)
    processes, seconds = set(), []
    for _ in range(USES):
        start = time.perf_counter()
        with engine.connect() as connection:
            processes.add(connection.scalar(PROCESS))
        seconds.append(time.perf_counter() - start)
    engine.dispose()
    median_ms = statistics.median(seconds) * 1000
    return f"{pool.__name__:<10} {USES} uses, connections opened: {len(processes)}, median {median_ms:.2f} ms"


def main() -> int:
    try:
        with database() as url:
            for pool in (sa.NullPool, sa.QueuePool):
                print(measure(url, pool))
    except (postgres.PostgresError, sa.exc.SQLAlchemyError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
