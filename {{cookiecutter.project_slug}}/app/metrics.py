"""Prometheus metrics, summed over the workers of this instance.

prometheus-client's multiprocess mode keeps one file for each process. Workers come and go (`max_requests`), and a file
for each process that ever lived would slow every scrape; files are therefore named by a worker's slot, which its
successor takes over (gunicorn.conf.py numbers them).
"""

import functools
import os
import time
from collections.abc import Callable

from flask import Blueprint, Response
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
    multiprocess,
    values,
)
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.pool import ConnectionPoolEntry

from app.config import Settings

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

SLOT = "WORKER_SLOT"

slot = [os.environ.get(SLOT, "master")]


def take_slot(number: int | str) -> None:
    """Write to the files of this slot from now on; gunicorn.conf.py calls it in each worker after the fork."""
    slot[0] = os.environ[SLOT] = str(number)


if DIRECTORY in os.environ:  # the slot is asked for at each change of each value, so by a call that costs little
    values.ValueClass = values.MultiProcessValue(functools.partial(slot.__getitem__, 0))  # type: ignore[no-untyped-call]

requests = Histogram(
    "http_request_seconds",
    "Time to serve a request; the count of them is `http_request_seconds_count`.",
    ["method", "endpoint", "status"],
    buckets=SECONDS,
)
pool_capacity = Gauge("db_pool_capacity", "Connections the pools may hold.", multiprocess_mode="livesum")
pool_checked_out = Gauge("db_pool_checked_out", "Connections in use now.", multiprocess_mode="livesum")
pool_timeouts = Counter("db_pool_timeouts", "Requests that found no free connection in time.")
connections_opened = Counter("db_connections_opened", "Connections opened to the database.")
connection_hold = Histogram(
    "db_connection_hold_seconds", "Time a connection is held: busy connections = rate x hold.", buckets=SECONDS
)
budget = Gauge("db_connections_budget", "Connections the whole fleet may use.", multiprocess_mode="max")
peak = Gauge("db_connections_peak", "Connections the whole fleet can hold, by plan.", multiprocess_mode="max")

bp = Blueprint("metrics", __name__)


@bp.get("/metrics")
def show() -> Response:
    registry: CollectorRegistry = REGISTRY
    if DIRECTORY in os.environ:
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)


@functools.cache
def requests_of(method: str, endpoint: str, status: int) -> Histogram:
    """Where the time of each such request goes. The caller sees to it that the labels are few."""
    return requests.labels(method, endpoint, status)


def announce(settings: Settings) -> None:
    """What this worker may hold, and what the fleet may: each worker says so once, when it starts."""
    pool_capacity.set(settings.plan.connections_per_worker)
    budget.set(settings.plan.connections_usable)
    peak.set(settings.plan.connections_peak)


def watch(engine: Engine) -> None:
    """Count what the engine's connections do."""
    clock: Callable[[], float] = time.perf_counter

    def connected(connection: object, record: ConnectionPoolEntry) -> None:
        connections_opened.inc()

    def checked_out(connection: object, record: ConnectionPoolEntry, proxy: object) -> None:
        pool_checked_out.inc()
        record.info["checked_out"] = clock()

    def checked_in(connection: object, record: ConnectionPoolEntry) -> None:
        since = record.info.pop("checked_out", None)
        if since is not None:
            pool_checked_out.dec()
            connection_hold.observe(clock() - since)

    event.listen(engine, "connect", connected)
    event.listen(engine, "checkout", checked_out)
    event.listen(engine, "checkin", checked_in)
