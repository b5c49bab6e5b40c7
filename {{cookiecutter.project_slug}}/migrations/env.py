"""The env.py of `flask db`: as Flask-Migrate's own, and fit for a service that migrates while it serves.

- Several instances may run `flask db upgrade` at once: one migrates, and the others wait for an advisory lock.
- A migration waits for the lock of a table for LOCK_TIMEOUT only, since every new query queues up behind it. Then it is
  tried again, unless a part of it is committed.
- Each database of SQLALCHEMY_BINDS that has models is migrated after the first one.

A migration takes two connections out of DB_RESERVED_CONNECTIONS. One works, and the other holds the advisory lock, in a
transaction, so that the lock also holds behind a pooler.
"""

import contextlib
import re
import sys
import time
import traceback
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alembic import context
from alembic.script.revision import MultipleHeads, ResolutionError, RevisionError
from alembic.util import CommandError
from flask import current_app
from psycopg.errors import LockNotAvailable
from psycopg.pq import TransactionStatus
from sqlalchemy import event, text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from app import defaults
from app.extensions import db
from flask_pooling.budget import driver_message

LOCK_ID = zlib.crc32(defaults.SERVICE_NAME.encode())
LONGEST_WAIT_FOR_ANOTHER_INSTANCE = "10min"
LOCK_TIMEOUT = "1s"
ATTEMPTS = 10
PAUSE_SECONDS = 0.5
# A role or a database may have these limits for the requests. A migration lifts them.
LIMITS = (
    *("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"),
    *("idle_session_timeout", "transaction_timeout"),
)


def configure(key: str | None, **more: Any) -> None:
    """Configure Alembic for a database. :param key: its key in SQLALCHEMY_BINDS. None is the first database."""
    if getattr(context.config.cmd_opts, "autogenerate", False):
        from migrations import writing  # noqa: PLC0415  # only `make migrate` needs it

        more |= writing.options(key)
    if key is not None:
        more |= functions_of(re.sub(r"\W", "_", key))
    more |= {"target_metadata": db.metadatas[key], "transaction_per_migration": True}
    context.configure(**(more | current_app.extensions["migrate"].configure_args))


def functions_of(key: str) -> dict[str, str]:
    """Make Alembic write and call upgrade_KEY() in place of upgrade(). Flask-Migrate's template for several databases
    calls upgrade(engine_name), which migrations that are older than the second database do not take."""
    for script in context.script.walk_revisions():
        module: Any = script.module
        module.upgrade = getattr(module, f"upgrade_{key}", lambda: None)
        module.downgrade = getattr(module, f"downgrade_{key}", lambda: None)
    return {"upgrade_token": f"{key}_upgrades", "downgrade_token": f"{key}_downgrades"}


def migrate_on_postgres(engine: Engine, key: str | None) -> None:
    with connect(engine) as guard:
        guard.execute(text(f"SET LOCAL lock_timeout = '{LONGEST_WAIT_FOR_ANOTHER_INSTANCE}'"))
        guard.execute(text("SELECT pg_advisory_xact_lock(:id)"), {"id": LOCK_ID})
        # This statement has no snapshot. CREATE INDEX CONCURRENTLY would wait for that of the statement before.
        guard.execute(text("SET LOCAL lock_timeout = 0"))
        for attempt in range(1, ATTEMPTS + 1):
            with connect(engine) as connection:
                event.listen(connection, "begin", limit_the_wait)
                progress = Progress(connection)
                try:
                    migrate(connection, key, progress)
                    break
                except Exception as error:
                    if not progress.may_be_tried_again(error) or attempt == ATTEMPTS:
                        raise
            print(f"attempt {attempt} of {ATTEMPTS}: a table is locked; trying again", file=sys.stderr)
            time.sleep(PAUSE_SECONDS)


def migrate(connection: Connection, key: str | None, progress: "Progress | None" = None) -> None:
    def version_applied(ctx: Any, step: Any, heads: object, run_args: object) -> None:
        ctx.connection.commit()  # Alembic does not commit if the migration has done so itself
        if progress:
            progress.applied()
        if not step.is_stamp:
            way, migration = "upgraded to" if step.is_upgrade else "downgraded from", step.up_revision
            print(f"{way} {migration.revision}: {migration.doc}")

    configure(key, connection=connection, transactional_ddl=True, on_version_apply=version_applied)
    with context.begin_transaction():
        try:
            context.run_migrations()
        except CommandError as error:
            sys.exit(in_words(error, context.get_context().get_current_heads()))


@contextlib.contextmanager
def connect(engine: Engine) -> Iterator[Connection]:
    """Yield a connection without the limits of the role and the database. It does not go back to the pool."""
    # Behind a pooler a setting must end with the transaction, or the next client would have it.
    local = current_app.extensions["settings"].db_pooler != "none"
    lift = f"SELECT set_config(name, '0', {local}) FROM pg_settings WHERE name IN {LIMITS}"  # noqa: S608  # constants
    with engine.connect() as connection:
        event.listen(connection, "begin", lambda begun: begun.exec_driver_sql(lift))
        try:
            yield connection
        finally:
            connection.invalidate()


def limit_the_wait(connection: Connection) -> None:
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")


class Progress:
    """Notes whether the running migration has committed something: by an autocommit_block() or a commit of its own."""

    def __init__(self, connection: Connection) -> None:
        self.has_committed = self.has_applied = False
        event.listen(connection, "after_cursor_execute", self.executed)
        event.listen(connection, "commit", self.committed)

    def executed(self, connection: Connection, cursor: Any, *_: Any) -> None:
        if cursor.connection.info.transaction_status == TransactionStatus.IDLE:
            self.committed(connection)
            if not cursor.connection.autocommit:  # op.execute("COMMIT")
                limit_the_wait(connection)

    def committed(self, _: Connection) -> None:
        self.has_committed = True

    def applied(self) -> None:
        self.has_committed, self.has_applied = False, True

    def may_be_tried_again(self, error: Exception) -> bool:
        """Return whether nothing of the migration is committed. Otherwise say so in the error."""
        if self.has_committed:
            error.add_note("what the migration has done up to its last commit is not undone")
        if "CONCURRENTLY" in (getattr(error, "statement", None) or "").upper():
            error.add_note("an index that was built CONCURRENTLY may be left, and is invalid: drop it")
        # A second +1 or -1 would count from the revision that this run has reached.
        relative = self.has_applied and set(str(context.get_revision_argument())) & set("+-")
        locked = isinstance(getattr(error, "orig", None), LockNotAvailable)
        return locked and not (self.has_committed or relative)


def migrate_on_sqlite(engine: Engine, key: str | None) -> None:
    """Migrate without foreign keys: when batch mode replaces a table, ON DELETE CASCADE would delete rows of others.
    And in a transaction, which Python's driver does not begin for DDL: a migration that fails leaves nothing."""
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
        connection.rollback()
        driver: Any = connection.connection.dbapi_connection
        driver.isolation_level = None
        event.listen(connection, "begin", lambda begun: begun.exec_driver_sql("BEGIN"))
        migrate(connection, key)
        connection.invalidate()  # its settings must not go back to the pool


def in_one_line(error: SQLAlchemyError) -> str:
    """Name the line and the migration that failed, the database's message, and the remedy."""
    said = driver_message(error)
    stack = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in stack if Path(frame.filename).parent.name == "versions"]
    if isinstance(error, DBAPIError) and not frames and getattr(error.orig, "sqlstate", None) is None:
        return f"the database cannot be reached; check DATABASE_URL: {said}"
    where = f"{Path(frames[-1].filename).name}, line {frames[-1].lineno}: " if frames else ""
    return "; ".join([f"the migration failed: {where}{said}", *getattr(error, "__notes__", ())])


def in_words(error: CommandError, heads: tuple[str, ...]) -> str:
    """Explain the error. An unknown revision may be a typing mistake, or come from another branch."""
    cause = error.__cause__
    if isinstance(cause, MultipleHeads):
        both = ", ".join(context.script.get_heads())
        return f'two migrations follow the same one ({both}); join them: flask db merge -m "merge" heads'
    if isinstance(cause, ResolutionError) and cause.argument in heads:
        return f"the database is at {cause.argument}, which migrations/versions does not have; get the code that has it"
    return f"{error}; flask db history lists the revisions" if isinstance(cause, RevisionError) else str(error)


try:
    context.script.get_heads()
except KeyError as error:
    sys.exit(f"migrations/versions has no {error}, which another migration follows; get it back")
try:
    for key in sorted(db.metadatas, key=lambda key: (key is not None, key)):
        if key not in db.engines:
            sys.exit(f"a model has __bind_key__ = {key!r}, which is not in SQLALCHEMY_BINDS")
        engine = db.engines[key]
        if context.is_offline_mode():
            configure(key, url=engine.url, literal_binds=True)
            with context.begin_transaction():
                context.run_migrations()
        elif engine.dialect.name == "postgresql":
            migrate_on_postgres(engine, key)
        else:
            migrate_on_sqlite(engine, key)
except SQLAlchemyError as error:
    sys.exit(in_one_line(error))
