"""The env.py that Flask-Migrate's versions have left in people's apps works unchanged beside flask_pooling."""

import shutil
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from serving import postgres, run

APP = """
import os

import flask_pooling
from flask import Flask
from flask_migrate import Migrate
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column


class Base(DeclarativeBase):
    pass


db = SQLAlchemy(model_class=Base)


class Item(db.Model):
    id: Mapped[int] = mapped_column(primary_key=True)


def create_app():
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["SHOP_URL"]
    flask_pooling.init_app(app, db)
    Migrate(app, db)
    return app
"""


@pytest.mark.parametrize(
    ("version", "password"),
    [
        ("2.4.0", "secret"),  # it does not double a %, which the app's own URL has not had then
        ("2.7.0", "a%2Fb%25c"),
        ("3.1.0", "a%2Fb%25c"),
        ("4.0.0", "a%2Fb%25c"),
        ("4.1.0", "a%2Fb%25c"),
    ],
)
def test_flask_db_with_an_older_env(installed: Path, tmp_path: Path, version: str, password: str):
    """`flask db migrate` and `upgrade`, with a % in the password, in an app that has had its migrations for years."""
    package, shop = tmp_path / "package", tmp_path / "shop"
    uv = Path(sys.executable).parent / "uv"
    install = [uv, "pip", "install", "--quiet", "--no-deps", "--target", package, f"flask-migrate=={version}"]
    subprocess.run(install, check=True, timeout=300)
    shutil.copytree(installed / "flask_pooling", shop / "flask_pooling")
    (shop / "app.py").write_text(APP)
    migrations = shutil.copytree(package / "flask_migrate" / "templates" / "flask", shop / "migrations")
    (migrations / "alembic.ini.mako").rename(migrations / "alembic.ini")
    (migrations / "versions").mkdir()
    with postgres(installed, tmp_path / "data", "shop") as url:
        flask = installed / ".venv" / "bin" / "flask"
        done = run(
            f"'{flask}' db migrate -m items && '{flask}' db upgrade && '{flask}' db downgrade && '{flask}' db upgrade",
            shop,
            SHOP_URL=url.replace("//app@", f"//app:{password}@"),
        )
        assert done.returncode == 0, done.stdout
        with psycopg.connect(url) as connection:
            assert connection.execute("select count(*) from item").fetchall() == [(0,)]
