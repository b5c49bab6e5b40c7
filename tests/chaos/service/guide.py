"""The app that the guide of 2024 recommends, word for word where it counts."""

import os

from flask import Flask, jsonify
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import text

app = Flask(__name__)
app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"]
app.config["SQLALCHEMY_POOL_SIZE"] = 20
app.config["SQLALCHEMY_MAX_OVERFLOW"] = 0
db = SQLAlchemy(app)


@app.get("/")
def index():
    return jsonify(status="up")


@app.get("/query")
def query():
    db.session.execute(text("select pg_sleep(0.05)"))
    return jsonify(status="ok")
