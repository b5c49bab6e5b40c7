"""What Prometheus reads."""

import re
from pathlib import Path

import pytest
import serving
from flask import Flask

from app import metrics
from app.config import Settings
from app.extensions import db


def value(text: str, name: str) -> float:
    found = re.search(rf"^{re.escape(name)} (.+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def test_requests_are_counted_by_endpoint_and_status(app: Flask) -> None:
    """By endpoint, not by path: a label for each id would fill the memory of Prometheus."""
    client = app.test_client()
    name = 'http_request_seconds_count{endpoint="notes.read",method="GET",status="404"}'
    before = value(client.get("/metrics").text, name)
    for note_id in (777, 778):
        client.get(f"/api/notes/{note_id}")
    after = client.get("/metrics").text
    assert value(after, name) == before + 2
    assert '"777"' not in after
    assert "/777" not in after


@pytest.mark.live
def test_connections_are_counted(app: Flask) -> None:
    """Opened, in use now, and for how long they were held."""
    client = app.test_client()
    with app.app_context():
        before = client.get("/metrics").text
        with db.engine.connect():
            during = client.get("/metrics").text
        after = client.get("/metrics").text
    assert value(during, "db_pool_checked_out") == value(before, "db_pool_checked_out") + 1
    assert value(after, "db_pool_checked_out") == value(before, "db_pool_checked_out")
    assert value(after, "db_connections_opened_total") == value(before, "db_connections_opened_total") + 1
    assert value(after, "db_connection_hold_seconds_count") == value(before, "db_connection_hold_seconds_count") + 1


def test_the_plan_and_the_budget_are_there(app: Flask, environ: dict[str, str]) -> None:
    """So that an alert can compare what is open with what may be."""
    settings = Settings.from_env(environ)
    metrics.announce(settings)
    text = app.test_client().get("/metrics").text
    assert value(text, "db_connections_budget") == settings.plan.connections_usable
    assert value(text, "db_connections_peak") == settings.plan.connections_peak
    assert value(text, "db_pool_capacity") == settings.plan.connections_per_worker


WORKERS = """
from app import metrics
for slot in (1, 2, 2):
    metrics.take_slot(slot)
    metrics.pool_timeouts.inc(2)
    metrics.pool_capacity.set(4)
    metrics.take_slot("master")  # to close the files, as the end of a process does
    metrics.pool_timeouts.inc(0)
print(metrics.show().get_data(as_text=True))
"""


@pytest.mark.sqlite
def test_workers_are_summed_and_a_successor_takes_over(tmp_path: Path) -> None:
    """Two workers and the successor of one: the counters add up, and there is no third file."""
    files = tmp_path / "metrics"
    files.mkdir()
    done = serving.run(["python", "-c", WORKERS], {metrics.DIRECTORY: str(files)}, tmp_path)
    assert value(done.stdout, "db_pool_timeouts_total") == 6
    assert value(done.stdout, "db_pool_capacity") == 8
    assert {path.stem.rpartition("_")[2] for path in files.iterdir()} == {"1", "2", "master"}
