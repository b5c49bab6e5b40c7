"""/pool: one page that draws the plan, and how much of it is in use. /pool.json has the numbers."""

import math
import secrets
from collections import Counter

from flask import Blueprint, Response, current_app, jsonify, make_response, render_template

from flask_pooling import metrics
from flask_pooling.cli import plan_as_dict
from flask_pooling.sizing import SUPERUSER_RESERVED

# The metrics that are drawn.
SUMS = (
    *("web_slots", "web_slots_busy", "web_slots_over_limit", "web_backlog", "db_connections_open"),
    *("db_pool_checked_out", "db_pool_capacity"),
    *("db_pool_wait_seconds_count", "db_pool_wait_seconds_sum", "db_pool_timeouts_total"),
    *("web_requests_over_limit_total", "web_workers_replaced_total"),
)

# What is drawn of the plan is for all servers together, as what is open is.
SUMMED = ("reserved", "connections_per_instance", "connections_peak", "connections_jobs", "connections_usable")

bp = Blueprint("pooling_page", __name__, template_folder="templates")
bp.before_request(metrics.refuse_strangers)


@bp.get("/pool")
def show() -> Response:
    nonce, name = secrets.token_urlsafe(16), current_app.extensions["flask_pooling"].settings.service_name
    response = make_response(render_template("flask_pooling/pool.html", name=name, nonce=nonce))
    nothing_else = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; connect-src 'self'"
    own = f"script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; img-src data:"
    response.headers["Content-Security-Policy"] = f"{nothing_else}; {own}"
    return response


@bp.get("/pool.json")
def numbers() -> Response:
    """Return the plan, and the sums over this instance's workers."""
    settings = current_app.extensions["flask_pooling"].settings
    servers = settings.plan.servers.values()
    summed = {name: sum(getattr(each, name) for each in servers) for name in SUMMED}
    more = {"superusers": SUPERUSER_RESERVED * len(servers), "timeout": settings.web_timeout}
    now: dict[str, float | None] = dict.fromkeys(SUMS, 0)
    answers = failures = 0.0
    holders: Counter[str] = Counter()
    for family in metrics.registry().collect():
        for sample in family.samples:
            if sample.name in SUMS:
                now[sample.name] = (now[sample.name] or 0) + sample.value if math.isfinite(sample.value) else None
            elif sample.name == "db_connection_hold_seconds_total":
                holders[sample.labels["endpoint"]] += sample.value  # type: ignore[assignment]
            elif sample.name == "http_request_seconds_count" and not sample.labels["endpoint"].startswith("pooling_"):
                answers += sample.value
                failures += sample.value if sample.labels["status"] >= "500" else 0
    plan = plan_as_dict(settings.plan) | summed | more
    return jsonify(plan=plan, now=now | {"answers": answers, "failures": failures, "holders": holders.most_common(3)})
