"""The page at `/`, which describes the service: HTML for a browser, JSON for anything else."""

from flask import Blueprint, Response, current_app, jsonify, render_template, request, url_for

from app import defaults
from app.config import Settings

bp = Blueprint("home", __name__)


@bp.get("/")
def home() -> Response | str:
    settings: Settings = current_app.extensions["settings"]
    links = {
        "notes": url_for("notes.page"),
        "readiness": url_for("pooling_health.readyz"),
        "liveness": url_for("pooling_health.livez"),
    }
    facts = {"name": defaults.SERVICE_TITLE, "description": defaults.SERVICE_DESCRIPTION}
    if not settings.in_production:  # clients need not know the numbers
        links = {"pool": url_for("pooling_page.show"), "metrics": url_for("pooling_metrics.show")} | links
        facts |= {"environment": settings.app_env.value, "plan": settings.plan.sum}
    if request.accept_mimetypes.best_match(["application/json", "text/html"]) == "text/html":
        return render_template("index.html", links=links, numbers=settings.plan, host=request.host_url, **facts)
    return jsonify(links=links, **facts)
