"""The service as it is baked, and a 50 ms query beside it. The harness copies this into the baked project."""

import sqlalchemy as sa

from app import create_app
from app.extensions import db

app = create_app()


@app.get("/slow")
def slow():
    db.session.execute(sa.text("select pg_sleep(0.05)"))
    return {"slept": 0.05}
