"""The app, for `gunicorn club:app`."""

from members import create_app

app = create_app()
