"""How Alembic runs here: one process at a time, never waiting long for a lock, and on SQLite without losing rows.

Several instances of a deploy may start `flask db upgrade` at once: an advisory lock lets one work while the others
wait, and then find nothing left to do. A lock on a table is waited for LOCK_TIMEOUT only, and then tried for again,
since every query that arrives in the meantime queues up behind the one that waits.

A migration takes two connections out of DB_RESERVED_CONNECTIONS: one that holds the advisory lock, in a transaction so
that it holds through a pooler too, and one that works, which may leave its transaction for CREATE INDEX CONCURRENTLY.
"""

import contextlib
import logging
import re
import sys
import time
import traceback
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alembic import context
from alembic.script.revision import MultipleHeads, ResolutionError
from alembic.util import CommandError
from flask import current_app
from psycopg.errors import LockNotAvailable
from sqlalchemy import event, text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import OperationalError, SQLAlchemyError

from app import defaults
from app.extensions import db
from migrations.writing import HOW_TO_FILL_ROWS, look_at_what_was_found, render_item

LOCK_ID = zlib.crc32(defaults.SERVICE_NAME.encode())
LONGEST_WAIT_FOR_ANOTHER_INSTANCE = "10min"
LOCK_TIMEOUT = "1s"
ATTEMPTS = 10
PAUSE_SECONDS = 0.5
# What a role or a database may limit, for the sake of requests.
LIMITS = (
    *("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"),
    *("idle_session_timeout", "transaction_timeout"),
)
HOW_TO_GO_ON = "get the code that has it or, in development, delete the database in instance/"

log = logging.getLogger("migrations")  # what is below "alembic" is shown by nobody


def options(key: str | None) -> dict[str, Any]:
    """:param key: a key of SQLALCHEMY_BINDS. None is the first database: `upgrade` and `downgrade` migrate it.
    The others have functions of their own, `upgrade_KEY` and `downgrade_KEY`."""
    tokens = {"upgrade_token": "upgrades", "downgrade_token": "downgrades"}
    if key is not None:
        suffix = re.sub(r"\W", "_", key)
        tokens = {name: f"{suffix}_{token}" for name, token in tokens.items()}
        for script in context.script.walk_revisions():
            for way in ("upgrade", "downgrade"):
                setattr(script.module, way, getattr(script.module, f"{way}_{suffix}", lambda: None))
    return {
        "target_metadata": db.metadatas[key],
        "transaction_per_migration": True,
        "render_item": render_item,
        "process_revision_directives": look_at_what_was_found,
        **tokens,
        **current_app.extensions["migrate"].configure_args,
    }


def migrate(connection: Connection, key: str | None, **more: Any) -> None:
    context.configure(connection=connection, **{"on_version_apply": say_what_was_applied, **options(key), **more})
    with context.begin_transaction():
        context.run_migrations()


def say_what_was_applied(step: Any, **_: Any) -> None:
    if not step.is_stamp:
        way, migration = "upgraded to" if step.is_upgrade else "downgraded from", step.up_revision
        print(f"{way} {migration.revision}: {migration.doc}")


def migrate_on_postgres(engine: Engine, key: str | None) -> None:
    with connect(engine) as guard:
        guard.execute(text(f"SET LOCAL lock_timeout = '{LONGEST_WAIT_FOR_ANOTHER_INSTANCE}'"))
        guard.execute(text("SELECT pg_advisory_xact_lock(:id)"), {"id": LOCK_ID})
        # The last statement keeps its snapshot, which CREATE INDEX CONCURRENTLY would wait for; this one has none.
        guard.execute(text("SET LOCAL lock_timeout = 0"))
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with connect(engine) as connection:
                    event.listen(connection, "begin", limit_the_wait)
                    migrate(connection, key)
                return
            except OperationalError as error:
                if not isinstance(error.orig, LockNotAvailable) or attempt == ATTEMPTS:
                    raise
                log.warning("attempt %d of %d: a table is locked; trying again", attempt, ATTEMPTS)
                time.sleep(PAUSE_SECONDS)


@contextlib.contextmanager
def connect(engine: Engine) -> Iterator[Connection]:
    """A connection without the limits of a role or a database. It does not go back to the pool, which has them."""
    # Behind a pooler a setting must not outlive the transaction: the next client would have it.
    local = current_app.extensions["flask_pooling"].settings.db_pooler != "none"
    lift = f"SELECT set_config(name, '0', {local}) FROM pg_settings WHERE name IN {LIMITS}"  # noqa: S608  # constants
    with engine.connect() as connection:
        event.listen(connection, "begin", lambda begun: begun.exec_driver_sql(lift))
        try:
            yield connection
        finally:
            connection.invalidate()


def limit_the_wait(connection: Connection) -> None:
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")


def migrate_on_sqlite(engine: Engine, key: str | None) -> None:
    """SQLite changes a table by making a new one, and dropping the old one deletes what refers to it by ON DELETE
    CASCADE. So foreign keys are off meanwhile, and are looked at before each migration is committed. Python's driver
    begins no transaction for DDL by itself; with one, a migration that fails leaves nothing behind."""
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
        connection.rollback()
        driver: Any = connection.connection.dbapi_connection
        driver.isolation_level = None
        event.listen(connection, "begin", lambda begun: begun.exec_driver_sql("BEGIN"))
        migrate(connection, key, transactional_ddl=True, on_version_apply=refuse_dangling_rows)
        connection.invalidate()  # a pool must not lend it again as it is


def refuse_dangling_rows(ctx: Any, **more: Any) -> None:
    if broken := ctx.connection.exec_driver_sql("PRAGMA foreign_key_check").all():
        rows = ", ".join(f"row {row[1]} of {row[0]} refers to {row[2]}" for row in broken[:5])
        sys.exit(f"the migration would leave rows that refer to nothing, and was not applied: {rows}")
    say_what_was_applied(**more)


def in_one_line(error: SQLAlchemyError) -> str:
    """Which line of which migration failed, what the database said, and what to do."""
    said = " ".join(str(getattr(error, "orig", error)).split())
    if isinstance(error, OperationalError) and error.connection_invalidated is False and error.statement is None:
        return f"the database cannot be reached; check DATABASE_URL: {said}"
    frames = traceback.extract_tb(error.__traceback__)
    files = [frame for frame in frames if Path(frame.filename).parent.name == "versions"]
    where = f"{Path(files[-1].filename).name}, line {files[-1].lineno}: " if files else ""
    no_value = any(each in said for each in ("NOT NULL column", "NOT NULL constraint failed", "contains null values"))
    return f"the migration was not applied: {where}{said}" + (f"; {HOW_TO_FILL_ROWS}" if no_value else "")


def main() -> None:
    """Each database of SQLALCHEMY_BINDS that has tables is migrated after the first one."""
    for key in sorted(db.metadatas, key=lambda key: (key is not None, key)):
        if key not in db.engines:
            sys.exit(f"a model has __bind_key__ = {key!r}, which is not in SQLALCHEMY_BINDS")
        engine = db.engines[key]
        if context.is_offline_mode():
            context.configure(url=engine.url, literal_binds=True, **options(key))
            with context.begin_transaction():
                context.run_migrations()
        elif engine.dialect.name == "postgresql":
            migrate_on_postgres(engine, key)
        else:
            migrate_on_sqlite(engine, key)


try:
    main()
except SQLAlchemyError as error:
    sys.exit(in_one_line(error))
except KeyError as error:
    if Path(traceback.extract_tb(error.__traceback__)[-1].filename).parts[-2:] != ("script", "revision.py"):
        raise
    sys.exit(f"migrations/versions has no {error}, which another migration follows; get it back or delete both")
except CommandError as error:
    if isinstance(error.__cause__, ResolutionError):
        sys.exit(f"{error}: the database is at a migration that is not in migrations/versions; {HOW_TO_GO_ON}")
    if not isinstance(error.__cause__, MultipleHeads):
        raise
    heads = ", ".join(context.script.get_heads())
    sys.exit(f'two migrations follow the same one ({heads}); join them: flask db merge -m "merge" heads')
