"""Look, and buy."""

import os

from flask import Blueprint, abort, current_app, jsonify, request
from sqlalchemy import text

from shop.models import Order, Product, db

bp = Blueprint("shop", __name__)


@bp.get("/products")
def products():
    found = db.session.scalars(db.select(Product).limit(current_app.config["ITEMS_PER_PAGE"]))
    return jsonify([{"id": each.id, "name": each.name, "stock": each.stock} for each in found])


@bp.post("/products/<int:product_id>/orders")
def order(product_id):
    product = db.get_or_404(Product, product_id)
    if product.stock < 1:
        abort(409)
    product.stock -= 1
    db.session.add(Order(product=product, customer=request.get_json()["customer"]))
    db.session.commit()
    return jsonify(stock=product.stock), 201


@bp.get("/slow/<seconds>")
def slow(seconds):
    """Which process answers, on which connection of the server, after a while."""
    row = db.session.execute(text("select pg_backend_pid(), pg_sleep(:seconds)"), {"seconds": float(seconds)}).one()
    return jsonify(worker=os.getpid(), connection=row[0])
