"""What is sold, and to whom."""

from flask_sqlalchemy import SQLAlchemy

db = SQLAlchemy()


class Product(db.Model):
    id = db.Column(db.Integer, primary_key=True)
    name = db.Column(db.String(100), nullable=False)
    stock = db.Column(db.Integer, nullable=False, default=0)
    orders = db.relationship("Order", back_populates="product", cascade="all, delete-orphan")


class Order(db.Model):
    id = db.Column(db.Integer, primary_key=True)
    customer = db.Column(db.String(100), nullable=False)
    product_id = db.Column(db.ForeignKey("product.id"), nullable=False)
    product = db.relationship("Product", back_populates="orders")
