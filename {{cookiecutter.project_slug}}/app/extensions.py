"""Flask extensions, unbound: the factory binds them to an app."""

import os
from pathlib import Path
from typing import Any

from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import MetaData
from sqlalchemy.orm import DeclarativeBase


class Base(DeclarativeBase):
    # Names that migrations can refer to, the same on every database.
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(column_0_label)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


db = SQLAlchemy(model_class=Base)
# A relative path, since Alembic does not take every absolute one.
migrate = Migrate(directory=os.path.relpath(Path(__file__).parent.parent / "migrations"))


@migrate.configure
def escape_percent(config: Any) -> Any:
    """Escape % in the name of a folder. Alembic would take it for the beginning of a variable."""
    variables = config.file_config.defaults()
    variables["here"] = variables["here"].replace("%", "%%")
    return config
