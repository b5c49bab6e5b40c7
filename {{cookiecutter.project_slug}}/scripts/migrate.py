"""`make migrate`: write a migration for the changes of the models, and try it.

The migrations make empty databases on a Postgres that is started for this, and the models are compared with those.
TEST_DATABASE_URL names another server for the first database, if a migration needs an extension such as PostGIS.
"""

import contextlib
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from flask_migrate import downgrade, migrate, upgrade
from sqlalchemy.engine import make_url

from app import create_app
from app.extensions import db
from scripts import postgres


def use(urls: list[sa.URL]) -> None:
    """Give the app other databases, since its own have rows."""
    engines: Any = db.engines
    for key, url in zip(list(engines), urls, strict=True):
        engines[key] = sa.create_engine(url, poolclass=sa.NullPool)


def complaints(where: str) -> Iterator[str]:
    """Go up, down and up again, and say what fails."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            upgrade()
            downgrade()
            upgrade()
    except (Exception, SystemExit) as error:  # noqa: BLE001  # whatever the migration does
        yield f"on {where}, up, down and up again failed: {error if isinstance(error, SystemExit) else repr(error)}"


def missing() -> Iterator[str]:
    """Name what Alembic did not see, such as an ExcludeConstraint on a table that exists."""
    for key, metadata in db.metadatas.items():
        with db.engines[key].connect() as connection:
            there = set(connection.scalars(sa.text("select conname from pg_constraint")))
            name_of = connection.dialect.identifier_preparer.format_constraint
            constraints = [each for table in metadata.tables.values() for each in table.constraints]
            for name in sorted({name.strip('"') for each in constraints if (name := name_of(each))} - there):
                yield f"{name} of the models is not written: Alembic does not see it; add it by hand"


def main() -> int:
    message = sys.argv[1].strip() if len(sys.argv) > 1 else ""
    if not message:
        print('say what changed: make migrate m="add tags"', file=sys.stderr)
        return 2
    os.environ["APP_ENV"] = "development"
    print("Comparing the models with the migrations, on a Postgres that is made for this: about 5 seconds", flush=True)
    try:
        with contextlib.ExitStack() as stack:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="migrate-")))
            stack.enter_context(create_app().app_context())
            names = [f"migrate{number}" for number, _ in enumerate(db.engines)]
            server = make_url(stack.enter_context(postgres.running(folder / "data", *names, settings={"fsync": "off"})))
            first = make_url(os.environ.get("TEST_DATABASE_URL") or server).set(drivername="postgresql+psycopg")
            on_sqlite = db.engine.dialect.name == "sqlite"
            use([first, *(server.set(drivername="postgresql+psycopg", database=name) for name in names[1:])])
            print("The database is ready: running the migrations, then comparing the models", flush=True)
            with contextlib.redirect_stdout(io.StringIO()):
                upgrade()
            migrate(message=message)
            found = list(complaints("Postgres")) or list(missing())
            if on_sqlite:
                use([sa.URL.create("sqlite", database=str(folder / name)) for name in names])
                found += complaints("SQLite")
    except postgres.PostgresError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    for complaint in found:
        print(f"Mind: {complaint}", file=sys.stderr)
    print("Read it, then: make upgrade")
    return 0


if __name__ == "__main__":
    sys.exit(main())
