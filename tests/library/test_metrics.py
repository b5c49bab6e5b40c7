"""The metrics, as Prometheus reads them."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from flask import Flask

from flask_pooling import metrics
from tests.library.conftest import engine_of
from tests.serving import ROOT, environment


def value(text: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (.+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def read(app: Flask) -> str:
    return app.test_client().get("/metrics", environ_overrides={"flask_pooling.private": True}).text


def test_strangers_get_no_numbers(plain: Flask) -> None:
    """In production they are on the probe port alone."""
    assert plain.test_client().get("/metrics").status_code == 404


def test_requests_are_counted_by_endpoint_and_status(plain: Flask) -> None:
    """By endpoint, not by path: a label for each path would fill the memory of Prometheus."""
    name = 'http_request_seconds_count{endpoint="none",method="GET",status="404"}'
    before = value(read(plain), name)
    for number in (777, 778):
        plain.test_client().get(f"/nothing/{number}")
    after = read(plain)
    assert value(after, name) == before + 2
    assert "777" not in re.sub(r"\d\.\d+", "", after)
    plain.test_client().open("/items", method="MADEUP")
    assert "MADEUP" not in read(plain)


def test_connections_are_counted(plain: Flask) -> None:
    """Opened, open, in use now, and for how long they were held."""
    opened, in_use = 'db_connections_opened_total{process="web"}', 'db_pool_checked_out{process="web"}'
    engine_of(plain).dispose()
    before = read(plain)
    with engine_of(plain).connect():
        during = read(plain)
    after = read(plain)
    assert value(during, in_use) == value(before, in_use) + 1
    assert value(after, in_use) == value(before, in_use)
    assert value(after, opened) == value(before, opened) + 1
    held = 'db_connection_hold_seconds_total{endpoint="none"}'
    assert value(before, held) < value(after, held) < value(before, held) + 1


def test_the_plan_and_the_budget_are_there(plain: Flask) -> None:
    """So that an alert can compare what is open with what may be."""
    settings = plain.extensions["flask_pooling"].settings
    metrics.metrics().announce(settings)
    text = read(plain)
    # Behind a pooler the server's connections are the pooler's, and nothing of ours can exceed them.
    budget = settings.plan.connections_usable if settings.db_pooler == "none" else math.inf
    assert value(text, "db_connections_budget") == budget
    assert value(text, "db_connections_planned") == settings.plan.connections_peak
    assert value(text, "db_pool_capacity") == settings.plan.connections_per_worker


WORKERS = """
import sys
from pathlib import Path
from prometheus_client import generate_latest
from flask_pooling import metrics
metrics.keep_in(Path(sys.argv[1]))
for number in (1, 2, 2):
    metrics.take_number(number)
    metrics.metrics().pool_timeouts.inc(2)
    metrics.metrics().pool_capacity.set(4)
    metrics.take_number("master")  # to close the files, as the end of a process does
    metrics.metrics().pool_timeouts.inc(0)
print(generate_latest(metrics.registry()).decode())
"""


@pytest.mark.sqlite
def test_workers_are_summed_and_a_successor_takes_over(tmp_path: Path) -> None:
    """Two workers and the successor of one: the counters add up, and there is no third file."""
    done = subprocess.run(
        [sys.executable, "-c", WORKERS, str(tmp_path)],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert value(done.stdout, "db_pool_timeouts_total") == 6
    assert value(done.stdout, "db_pool_capacity") == 8
    assert {path.stem.rpartition("_")[2] for path in tmp_path.iterdir()} == {"1", "2", "master"}


MISTAKEN = """
from prometheus_client import Counter
MADE = Counter("made_here", "Of the owner's.")
"""
SERVES = """
def app(environ, start_response):
    start_response("200 OK", [])
    return []
"""
