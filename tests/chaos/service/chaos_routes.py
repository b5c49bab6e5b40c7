"""Ways to stress the service, added to a baked copy by chaos_wsgi.py. The template has none of them."""

import os
import time
import uuid
from pathlib import Path

from flask import Blueprint, Flask, current_app, jsonify, request
from sqlalchemy import text

from app.extensions import db
from flask_pooling import run, unlimited

bp = Blueprint("chaos", __name__, url_prefix="/chaos")


def seconds() -> float:
    return float(request.args.get("s", "0.05"))


@bp.route("/query", methods=["GET", "POST"])
def query():
    """Run a query that takes its time."""
    statement = text("select pg_backend_pid() from pg_sleep(:s)")
    if request.method == "GET":
        pid = run(statement, {"s": seconds()})[0][0]
    else:
        pid = db.session.execute(statement, {"s": seconds()}).scalar_one()
    return jsonify(worker=os.getpid(), backend=pid)


@bp.get("/slow")
def slow():
    """Take time, without the database."""
    time.sleep(seconds())
    return jsonify(worker=os.getpid())


@bp.get("/held")
def held():
    """Wait until the test lets the request go. It leaves a file that says that it has come."""
    folder = Path(os.environ["CHAOS_HELD"])
    (folder / f"came-{uuid.uuid4()}").touch()
    while not (folder / "go").exists():
        time.sleep(0.02)
    return jsonify(worker=os.getpid())


@bp.get("/unlimited")
@unlimited
def without_limit():
    """Do the same, with leave to do so."""
    time.sleep(seconds())
    return jsonify(worker=os.getpid())


@bp.get("/large")
def large():
    """Send an answer that does not fit into the kernel's buffers."""
    return bytes(4 * 1024 * 1024)


@bp.get("/stream")
def stream():
    """Send lines one after the other."""

    def lines():
        for number in range(times):
            yield f"{number}\n"
            time.sleep(seconds)

    seconds, times = float(request.args.get("s", "0.3")), int(request.args.get("times", "5"))
    return current_app.response_class(lines(), mimetype="text/plain")


@bp.get("/echo/<int:number>")
def echo(number: int):
    """Return the row that was asked for. Another's would be a mixed-up connection."""
    row = run(text("select cast(:n as bigint)"), {"n": number})[0][0]
    return jsonify(number=row, worker=os.getpid())


@bp.post("/idle")
def idle():
    """Leave a transaction open while something else is done."""
    db.session.execute(text("select 1"))
    time.sleep(seconds())
    db.session.execute(text("select 1"))
    return jsonify(worker=os.getpid())


@bp.get("/two")
def two():
    """Use two connections in one request."""
    with db.engine.connect() as first:
        first.execute(text("select 1"))
        time.sleep(seconds())
        with db.engine.connect() as second:
            second.execute(text("select 1"))
    return jsonify(worker=os.getpid())


@bp.get("/nested")
def nested():
    """Use a nested app context: a second session, and so a second connection."""
    db.session.execute(text("select 1"))
    time.sleep(seconds())
    with current_app._get_current_object().app_context():
        db.session.execute(text("select 1"))
    return jsonify(worker=os.getpid())


@bp.route("/settings", methods=["GET", "POST"])
def settings():
    """Return the settings that hold for this request."""
    names = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout")
    statement, values = text("select name, setting from pg_settings where name = any(:names)"), {"names": [*names]}
    rows = run(statement, values) if request.method == "GET" else db.session.execute(statement, values).all()
    return jsonify({row.name: row.setting for row in rows})


def use_in_this_process(app: Flask, connections: int) -> None:
    """Fill the pool here, at import: with preload that is the master."""
    with app.app_context():
        held = [db.engine.connect() for _ in range(connections)]
        for connection in held:
            connection.execute(text("select 1"))
        for connection in held:
            connection.close()
