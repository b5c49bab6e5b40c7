"""The floor without Flask: a bare WSGI callable, psycopg's own pool in autocommit, SQL by hand. It handles nothing that
can go wrong; nobody should ship it."""

import json
import os
from datetime import UTC, datetime
from urllib.parse import parse_qs

from psycopg_pool import ConnectionPool
from statements import CREATE, GET, PAGE, SLOW, as_dict

SIZE = int(os.environ["BENCH_THREADS"])
NOTES = "/api/notes"

pool = ConnectionPool(os.environ["DATABASE_URL"], min_size=SIZE, max_size=SIZE, kwargs={"autocommit": True}, open=False)


def app(environ, start_response):
    if pool.closed:
        pool.open()
    status, answer = serve(environ)
    body = json.dumps(answer, separators=(",", ":")).encode()
    start_response(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


def serve(environ):
    path = environ["PATH_INFO"]
    with pool.connection() as db:
        if path == "/slow":
            db.execute(SLOW)
            return "200 OK", {"slept": 0.05}
        if path != NOTES:
            row = db.execute(GET, (int(path.removeprefix(f"{NOTES}/")),)).fetchone()
            return ("200 OK", as_dict(row)) if row else ("404 Not Found", {})
        if environ["REQUEST_METHOD"] == "POST":
            given = json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))
            now = datetime.now(UTC)
            row = db.execute(CREATE, (given["title"], given.get("body", ""), now, now)).fetchone()
            return "201 Created", as_dict(row)
        query = parse_qs(environ["QUERY_STRING"])
        limit, after = int(query.get("limit", ["20"])[0]), int(query.get("after", ["0"])[0])
        rows = db.execute(PAGE, (after, limit + 1)).fetchall()
        items = [as_dict(row) for row in rows[:limit]]
        return "200 OK", {"items": items, "next": items[-1]["id"] if len(rows) > limit else None}
