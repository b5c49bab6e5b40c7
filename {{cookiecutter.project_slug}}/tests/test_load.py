"""scripts/load.py: what it measures, and when it says that something is wrong."""

import argparse
import threading
from collections.abc import Iterator
from typing import Any
from urllib.parse import SplitResult, urlsplit

import pytest
from flask import Flask
from werkzeug.serving import make_server

from app import metrics
from scripts import load

GOOD = {
    "url": "http://127.0.0.1:8000/api/notes",
    "clients": 48,
    "seconds": 10.0,
    "requests": 1000,
    "requests_per_second": 100.0,
    "p50_ms": 20.0,
    "p99_ms": 40.0,
    "outcomes": {"200": 1000},
    "pool_capacity": 12,
    "in_use_peak": 11,
    "opened": 12,
    "connected_peak": 12,
    "plan_peak": 24,
    "budget": 87,
}


@pytest.fixture
def url(app: Flask) -> Iterator[SplitResult]:
    """The app on a port of its own, as a worker that has announced its share."""
    metrics.announce(app.extensions["settings"])
    server = make_server("127.0.0.1", 0, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield urlsplit(f"http://127.0.0.1:{server.server_port}")
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.live
def test_measures(url: SplitResult, app: Flask) -> None:
    """Every client asks again and again, and what the server says of its pools and its plan is reported."""
    plan = app.extensions["settings"].plan
    clients = min(3, plan.threads)  # werkzeug's server has a thread for each, where gunicorn would have the plan's
    found = load.measure(url, clients, 0.1)
    assert found["clients"] == clients
    assert found["outcomes"] == {"200": found["requests"]}
    assert 0 < found["p50_ms"] <= found["p99_ms"]
    assert found["pool_capacity"] == plan.connections_per_worker
    assert (found["plan_peak"], found["budget"]) == (plan.connections_peak, plan.connections_usable)
    assert load.problems(found) == []


def test_nobody_at_home() -> None:
    """Where nothing answers, it is said how to start it."""
    with pytest.raises(load.NoServerError, match=r"nothing answers on http://127.0.0.1:1: .*\n.*`make run` or"):
        load.measure(urlsplit("http://127.0.0.1:1"), 1, 0.1)


@pytest.mark.parametrize(
    ("found", "problem"),
    [
        ({}, None),
        ({"connected_peak": None}, None),
        ({"outcomes": {"200": 990, "503": 10}}, "10 x 503"),
        ({"outcomes": {"200": 999, "ConnectionResetError": 1}}, "1 x ConnectionResetError"),
        ({"connected_peak": 13}, "13 connections, more than the 12 of the plan"),
        ({"in_use_peak": 13}, "13 connections, more than the 12 of the plan"),
    ],
)
def test_problems(found: dict[str, Any], problem: str | None) -> None:
    """Any answer but a 200, and any connection beyond the plan, is a problem, and is shown as one."""
    assert load.problems(GOOD | found) == ([problem] if problem else [])
    assert (f"problem    {problem}" in load.describe(GOOD | found)) == bool(problem)


@pytest.mark.parametrize("text", ["http://example.org", "https://127.0.0.1", "http://127.0.0.1.example", "127.0.0.1"])
def test_only_this_machine(text: str) -> None:
    """Nobody else's server is put under load by accident."""
    with pytest.raises(argparse.ArgumentTypeError, match="on this machine"):
        load.loopback(text)


def test_shares() -> None:
    """A percentile is one of the measured times, in milliseconds."""
    assert [load.at_share([0.001, 0.002, 0.003, 0.004], share) for share in (0.25, 0.5, 0.99)] == [1, 2, 4]
