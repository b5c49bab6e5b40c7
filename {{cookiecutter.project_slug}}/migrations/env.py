"""How Alembic runs here: one process at a time, never waiting long for a lock, and on SQLite without losing rows.

Several instances of a deploy may start `flask db upgrade` at once: an advisory lock lets one work while the others
wait, and then find nothing left to do. A lock on a table is waited for LOCK_TIMEOUT only, and then tried for again,
since every query that arrives in the meantime queues up behind the one that waits.

A migration takes two connections out of DB_RESERVED_CONNECTIONS: one that holds the advisory lock, in a transaction so
that it holds through a pooler too, and one that works, which may leave its transaction for CREATE INDEX CONCURRENTLY.
"""

import contextlib
import logging
import sys
import time
import traceback
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from alembic import context
from alembic.autogenerate.api import AutogenContext
from alembic.operations.ops import AddColumnOp, AlterColumnOp, OpContainer, UpgradeOps
from alembic.script.revision import MultipleHeads, ResolutionError
from alembic.util import CommandError
from flask import current_app
from psycopg.errors import LockNotAvailable
from sqlalchemy import Column, TypeDecorator, event, text
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import OperationalError, SQLAlchemyError
from sqlalchemy.sql import elements, functions

from app import defaults
from app.extensions import db

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
HOW_TO_FILL_ROWS = (
    'rows that exist have no value for it; give it one in the model, such as server_default="" or'
    " server_default=sa.false() (a default= of Python's is for new rows only), or allow None"
)

HOW_TO_GO_ON = "get the code that has it or, in development, delete the database in instance/"

log = logging.getLogger("migrations")  # what is below "alembic" is shown by nobody


def render_item(kind: str, item: Any, autogen: AutogenContext) -> str | Literal[False]:
    """A migration has to work on SQLite in development, so it says `sa.func.now()` and not what Postgres calls that. It
    imports a type of the app only if that is no decorator of another one."""
    if kind == "type" and (module := type(item).__module__).partition(".")[0] == "app":
        autogen.imports.add(f"import {module}")
        return f"{module}.{item!r}"
    if kind == "server_default":
        default = getattr(item, "arg", None)
        names: dict[type, str] = {elements.True_: "sa.true()", elements.False_: "sa.false()"}
        names[functions.now] = "sa.func.now()"
        return names.get(type(default), False)
    return False


def look_at_what_was_found(ctx: object, revision: object, directives: list[Any]) -> None:
    """Before `flask db migrate` writes a file: is there anything to write, and will it work where rows exist?"""
    if not getattr(context.config.cmd_opts, "autogenerate", False):
        return
    found: UpgradeOps = directives[0].upgrade_ops
    if found.is_empty():
        sys.exit("Alembic finds nothing to migrate (it does not look at the values of an enum, for example)")
    for operation in (*operations(found), *operations(directives[0].downgrade_ops)):
        for column in (getattr(operation, "column", None), *getattr(operation, "columns", ())):
            if isinstance(column, Column):
                column.type = undecorated(column.type)
        if isinstance(operation, AlterColumnOp):
            operation.modify_type = undecorated(operation.modify_type)
            operation.existing_type = undecorated(operation.existing_type)
    for column in (each.column for each in operations(found) if isinstance(each, AddColumnOp)):
        if not column.nullable and not (column.server_default or column.computed or column.identity):
            log.warning("%s is NOT NULL, and %s", column.name, HOW_TO_FILL_ROWS)


def operations(container: OpContainer) -> Iterator[Any]:
    for operation in container.ops:
        if isinstance(operation, OpContainer):
            yield from operations(operation)
        else:
            yield operation


def undecorated(kind: Any) -> Any:
    """A migration has to work when the app has moved on, so it has the type that the app's own one decorates."""
    while isinstance(kind, TypeDecorator) and type(kind).__module__.partition(".")[0] == "app":
        kind = kind.impl_instance
    return kind


options = {
    "target_metadata": db.metadata,
    "transaction_per_migration": True,
    "render_item": render_item,
    "process_revision_directives": look_at_what_was_found,
    **current_app.extensions["migrate"].configure_args,
}


def migrate(connection: Connection, **more: Any) -> None:
    context.configure(connection=connection, **{"on_version_apply": say_what_was_applied, **options, **more})
    with context.begin_transaction():
        context.run_migrations()


def say_what_was_applied(step: Any, **_: Any) -> None:
    if not step.is_stamp:
        way, migration = "upgraded to" if step.is_upgrade else "downgraded from", step.up_revision
        print(f"{way} {migration.revision}: {migration.doc}")


def migrate_on_postgres(engine: Engine) -> None:
    with connect(engine) as guard:
        guard.execute(text(f"SET LOCAL lock_timeout = '{LONGEST_WAIT_FOR_ANOTHER_INSTANCE}'"))
        guard.execute(text("SELECT pg_advisory_xact_lock(:id)"), {"id": LOCK_ID})
        # The last statement keeps its snapshot, which CREATE INDEX CONCURRENTLY would wait for; this one has none.
        guard.execute(text("SET LOCAL lock_timeout = 0"))
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with connect(engine) as connection:
                    event.listen(connection, "begin", limit_the_wait)
                    migrate(connection)
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
    local = current_app.extensions["pooling"].settings.db_pooler != "none"
    lift = f"SELECT set_config(name, '0', {local}) FROM pg_settings WHERE name IN {LIMITS}"  # noqa: S608  # constants
    with engine.connect() as connection:
        event.listen(connection, "begin", lambda begun: begun.exec_driver_sql(lift))
        try:
            yield connection
        finally:
            connection.invalidate()


def limit_the_wait(connection: Connection) -> None:
    connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{LOCK_TIMEOUT}'")


def migrate_on_sqlite(engine: Engine) -> None:
    """SQLite changes a table by making a new one, and dropping the old one deletes what refers to it by ON DELETE
    CASCADE. So foreign keys are off meanwhile, and are looked at before each migration is committed. Python's driver
    begins no transaction for DDL by itself; with one, a migration that fails leaves nothing behind."""
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
        connection.rollback()
        driver: Any = connection.connection.dbapi_connection
        driver.isolation_level = None
        event.listen(connection, "begin", lambda begun: begun.exec_driver_sql("BEGIN"))
        migrate(connection, transactional_ddl=True, on_version_apply=refuse_dangling_rows)
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
        return f"the database cannot be reached: {said}"
    frames = traceback.extract_tb(error.__traceback__)
    files = [frame for frame in frames if Path(frame.filename).parent.name == "versions"]
    where = f"{Path(files[-1].filename).name}, line {files[-1].lineno}: " if files else ""
    no_value = any(each in said for each in ("NOT NULL column", "NOT NULL constraint failed", "contains null values"))
    return f"the migration was not applied: {where}{said}" + (f"; {HOW_TO_FILL_ROWS}" if no_value else "")


def main() -> None:
    if context.is_offline_mode():
        context.configure(url=db.engine.url, literal_binds=True, **options)
        with context.begin_transaction():
            context.run_migrations()
    elif db.engine.dialect.name == "postgresql":
        migrate_on_postgres(db.engine)
    else:
        migrate_on_sqlite(db.engine)


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
