"""How Alembic runs here: on the app's own engine, one copy at a time, and never waiting long for a lock.

Several copies of a deploy may start `flask db upgrade` at once: an advisory lock lets one work while the others wait,
and then find nothing left to do. A lock on a table is waited for LOCK_TIMEOUT only, and then tried for again, since
every query that arrives in the meantime queues up behind the one that waits.

Outside web workers the engine has a NullPool (app/pools.py). A migration takes two connections out of
DB_RESERVED_CONNECTIONS: one that holds the advisory lock, in a transaction so that it holds through a pooler too, and
one that works, which may leave its transaction for a CREATE INDEX CONCURRENTLY.
"""

import logging
import sys
import time
import zlib

from alembic import context
from flask import current_app
from psycopg.errors import LockNotAvailable
from sqlalchemy import event, text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import OperationalError

from app import defaults
from app.extensions import Base, db

LOCK_ID = zlib.crc32(defaults.SERVICE_NAME.encode())
LONGEST_WAIT_FOR_ANOTHER_COPY = "10min"
LOCK_TIMEOUT = "1s"
ATTEMPTS = 10
PAUSE_SECONDS = 0.5

log = logging.getLogger("alembic.env")
options = current_app.extensions["migrate"].configure_args


def migrate(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=Base.metadata, transaction_per_migration=True, **options)
    with context.begin_transaction():
        context.run_migrations()


def migrate_on_postgres(engine: Engine) -> None:
    try:
        guard = engine.connect()
    except OperationalError as error:
        sys.exit(f"the database cannot be reached: {str(error.orig).strip()}")
    with guard:
        guard.execute(text("SET LOCAL idle_in_transaction_session_timeout = 0"))
        guard.execute(text(f"SET LOCAL lock_timeout = '{LONGEST_WAIT_FOR_ANOTHER_COPY}'"))
        guard.execute(text("SELECT pg_advisory_xact_lock(:id)"), {"id": LOCK_ID})
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with engine.connect() as connection:
                    event.listen(connection, "begin", limit_the_wait)
                    migrate(connection)
                return
            except OperationalError as error:
                if not isinstance(error.orig, LockNotAvailable) or attempt == ATTEMPTS:
                    raise
                log.warning("attempt %d of %d: a table is locked; trying again", attempt, ATTEMPTS)
                time.sleep(PAUSE_SECONDS)


def limit_the_wait(connection: Connection) -> None:
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")


if context.is_offline_mode():
    context.configure(url=db.engine.url, target_metadata=Base.metadata, literal_binds=True)
    with context.begin_transaction():
        context.run_migrations()
elif db.engine.dialect.name == "postgresql":
    migrate_on_postgres(db.engine)
else:
    with db.engine.connect() as only:
        migrate(only)
