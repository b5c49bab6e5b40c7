"""The baked service for a gunicorn without gunicorn.conf.py, which it would refuse to serve under in production."""

from flask_pooling.middleware import started_by_hooks

started_by_hooks()
from baked import app  # noqa: E402, F401
