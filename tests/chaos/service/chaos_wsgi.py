"""The service as it was baked, and the routes that stress it."""

import os

import chaos_routes

from app import create_app

app = create_app()
app.register_blueprint(chaos_routes.bp)
if "CHAOS_USE_IN_MASTER" in os.environ:
    chaos_routes.use_in_this_process(app, int(os.environ["CHAOS_USE_IN_MASTER"]))
