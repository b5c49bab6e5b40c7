"""`make load`: more clients than the running server has slots, for a few seconds, and what that did to the connections.

It only reads, and only on this machine. The server is the one that `make run` or `make prod` runs in another terminal;
its Postgres is asked too, where it can be found: DATABASE_URL, else the one that `make prod` started.
"""

import argparse
import contextlib
import http.client
import json
import math
import os
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import Any
from urllib.parse import SplitResult, urlsplit

import psycopg
from sqlalchemy.engine import make_url

from app import defaults
from scripts import postgres, prod

PATH = "/api/notes?limit=20"
CLIENTS_PER_CONNECTION = 4
ANSWER_SECONDS = 30
SAMPLE_SECONDS = 0.1
LOOPBACK = ("127.0.0.1", "localhost")
CONNECTED = "select count(*) from pg_stat_activity where application_name = %s"
METRIC = re.compile(r"^(db_\w+) ([0-9.e+-]+)$", re.MULTILINE)


class NoServerError(RuntimeError):
    """There is nothing to put under load; the message says what to do."""


def get(url: SplitResult, path: str) -> tuple[int, bytes]:
    """One request, on a connection of its own: gunicorn keeps none alive."""
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=ANSWER_SECONDS)
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read()


def metrics(url: SplitResult) -> dict[str, float]:
    """What the server says of its pools, summed over its workers."""
    try:
        _, body = get(url, "/metrics")
    except (OSError, http.client.HTTPException) as error:
        raise NoServerError(
            f"nothing answers on {url.geturl()}: {error}\n"
            "Start it with `make run` or `make prod` in another terminal. Where PORT is set for one, set it for both."
        ) from None
    found = {name: float(value) for name, value in METRIC.findall(body.decode(errors="replace"))}
    if "db_pool_capacity" not in found:
        raise NoServerError(f"what answers on {url.geturl()} is not {defaults.SERVICE_NAME}; set PORT to where that is")
    return found


def probes(url: SplitResult) -> SplitResult:
    """In production the metrics have a port of their own, where a question does not queue behind the load."""
    port = int(os.environ.get("WEB_PROBE_PORT") or (url.port or 80) + 1)
    other = url._replace(netloc=f"{url.hostname}:{port}")
    with contextlib.suppress(OSError, http.client.HTTPException, NoServerError):
        if get(other, "/")[0] == HTTPStatus.NOT_FOUND and metrics(other):
            return other
    return url


@contextlib.contextmanager
def database() -> Iterator["psycopg.Connection[Any] | None"]:
    """A connection to the Postgres that the server uses, or None where that cannot be told, or asked."""
    conninfo = None
    with contextlib.suppress(OSError, IndexError):
        # Postgres notes the folder of its socket in the fifth line.
        sockets = (prod.DATA / "postmaster.pid").read_text().splitlines()[4]
        conninfo = f"postgresql://{postgres.ROLE}@/{defaults.SERVICE_NAME}?host={sockets}"
    if "DATABASE_URL" in os.environ:
        conninfo = make_url(os.environ["DATABASE_URL"]).set(drivername="postgresql").render_as_string(False)
    connection = None
    with contextlib.suppress(psycopg.Error):
        connection = psycopg.connect(conninfo, autocommit=True, connect_timeout=2) if conninfo else None
    with connection or contextlib.nullcontext():
        yield connection


@contextlib.contextmanager
def sampled(question: Callable[[], float]) -> Iterator[list[float]]:
    """The answers to a question that is asked again and again for as long as the context lasts."""
    answers: list[float] = []
    over = threading.Event()

    def ask() -> None:
        while not over.wait(SAMPLE_SECONDS):
            with contextlib.suppress(NoServerError, psycopg.Error):
                answers.append(question())

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield answers
    finally:
        over.set()
        thread.join()


def drive(url: SplitResult, clients: int, seconds: float) -> tuple[Counter[str], list[float]]:
    """Let every client ask again and again: how often each outcome was, and the seconds that each answer took."""
    outcomes: list[str] = []
    took: list[float] = []
    end = time.perf_counter() + seconds

    def client() -> None:
        while (start := time.perf_counter()) < end:
            try:
                outcome = str(get(url, PATH)[0])
            except (OSError, http.client.HTTPException) as error:
                outcome = type(error).__name__
            outcomes.append(outcome)
            took.append(time.perf_counter() - start)

    threads = [threading.Thread(target=client, daemon=True) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return Counter(outcomes), sorted(took)


def measure(url: SplitResult, clients: int | None, seconds: float) -> dict[str, Any]:
    """Put the server under load and hold what it and its database say against the plan."""
    before = metrics(url)
    capacity = int(before["db_pool_capacity"])
    clients = clients or CLIENTS_PER_CONNECTION * capacity
    beside = probes(url)
    with database() as connection, contextlib.ExitStack() as samplers:
        connected = None
        if connection:
            count = connection.cursor()
            connected = samplers.enter_context(
                sampled(lambda: (count.execute(CONNECTED, [defaults.SERVICE_NAME]).fetchone() or (0,))[0])
            )
        in_use = samplers.enter_context(sampled(lambda: metrics(beside)["db_pool_checked_out"]))
        start = time.perf_counter()
        outcomes, took = drive(url, clients, seconds)
        lasted = time.perf_counter() - start
    after = metrics(url)
    return {
        "url": url.geturl() + PATH,
        "clients": clients,
        "seconds": round(lasted, 1),
        "requests": len(took),
        "requests_per_second": round(len(took) / lasted, 1),
        "p50_ms": at_share(took, 0.5),
        "p99_ms": at_share(took, 0.99),
        "outcomes": dict(outcomes),
        "pool_capacity": capacity,
        "in_use_peak": int(max(in_use, default=0)),
        "opened": int(after["db_connections_opened_total"] - before["db_connections_opened_total"]),
        "connected_peak": int(max(connected)) if connected else None,
        "plan_peak": int(after["db_connections_peak"]),
        "budget": int(after["db_connections_budget"]),
    }


def at_share(took: list[float], share: float) -> float:
    """A percentile of sorted seconds, in milliseconds."""
    return round(took[math.ceil(len(took) * share) - 1] * 1000, 1)


def problems(found: dict[str, Any]) -> list[str]:
    """What must not happen, however many clients there are."""
    lines = [f"{times} x {outcome}" for outcome, times in found["outcomes"].items() if outcome != "200"]
    held = max(found["in_use_peak"], found["connected_peak"] or 0)
    if held > found["pool_capacity"]:
        lines.append(f"{held} connections, more than the {found['pool_capacity']} of the plan")
    return lines


def describe(found: dict[str, Any]) -> str:
    answers = ", ".join(f"{times} x {outcome}" for outcome, times in sorted(found["outcomes"].items()))
    connected = found["connected_peak"]
    rows = [
        ("load", f"{found['clients']} clients for {found['seconds']} s: GET {found['url']}"),
        ("answers", f"{answers}: {found['requests_per_second']:g} a second"),
        ("latency", f"p50 {found['p50_ms']:g} ms, p99 {found['p99_ms']:g} ms"),
        ("pools", f"{found['in_use_peak']} of {found['pool_capacity']} connections in use at most"),
        ("opened", f"{found['opened']} connections while it lasted"),
        ("database", "not asked" if connected is None else f"{connected} connections of this service at most"),
        ("budget", f"{found['plan_peak']} for all instances by plan, of {found['budget']} usable"),
        *(("problem", problem) for problem in problems(found)),
    ]
    return "\n".join(f"{name:<10} {text}" for name, text in rows)


def loopback(text: str) -> SplitResult:
    url = urlsplit(text.rstrip("/"))
    if url.scheme != "http" or url.hostname not in LOOPBACK:
        raise argparse.ArgumentTypeError(f"{text} is not http:// on this machine")
    return url


def main() -> int:
    parser = argparse.ArgumentParser(prog="make load", description=__doc__)
    default_url = f"http://127.0.0.1:{os.environ.get('PORT', '8000')}"
    parser.add_argument("--url", type=loopback, default=default_url, help="default: %(default)s")
    parser.add_argument("--clients", type=int, help=f"default: {CLIENTS_PER_CONNECTION} for each pooled connection")
    parser.add_argument("--seconds", type=float, default=10, help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="for a machine to read")
    options = parser.parse_args()
    if options.seconds <= 0 or (options.clients is not None and options.clients <= 0):
        parser.error("--seconds and --clients are more than 0")
    try:
        found = measure(options.url, options.clients, options.seconds)
    except NoServerError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    print(json.dumps(found) if options.json else describe(found))
    return 1 if problems(found) else 0


if __name__ == "__main__":
    sys.exit(main())
