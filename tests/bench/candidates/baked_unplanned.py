"""The baked service for a gunicorn without gunicorn.conf.py, which it would refuse to serve under in production."""

from flask_pooling import process

process.in_gunicorn = True
from baked import app  # noqa: E402, F401
