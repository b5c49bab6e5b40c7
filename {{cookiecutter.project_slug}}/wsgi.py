"""What gunicorn and the `flask` command load."""

import sys

from flask import Flask

from app import cli, create_app
from app.config import SettingsError

try:
    app = create_app()
except SettingsError as error:
    # `flask pool plan` is arithmetic, and most useful before anything is configured.
    if sys.argv[1:3] != ["pool", "plan"]:
        raise SystemExit(str(error)) from None
    app = Flask(__name__)
    app.cli.add_command(cli.pool)
