"""What this is, at `/`: a page for a browser, JSON for anything else."""

from flask import Blueprint, Response, current_app, jsonify, render_template, request, url_for

from app import defaults
from app.config import Settings

bp = Blueprint("home", __name__)


@bp.get("/")
def home() -> Response | str:
    settings: Settings = current_app.extensions["settings"]
    links = {
        "notes": url_for("notes.page"),
        "liveness": url_for("health.livez"),
        "readiness": url_for("health.readyz"),
        "metrics": url_for("metrics.show"),
    }
    facts = {
        "name": defaults.SERVICE_TITLE,
        "description": defaults.SERVICE_DESCRIPTION,
        "environment": settings.environment.value,
        "plan": settings.plan.sum,
    }
    if request.accept_mimetypes.best_match(["application/json", "text/html"]) == "text/html":
        return render_template("index.html", links=links, **facts)
    return jsonify(links=links, **facts)
