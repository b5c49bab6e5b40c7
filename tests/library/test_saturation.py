"""The metrics of waiting, and the table that explains them."""

import re
import threading
from collections.abc import Callable

import pytest
import sqlalchemy as sa
from flask import Flask
from prometheus_client import REGISTRY

from flask_pooling import holds, metrics
from tests.library.conftest import engine_of
from tests.serving import ROOT


def sample(name: str) -> float:
    return REGISTRY.get_sample_value(name) or 0.0


@pytest.mark.sqlite
def test_each_metric_is_in_the_table() -> None:
    """With its unit and what to do, and nothing else is in it."""
    known = {
        family.name + ("_total" if family.type == "counter" else "")
        for found in vars(metrics.metrics()).values()
        if hasattr(found, "describe")
        for family in found.describe()
    }
    rows = re.findall(
        r"^\| `([a-z_]+)` \| (.+?) \| (.+?) \| (.*?) ?\|$", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE
    )
    assert {name for name, *_ in rows} == known
    assert len(rows) == len(known)
    assert all(unit and meaning for _, unit, meaning, _ in rows)


@pytest.mark.postgres
def test_waits_for_a_connection_are_counted(make_plain: Callable[..., Flask]) -> None:
    """Only those: a free connection, or one that is opened, is no wait. One that ends without a connection is both."""
    engine = engine_of(make_plain(WEB_THREADS=1, WEB_CONCURRENCY=2, DB_POOL_TIMEOUT=2, DB_CONNECT_TIMEOUT=2))
    count, total = sample("db_pool_wait_seconds_count"), sample("db_pool_wait_seconds_sum")
    timeouts = sample("db_pool_timeouts_total")
    for _ in range(2):
        with engine.connect():
            pass
    assert sample("db_pool_wait_seconds_count") == count
    held = engine.connect()
    threading.Timer(0.3, held.close).start()
    with engine.connect():
        pass
    assert sample("db_pool_wait_seconds_count") == count + 1
    assert 0.2 < sample("db_pool_wait_seconds_sum") - total < 2
    with engine.connect(), pytest.raises(sa.exc.TimeoutError):
        engine.connect()
    assert sample("db_pool_wait_seconds_count") == count + 2
    assert sample("db_pool_timeouts_total") == timeouts + 1


@pytest.mark.postgres
def test_open_connections_are_counted(make_plain: Callable[..., Flask]) -> None:
    """Until they are closed, by whomever: the pool, an error, or who has taken one out of the pool."""
    engine, name = engine_of(make_plain()), "db_connections_open"

    def open_now() -> float:
        return REGISTRY.get_sample_value(name, {"process": "web"}) or 0.0

    before = open_now()
    with engine.connect() as one, engine.connect() as two:
        assert open_now() == before + 2
        one.invalidate()
        assert open_now() == before + 1
        two.detach()
        metrics.metrics().sample()
        assert not [record for held in holds.held.values() for record in held]
    assert open_now() == before
    with engine.connect():
        pass
    engine.dispose()
    assert open_now() == before
