"""The service as it is baked, and a 50 ms query beside it. The harness copies this into the baked project."""

import logging.config

import sqlalchemy as sa

from app import create_app, logs
from app.config import Environment
from app.extensions import db

# As gunicorn.conf.py does; for those who serve without it.
logging.config.dictConfig(logs.config_for(Environment.PRODUCTION))
app = create_app(web=True)


@app.get("/slow")
def slow():
    db.session.execute(sa.text("select pg_sleep(0.05)"))
    return {"slept": 0.05}
