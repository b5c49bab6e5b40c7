"""The real server: gunicorn as the plan has it, on a real Postgres, with more clients than slots."""

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest
from sqlalchemy.engine import make_url

from app import defaults
from app.config import Settings
from tests.serving import SECONDS, Server, call, serving

pytestmark = [pytest.mark.postgres, pytest.mark.direct]


@contextmanager
def most_connections(url: str) -> Iterator[list[int]]:
    """Count the most connections of the service's web workers that pg_stat_activity shows meanwhile."""
    most, done = [0], threading.Event()
    libpq = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)

    def look() -> None:
        query = "select count(*) from pg_stat_activity where application_name = %s"
        with psycopg.connect(libpq, autocommit=True) as connection:
            while not done.wait(0.01):
                row = connection.execute(query, [defaults.SERVICE_NAME]).fetchone()
                most[0] = max(most[0], row[0] if row else 0)

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def drive(server: Server, clients: int, enough: Callable[[], bool]) -> Counter[int]:
    """Write and read notes with each client, until it is enough. Count the statuses; -1 is a wrong note."""
    statuses: Counter[int] = Counter()
    give_up = time.monotonic() + SECONDS

    def client() -> None:
        while not enough() and time.monotonic() < give_up:
            status, note = call(server.port, "POST", "/api/notes", {"title": "under load"})
            statuses[status] += 1
            if status == 201:
                status, read = call(server.port, "GET", f"/api/notes/{note['id']}")
                statuses[status if read == note else -1] += 1

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses


def test_the_peak_is_the_plans(environ: dict[str, str], tmp_path: Path) -> None:
    """Three times as many clients as slots: every request gets its own row, every slot is used, and no connection more
    is open than the plan says. The app is loaded before the fork, so this also shows that nothing is inherited."""
    plan = Settings.load().plan
    with serving(tmp_path / "log") as server, most_connections(environ["DATABASE_URL"]) as most:
        statuses = drive(server, plan.slots * 3, lambda: most[0] >= plan.connections_per_instance)
        probe = call(server.port + 1, "GET", "/metrics")
        assert call(server.port, "GET", "/metrics")[0] == 404
    assert set(statuses) == {200, 201}, (statuses, server.log.read_text())
    assert most[0] == plan.connections_per_instance
    assert f"db_pool_capacity {plan.connections_per_instance}.0" in probe[1]
    assert "db_pool_timeouts_total 0.0" in probe[1]
    entries = [json.loads(line) for line in server.log.read_text().splitlines()]  # one JSON object a line
    seen = {(entry.get("path"), entry.get("status")) for entry in entries}
    assert {("/api/notes", 201), ("/metrics", 404)} <= seen
    assert ("/metrics", 200) not in seen  # the port of the probes logs nothing
    assert server.process.returncode == 0
