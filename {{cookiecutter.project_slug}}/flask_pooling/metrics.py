"""Prometheus metrics, summed over the workers of this instance.

prometheus-client's multiprocess mode keeps one file for each process. Workers come and go (`max_requests`), and a file
for each former process would slow every scrape. So a file is named by the number of its worker, which gunicorn.py gives
to the worker's successor as well.
"""

import functools
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from flask import Blueprint, Response, abort, current_app, request
from prometheus_client import REGISTRY, CollectorRegistry, Counter, Gauge, Histogram, multiprocess, values
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from sqlalchemy import event
from sqlalchemy.engine import Engine
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection

from flask_pooling import holds
from flask_pooling.errors import note_a_connection
from flask_pooling.probes import PRIVATE
from flask_pooling.settings import Settings

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

bp = Blueprint("pooling_metrics", __name__)


class Metrics:
    """All metrics; docs/metrics.md explains each. They are made when they are first used: by then gunicorn's config
    has decided where they are kept."""

    def __init__(self) -> None:
        self.requests = Histogram(
            "http_request_seconds",
            "Time until the answer begins; the number of requests is `http_request_seconds_count`.",
            ["method", "endpoint", "status"],
            buckets=SECONDS,
        )
        self.backlog = _gauge("web_backlog", "Connections that wait to be accepted.", "livemostrecent")
        self.slots = _gauge("web_slots", "Requests that can be served at once.")
        self.slots_busy = _gauge("web_slots_busy", "Requests that are being served now.")
        self.slots_over_limit = _gauge("web_slots_over_limit", "Requests that are past WEB_TIMEOUT now.")
        self.requests_over_limit = Counter("web_requests_over_limit", "Requests that have gone past WEB_TIMEOUT.")
        self.workers_replaced = Counter("web_workers_replaced", "Workers replaced since all their threads hung.")
        self.pool_capacity = _gauge("db_pool_capacity", "Connections the pools may hold.")
        self.pool_checked_out = _gauge("db_pool_checked_out", "Connections in use now.", "livesum", "process")
        self.pool_wait = Histogram(
            "db_pool_wait_seconds", "Time that threads waited for a connection while all were in use.", buckets=SECONDS
        )
        self.pool_timeouts = Counter("db_pool_timeouts", "Waits for a connection that timed out.")
        self.connections_open = _gauge("db_connections_open", "Connections open now.", "livesum", "process")
        self.connections_opened = Counter("db_connections_opened", "Connections opened.", ["process"])
        self.connection_hold = Counter(
            "db_connection_hold_seconds",
            "Time that connections were held, added up; its rate is the number in use.",
            ["endpoint"],
        )
        self.budget = _gauge("db_connections_budget", "Connections all instances may use.", "max")
        self.planned = _gauge("db_connections_planned", "Connections all instances can hold, by plan.", "max")
        # Keeps the metric of each set of labels, since `labels()` is slow.
        self.requests_of = functools.cache(self.requests.labels)
        self.connection_hold_of = functools.cache(self.connection_hold.labels)
        # Gauges that are sampled: when /metrics is read, and twice a second in each worker, since another worker may be
        # the one that answers.
        self.sampled: dict[Gauge, Callable[[], float]] = {}

    def announce(self, settings: Settings) -> None:
        """Set the numbers of the plan. Each worker does so once, when it starts."""
        plan, servers = settings.plan, settings.plan.servers.values()
        self.slots.set(plan.threads)
        self.pool_capacity.set(sum(each.connections_per_worker for each in servers))
        # Behind a pooler the plan sets no limit to our connections: they are the pooler's clients.
        self.budget.set(sum(each.connections_usable for each in servers) if plan.pooler == "none" else math.inf)
        self.planned.set(sum(each.connections_peak for each in servers))

    def sample(self) -> None:
        for gauge, value in self.sampled.items():
            gauge.set(value())


def _gauge(name: str, text: str, mode: Any = "livesum", *labels: str) -> Gauge:
    return Gauge(name, text, labels, multiprocess_mode=mode)


metrics = functools.cache(Metrics)

_files = {"number": "master"}  # whose files this process writes to


def keep_in(folder: Path) -> None:
    """Keep the metrics of this process, and of those that it forks, in files below a folder."""
    os.environ[DIRECTORY] = str(folder)
    values.ValueClass = values.MultiProcessValue(lambda: _files["number"])  # type: ignore[no-untyped-call]


def take_number(number: int) -> None:
    """Write to the files of this number from now on: in a worker, after the fork."""
    _files["number"] = str(number)


def leave_number(number: int) -> None:
    """Drop the live gauges of the worker that has ended."""
    multiprocess.mark_process_dead(str(number))  # type: ignore[no-untyped-call]


def registry() -> CollectorRegistry:
    """Return the metrics as they are now, summed over the workers."""
    metrics().sample()
    if DIRECTORY not in os.environ:
        return REGISTRY
    summed = CollectorRegistry()
    multiprocess.MultiProcessCollector(summed)  # type: ignore[no-untyped-call]
    return summed


def is_public() -> bool:
    """Return whether the request came by the public port in production, where numbers are on the probe port alone."""
    return current_app.extensions["flask_pooling"].settings.in_production and PRIVATE not in request.environ


def refuse_strangers() -> None:
    if is_public():
        abort(404)


bp.before_request(refuse_strangers)


@bp.get("/metrics")
def show() -> Response:
    return Response(generate_latest(registry()), content_type=CONTENT_TYPE_LATEST)


class QueuePool(sa.QueuePool):
    """SQLAlchemy's pool, which also measures how long threads wait for a connection. There is no event for that."""

    __module__ = sa.QueuePool.__module__  # its logger has this name
    # The thread of a readiness probe that has a connection. Its wait is not counted, nor is that of a request for its
    # connection: neither means that the pool is too small.
    probe: int | None = None

    def connect(self) -> PoolProxiedConnection:
        if self.probe == threading.get_ident():
            return super().connect()
        most = self.size() + self._max_overflow  # there is no public way to ask for the overflow
        waits, began = self.checkedout() - (self.probe is not None) >= most, time.perf_counter()
        try:
            return super().connect()
        except sa.exc.TimeoutError:
            waits = True
            metrics().pool_timeouts.inc()
            raise
        finally:
            if waits:
                metrics().pool_wait.observe(time.perf_counter() - began)


def watch(engine: Engine, process: str) -> None:
    """Count what the engine's connections do.

    :param process: the kind of process, which is their label.
    """
    counted = metrics()
    is_open, opened = counted.connections_open.labels(process), counted.connections_opened.labels(process)
    held = holds.held.setdefault(process, {})
    holds.watch(engine)
    counted.sampled[counted.pool_checked_out.labels(process)] = lambda: len(held)

    def connected(connection: object, record: ConnectionPoolEntry) -> None:
        opened.inc()
        is_open.inc()

    def closed(connection: object, record: object = None) -> None:
        is_open.dec()

    def checked_out(connection: object, record: ConnectionPoolEntry, proxy: object) -> None:
        held[record] = holds.Hold()
        note_a_connection()

    def checked_in(connection: object, record: ConnectionPoolEntry) -> None:
        hold = held.pop(record, None)
        if hold is not None:
            counted.connection_hold_of(hold.endpoint).inc(time.perf_counter() - hold.began)

    event.listen(engine, "connect", connected)
    event.listen(engine, "close", closed)
    event.listen(engine, "close_detached", closed)
    event.listen(engine, "checkout", checked_out)
    event.listen(engine, "checkin", checked_in)
    event.listen(engine, "detach", checked_in)
