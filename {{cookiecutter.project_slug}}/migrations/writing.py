"""Options for `make migrate`: the migration works on Postgres and on SQLite, also when the app has changed since."""

import logging
import sys
from typing import Any, Literal

import alembic_postgresql_enum  # enums: their types, and their values
import sqlalchemy as sa
from alembic.autogenerate.api import AutogenContext
from alembic.autogenerate.render import _repr_type
from alembic.operations.ops import AddColumnOp, CreateTableOp, ModifyTableOps

from app.extensions import db

log = logging.getLogger("migrations")  # not below "alembic", whose warnings nobody shows
alembic_postgresql_enum.set_configuration(alembic_postgresql_enum.Config(add_type_ignore=True))

# A migration must not drop PostGIS' spatial_ref_sys, for example.
OF_EXTENSIONS = "select relname from pg_class join pg_depend on objid = pg_class.oid where deptype = 'e'"
variants: list[Any] = []  # the types in a with_variant(): they are rendered as they are


def options(key: str | None) -> dict[str, Any]:
    tables = db.metadatas[key].tables.values()
    schemas, not_ours = {table.schema for table in tables}, set[str]()
    if db.engines[key].dialect.name == "postgresql":
        with db.engines[key].connect() as connection:
            not_ours = set(connection.scalars(sa.text(OF_EXTENSIONS))) - {table.name for table in tables}
    return {
        "render_item": render_item,
        "process_revision_directives": look_at_what_was_found,
        "autogenerate_plugins": ["alembic.autogenerate.*", "alembic.ext.checkconstraint_byname"],
        "include_schemas": schemas != {None},
        "include_name": lambda name, kind, _: name in schemas if kind == "schema" else name not in not_ours,
    }


def render_item(kind: str, item: Any, autogen: AutogenContext) -> str | Literal[False]:
    """Render a type or a server default. False leaves it to Alembic."""
    if kind == "server_default":
        return default_for_both(item)
    if kind != "type":
        return False
    module = type(item).__module__
    variants.extend(item._variant_mapping.values())
    if module.startswith("app.") and isinstance(item, sa.TypeDecorator):
        # Not the app's class, which may change, but the type of the column.
        others = [f".with_variant({_repr_type(each, autogen)}, {on!r})" for on, each in item._variant_mapping.items()]
        return _repr_type(item.impl_instance, autogen) + "".join(others)
    if module.startswith("sqlalchemy.dialects.postgresql") and not any(item is each for each in variants):
        return for_both(item, autogen)
    if not module.startswith("sqlalchemy."):
        autogen.imports.add(f"import {module}")
    return False


def for_both(item: Any, autogen: AutogenContext) -> str | Literal[False]:
    """Write a type of Postgres' own, and for SQLite SQLAlchemy's generic type, if there is one."""
    try:
        generic = item.as_generic()
    except NotImplementedError:
        return False
    if item._variant_mapping:
        return False
    autogen.imports.add("from sqlalchemy.dialects import postgresql")
    ours = autogen.migration_context.impl.render_type(item, autogen) or f"postgresql.{item!r}"
    return f'{_repr_type(generic, autogen)}.with_variant({ours}, "postgresql")'


def default_for_both(item: Any) -> str | Literal[False]:
    """Write a default for both databases. Postgres reports 'white'::character varying, which SQLite does not know."""
    default = getattr(item, "arg", None)
    if not isinstance(default, sa.ClauseElement):
        return False
    said = str(default)
    if said in {"now()", "CURRENT_TIMESTAMP"}:
        return "sa.func.now()"
    return f"sa.text({said.rpartition('::')[0]!r})" if said.startswith("'") and "::" in said else False


def look_at_what_was_found(context: Any, revision: object, directives: list[Any]) -> None:
    """Check, before the file is written, that there are changes, and that they work if the tables have rows.

    It is called for each database, when the changes of that database are in the list.
    """
    found = directives[0].upgrade_ops_list
    if len(found) == len(db.metadatas) and all(each.is_empty() for each in found):
        sys.exit("Alembic finds nothing to migrate (it does not compare server defaults, for example)")
    for table in [each for each in found[-1].ops if isinstance(each, CreateTableOp)]:
        parts: list[Any] = list(table.columns)
        # Alembic leaves a column's own constraints out: github.com/sqlalchemy/alembic/issues/1600
        checks = [check for part in parts for check in getattr(part, "constraints", ())]
        table.columns = parts + [sa.CheckConstraint(check.sqltext, name=check.name) for check in checks]
    changes = [change for table in found[-1].ops if isinstance(table, ModifyTableOps) for change in table.ops]
    for column in [change.column for change in changes if isinstance(change, AddColumnOp)]:
        if not (column.nullable or column.server_default or column.computed or column.identity):
            log.warning(
                "%s is NOT NULL, and rows that exist have no value for it; give it one in the model, such as"
                ' server_default="" or server_default=sa.false() (a default= of Python\'s is for new rows only), or'
                " allow None",
                column.name,
            )
