"""How a migration is written: so that it works on both databases, on rows that exist, and when the app has moved on."""

import contextlib
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import sqlalchemy as sa
from alembic import context
from alembic.autogenerate import renderers
from alembic.autogenerate.api import AutogenContext
from alembic.operations.ops import (
    AddColumnOp,
    AlterColumnOp,
    CreateIndexOp,
    CreateTableOp,
    DowngradeOps,
    MigrateOperation,
    OpContainer,
    UpgradeOps,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.engine import Inspector
from sqlalchemy.exc import ArgumentError
from sqlalchemy.sql import elements, functions

from app.extensions import db

HOW_TO_FILL_ROWS = (
    'rows that exist have no value for it; give it one in the model, such as server_default="" or'
    " server_default=sa.false() (a default= of Python's is for new rows only), or allow None"
)
# How a default looks in a model, and how Postgres says it: 'white'::character varying.
DEFAULTS: dict[Any, str] = {elements.True_: "sa.true()", elements.False_: "sa.false()", functions.now: "sa.func.now()"}
AS_POSTGRES_SAYS = {"true": "sa.true()", "false": "sa.false()", "now()": "sa.func.now()"}
CAST = re.compile(r"('(?:[^']|'')*'|-?[0-9.]+)::[a-z0-9_ ]+")
LITERAL = r"'(?:[^']|'')*'|-?[0-9.]+"
KIND = r"(?:character varying|double precision|timestamp with(?:out)? time zone|\w+)(?:\([0-9, ]+\))?"
CAST_INSIDE = re.compile(rf"(?:\(({LITERAL})\)|({LITERAL}))::{KIND}")

log = logging.getLogger("migrations")  # what is below "alembic" is shown by nobody


def render_item(kind: str, item: Any, autogen: AutogenContext) -> str | Literal[False]:
    """A migration has to work on SQLite in development, so it says `sa.func.now()` and not what Postgres calls that. It
    imports a type of the app only if that is no decorator of another one."""
    if kind == "type" and (module := type(item).__module__).partition(".")[0] == "app":
        autogen.imports.add(f"import {module}")
        return f"{module}.{item!r}"
    if kind == "type" and isinstance(item, sa.Enum) and item.name in made_before:
        autogen.imports.add("from sqlalchemy.dialects import postgresql")
        there_already = postgresql.ENUM(*item.enums, name=item.name, create_type=False)
        return f'sa.{item!r}.with_variant(postgresql.{there_already!r}, "postgresql")'
    if kind == "server_default":
        default = getattr(item, "arg", None)
        if not isinstance(default, sa.TextClause):
            return DEFAULTS.get(type(default), False)
        if default.text in AS_POSTGRES_SAYS:
            return AS_POSTGRES_SAYS[default.text]
        if cast := CAST.fullmatch(default.text):
            return f"sa.text({cast[1]!r})"
    return False


def look_at_what_was_found(ctx: object, revision: object, directives: list[Any]) -> None:
    """Before `flask db migrate` writes a file: is there anything to write, and will it work where rows exist?

    It is called for each database, after the changes of that were added to the list.
    """
    if not getattr(context.config.cmd_opts, "autogenerate", False):
        return
    upgrades: list[UpgradeOps] = directives[0].upgrade_ops_list
    downgrades: list[DowngradeOps] = directives[0].downgrade_ops_list
    if len(upgrades) == len(db.metadatas) and all(found.is_empty() for found in upgrades):
        sys.exit("Alembic finds nothing to migrate (it does not look at the values of an enum, for example)")
    up, down = upgrades[-1], downgrades[-1]
    for operation in (*operations(up), *operations(down)):
        for column in columns(operation):
            column.type = portable(column.type)
        if isinstance(operation, AlterColumnOp):
            operation.modify_type = portable(operation.modify_type)
            operation.existing_type = portable(operation.existing_type)
    there = sa.inspect(context.get_bind())
    for operation in operations(down):
        as_sqlite_reads_it(operation, there)
    for column in (each.column for each in operations(up) if isinstance(each, AddColumnOp)):
        if not column.nullable and not (column.server_default or column.computed or column.identity):
            log.warning("%s is NOT NULL, and %s", column.name, HOW_TO_FILL_ROWS)
    if len(upgrades) == 1:
        made_before.clear()
    make_enums(up, down)


def operations(container: OpContainer) -> Iterator[Any]:
    for operation in container.ops:
        if isinstance(operation, OpContainer):
            yield from operations(operation)
        else:
            yield operation


def columns(operation: Any) -> list[sa.Column[Any]]:
    found = [getattr(operation, "column", None), *getattr(operation, "columns", ())]
    return [column for column in found if isinstance(column, sa.Column)]


def portable(kind: Any) -> Any:
    """The type that the app's own one decorates, since the app may have moved on. For one of Postgres' that SQLite does
    not know, which is what a column had that is removed: what SQLAlchemy has for all databases."""
    while isinstance(kind, sa.TypeDecorator) and type(kind).__module__.partition(".")[0] == "app":
        kind = kind.impl_instance
    if isinstance(kind, postgresql.ENUM):
        return sa.Enum(*kind.enums, name=kind.name)
    if isinstance(kind, postgresql.TIMESTAMP | postgresql.TIME | postgresql.INTERVAL):
        return kind.as_generic()
    if type(kind) in {postgresql.JSON, postgresql.JSONB}:
        with contextlib.suppress(ArgumentError):  # it has a variant for SQLite
            return sa.JSON().with_variant(kind, "postgresql")
    return kind


def as_sqlite_reads_it(operation: Any, there: Inspector) -> None:
    """Postgres adds casts to what it keeps of a table: `price > (0)::numeric`. SQLite does not know them, and counts up
    an INTEGER alone."""
    table = getattr(operation, "table_name", None)
    if table is None or not there.has_table(table, operation.schema):
        return
    strings = [
        re.escape(column["name"])
        for column in there.get_columns(table, operation.schema)
        if isinstance(column["type"], sa.String)
    ]
    strings_cast = re.compile(rf"(?:\(({'|'.join(strings)})\)|\b({'|'.join(strings)}))::text\b" if strings else "(?!)")

    def without_casts(text: object) -> str:
        for cast in (CAST_INSIDE, strings_cast):
            text = cast.sub(lambda found: found[1] or found[2], str(text))
        return str(text)

    if isinstance(operation, CreateIndexOp):
        operation.columns = [
            column if isinstance(column, str | sa.Column) else sa.text(without_casts(column))
            for column in operation.columns
        ]
        if (where := operation.kw.get("postgresql_where")) is not None:
            where = sa.text(without_casts(where))
            operation.kw |= {"postgresql_where": where, "sqlite_where": where}
        return
    for part in (*getattr(operation, "columns", ()), getattr(operation, "column", None)):
        holder: Any = part if isinstance(part, sa.CheckConstraint) else getattr(part, "computed", None)
        if holder is not None:
            holder.sqltext = sa.text(without_casts(holder.sqltext))
        if isinstance(part, sa.Column) and part.primary_key and type(part.type) is sa.BIGINT:
            part.type = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


# --- enums -----------------------------------------------------------------------------------------------------------


class EnumOp(MigrateOperation):
    """Postgres has a type for each enum. It is made with a table, but not with a column, and it outlives both."""

    def __init__(self, kind: sa.Enum, what: Literal["create", "drop"]) -> None:
        self.kind, self.what = kind, what


@renderers.dispatch_for(EnumOp)
def render_enum(autogen: AutogenContext, operation: EnumOp) -> str:
    return f"sa.{operation.kind!r}.{operation.what}(op.get_bind(), checkfirst=True)"


made_before: set[str] = set()  # enums whose types are made before the tables, since more than one place needs them


def make_enums(up: OpContainer, down: OpContainer) -> None:
    """Make the types that each way needs, and drop on the way back what nobody else uses."""
    both_ways = [(up, down, enums_of(up)), (down, up, enums_of(down))]
    for _, _, uses in both_ways:
        names = [str(kind.name) for _, kind in uses]
        made_before.update(str(kind.name) for adds, kind in uses if adds or names.count(str(kind.name)) > 1)
    tables = context.get_context().opts["target_metadata"].tables.values()
    everywhere = [str(kind.name) for table in tables for kind in enums(table.columns)]
    for forth, back, uses in both_ways:
        for name, kind in {str(kind.name): kind for _, kind in uses}.items():
            if name in made_before:
                forth.ops.insert(0, EnumOp(kind, "create"))
            if everywhere.count(name) <= sum(kind.name == name for _, kind in uses):
                back.ops.append(EnumOp(kind, "drop"))


def enums_of(container: OpContainer) -> list[tuple[bool, sa.Enum]]:
    """Those of new columns, and whether a column is added to a table that exists."""
    new = [each for each in operations(container) if isinstance(each, AddColumnOp | CreateTableOp)]
    return [(isinstance(each, AddColumnOp), kind) for each in new for kind in enums(columns(each))]


def enums(found: Iterable[sa.Column[Any]]) -> list[sa.Enum]:
    types = [column.type for column in found]
    return [kind for kind in types if isinstance(kind, sa.Enum) and kind.native_enum and kind.name]
