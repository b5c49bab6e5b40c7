"""A shop, as Flask's tutorial makes an app: a factory that takes a test's configuration."""

import json
import os

import click
from flask import Flask

from shop.models import Product, db
from shop.views import bp


def compact(value):
    return json.dumps(value, separators=(",", ":"))


def create_app(test_config=None):
    app = Flask(__name__, instance_relative_config=True)
    app.config.from_mapping(
        SECRET_KEY=os.environ.get("SECRET_KEY", "dev"),
        SQLALCHEMY_DATABASE_URI=os.environ.get("DATABASE_URL", "sqlite:///shop.sqlite"),
        SQLALCHEMY_ENGINE_OPTIONS={"isolation_level": "SERIALIZABLE", "json_serializer": compact},
    )
    if test_config is None:
        app.config.from_pyfile("config.py", silent=True)
    else:
        app.config.update(test_config)

    db.init_app(app)
    app.register_blueprint(bp)

    @app.cli.command("init-db")
    def init_db():
        """Make new tables, and something to sell."""
        db.drop_all()
        db.create_all()
        db.session.add_all(Product(name=f"Product {number}", about={"colour": "red"}) for number in range(3))
        db.session.commit()
        click.echo("Initialized the database.")

    return app
