"""The floor with Flask: psycopg's own pool in autocommit, SQL by hand, no ORM, no checks, no logs. A write is one
transaction, as it is in the baked service."""

import os
from datetime import UTC, datetime

from flask import Flask, abort, jsonify, request, url_for
from psycopg_pool import ConnectionPool
from statements import CREATE, GET, PAGE, SLOW, as_dict

SIZE = int(os.environ["BENCH_THREADS"])

# Opened on first use, by the worker: the app may be loaded before the fork.
pool = ConnectionPool(os.environ["DATABASE_URL"], min_size=SIZE, max_size=SIZE, kwargs={"autocommit": True}, open=False)
app = Flask(__name__)


def connection():
    if pool.closed:
        pool.open()
    return pool.connection()


@app.get("/api/notes/<int:note_id>")
def read(note_id):
    with connection() as db:
        row = db.execute(GET, (note_id,)).fetchone()
    if row is None:
        abort(404)
    return jsonify(as_dict(row))


@app.get("/api/notes")
def page():
    limit, after = request.args.get("limit", 20, int), request.args.get("after", 0, int)
    with connection() as db:
        rows = db.execute(PAGE, (after, limit + 1)).fetchall()
    items = [as_dict(row) for row in rows[:limit]]
    return jsonify(items=items, next=items[-1]["id"] if len(rows) > limit else None)


@app.post("/api/notes")
def create():
    given, now = request.get_json(), datetime.now(UTC)
    with connection() as db, db.transaction():
        note = as_dict(db.execute(CREATE, (given["title"], given.get("body", ""), now, now)).fetchone())
    return jsonify(note), 201, {"Location": url_for("read", note_id=note["id"])}


@app.get("/slow")
def slow():
    with connection() as db:
        db.execute(SLOW)
    return {"slept": 0.05}
