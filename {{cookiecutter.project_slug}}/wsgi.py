"""The app of the `flask` command. gunicorn does not load this file: gunicorn.conf.py names the factory."""

import os
import sys

from flask import Flask

from app import create_app
from app.config import Settings
from flask_pooling import PlanError, SettingsError, cli

try:
    app = create_app()
except (SettingsError, PlanError) as error:
    # `flask pool plan` is arithmetic, and is useful before anything is configured.
    if sys.argv[1:3] not in (["pool", "plan"], ["pool", "version"]):
        hint = (
            ""
            if "APP_ENV" in os.environ
            else "\nThese are production's rules; on your own machine set APP_ENV=development"
        )
        raise SystemExit(f"{error}{hint}") from None
    app = Flask(__name__)
    cli.register(app, Settings)
