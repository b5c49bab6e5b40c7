"""The real server: gunicorn with the plan's defaults, on a real Postgres, with more clients than slots."""

import contextlib
import json
import signal
import socket
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psycopg
import pytest
from serving import call, free_port, run, serving, wait_until
from sqlalchemy.engine import make_url

from app import defaults
from app.config import Settings

pytestmark = [pytest.mark.postgres, pytest.mark.direct, pytest.mark.live]


@contextlib.contextmanager
def sampled_peak(url: str) -> Iterator[list[int]]:
    """The most connections of the service that pg_stat_activity shows meanwhile."""
    peak = [0]
    done = threading.Event()
    libpq = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    query = "select count(*) from pg_stat_activity where application_name = %s"

    def sample() -> None:
        with psycopg.connect(libpq, autocommit=True) as connection:
            while not done.is_set():
                row = connection.execute(query, [defaults.SERVICE_NAME]).fetchone()
                peak[0] = max(peak[0], row[0] if row else 0)
                time.sleep(0.005)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield peak
    finally:
        done.set()
        sampler.join()


@dataclass(frozen=True)
class Server:
    port: int
    process: "subprocess.Popen[bytes]"
    log: Path
    environ: dict[str, str]


@pytest.fixture(scope="module")
def server(environ_for: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for the tests of this file, as the plan has it. The last test that uses it stops it."""
    environ, log = environ_for(), tmp_path_factory.mktemp("log") / "log"
    with serving(environ, log) as (port, process):
        yield Server(port, process, log, environ)


def drive(port: int, clients: int, enough: Callable[[], bool]) -> Counter[int]:
    """Mixed load: each client writes a note and reads it, again and again, for a while and until it is enough. The
    statuses, counted."""
    statuses: Counter[int] = Counter()
    began = time.monotonic()

    def client() -> None:
        while (lasts := time.monotonic() - began) < 0.2 or (lasts < 20 and not enough()):
            status, note = call(port, "POST", "/api/notes", {"title": "under load"})
            statuses[status] += 1
            if status == 201:
                status, read = call(port, "GET", f"/api/notes/{note['id']}")
                statuses[status if read == note else -1] += 1

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statuses


def test_the_peak_is_the_plans(app: Any, server: Server) -> None:
    """Three times as many clients as slots: every request is served, every slot is used, and no connection more is
    open than the plan says. The app is loaded before the fork, so this also shows that nothing is inherited."""
    plan = Settings.from_env(server.environ).plan
    with sampled_peak(server.environ["DATABASE_URL"]) as peak:
        statuses = drive(server.port, plan.slots * 3, lambda: peak[0] >= plan.connections_per_instance)
        _, metrics = call(server.port + 1, "GET", "/metrics")
    assert set(statuses) == {200, 201}, (statuses, server.log.read_text())
    assert peak[0] == plan.connections_per_instance
    assert f"db_pool_capacity {plan.connections_per_instance}.0" in metrics
    assert f"db_connections_opened_total {plan.connections_per_instance}.0" in metrics
    assert "db_pool_timeouts_total 0.0" in metrics
    assert call_is_logged(server.log)


def call_is_logged(log: Path) -> bool:
    """One JSON object a line, all of them."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    return any(entry.get("path") == "/api/notes" and entry["status"] == 201 for entry in entries)


def test_a_reload_needs_no_more_connections(app: Any, server: Server) -> None:
    """On HUP with requests in hand: the old workers finish them, and only then are there new ones. The server has no
    place for more connections than the plan's."""
    plan = Settings.from_env(server.environ).plan
    url = make_url(server.environ["DATABASE_URL"]).set(drivername="postgresql").render_as_string(hide_password=False)
    answers: list[int] = []
    threads = [
        threading.Thread(target=lambda: answers.append(call(server.port, "GET", "/api/notes?limit=1")[0]))
        for _ in range(2 * plan.slots)
    ]
    with psycopg.connect(url) as holder, psycopg.connect(url, autocommit=True) as watcher:

        def connected(condition: str) -> set[int]:
            query = f"select pid from pg_stat_activity where application_name = %s and {condition}"
            return {pid for (pid,) in watcher.execute(query.encode(), [defaults.SERVICE_NAME])}

        try:
            holder.execute("lock table notes")
            for thread in threads[: plan.slots]:
                thread.start()
            wait_until(lambda: len(connected("wait_event_type = 'Lock'")) == plan.slots)
            before = connected("true")
            server.process.send_signal(signal.SIGHUP)
            wait_until(lambda: "Hang up" in server.log.read_text())
            for thread in threads[plan.slots :]:
                thread.start()
            for _ in range(30):  # a third of a second, in which a worker beside the old ones would have served them
                assert connected("true") == before
                time.sleep(0.01)
        finally:
            holder.rollback()
            for thread in threads:
                if thread.ident:
                    thread.join()
        wait_until(lambda: not connected("true") & before)
    assert answers == [200] * len(threads)


def refusals(log: Path, count: int) -> bool:
    return log.read_text().count("would break the plan") == count


def test_signals_cannot_break_the_plan(app: Any, server: Server) -> None:
    """TTIN, three times, and not one worker more; then a stop that leaves nothing behind."""
    plan = Settings.from_env(server.environ).plan
    with sampled_peak(server.environ["DATABASE_URL"]) as peak:
        for refused in range(3):
            wait_until(partial(refusals, server.log, refused))
            server.process.send_signal(signal.SIGTTIN)
        wait_until(partial(refusals, server.log, 3))
        statuses = drive(server.port, plan.slots * 3, lambda: True)
    assert set(statuses) == {200, 201}
    assert peak[0] <= plan.connections_per_instance
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0


def test_a_port_in_use_is_said_at_once(environ: dict[str, str], tmp_path: Path) -> None:
    """With the variable that moves it, not after five retries."""
    port = str(free_port())
    with socket.create_server(("127.0.0.1", int(port))):
        done = run(["gunicorn"], environ | {"PORT": port}, tmp_path)
    assert done.returncode == 1
    assert f"127.0.0.1:{port} is in use; set PORT" in done.stderr
    assert "Traceback" not in done.stderr
