"""Look, and buy."""

import os

from flask import Blueprint, jsonify, request
from sqlalchemy import text

from shop.models import Product, db

bp = Blueprint("shop", __name__)


@bp.get("/")
def products():
    return jsonify([each.name for each in db.session.scalars(db.select(Product).order_by(Product.id))])


@bp.post("/")
def add():
    db.session.add(Product(name=request.form["name"]))
    db.session.commit()
    return "", 201


@bp.get("/about")
def about():
    """Say how the database has it, and at which level it was read."""
    found = db.session.scalar(text("select cast(about as varchar) from product order by id limit 1"))
    return jsonify(about=found, level=db.session.connection().get_isolation_level())


@bp.get("/slow/<seconds>")
def slow(seconds):
    """Name the process that answers, and its connection of the server, after a while."""
    row = db.session.execute(text("select pg_backend_pid(), pg_sleep(:seconds)"), {"seconds": float(seconds)}).one()
    return jsonify(worker=os.getpid(), connection=row[0])


@bp.get("/metrics")
def figures():
    return "the shop's own"
