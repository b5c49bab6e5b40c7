"""A shop: an app as there are many, which knows nothing of plans."""

import click
from flask import Flask

from shop.models import Product, db
from shop.views import bp


def create_app():
    app = Flask(__name__)
    app.config.from_object("shop.config.Config")
    db.init_app(app)
    app.register_blueprint(bp)

    @app.cli.command()
    @click.option("--products", default=3)
    def fill(products):
        """Make the tables, and something to sell."""
        db.create_all()
        db.session.add_all(Product(name=f"Product {number}", stock=100) for number in range(products))
        db.session.commit()

    return app
