"""What `make load` adds to Locust: as many clients as the plan suggests, and the open connections beside the plan's.

It puts nobody under load but a server on this machine, which is the one that `make run` or `make prod` runs.
"""

import contextlib
import json
import math
import os
import random
import signal
import threading
import time
from http.client import HTTPException
from typing import Any
from urllib.parse import urlsplit
from urllib.request import urlopen

import gevent
from locust import events

CLIENTS_PER_SLOT = 4
SECONDS = 10
SAMPLE_SECONDS = 0.2
TELL_SECONDS = 2
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Watch:
    """Asks the server again and again what it holds."""

    def __init__(self, host: str) -> None:
        address = urlsplit(host)
        # In production the numbers have a port of their own, where a question does not queue behind the load.
        beside = int(os.environ.get("WEB_PROBE_PORT") or (address.port or 80) + 1)
        for url in (f"http://{address.hostname}:{beside}/pool.json", f"{host}/pool.json"):
            with contextlib.suppress(OSError, ValueError, KeyError):
                self.url, self.lasted = url, 0.0
                self.plan, self.before = self.ask()
                self.most = dict(self.before)
                return
        raise SystemExit(
            f"no service with /pool.json answers on {host}: start `make run` or `make prod` in another terminal."
            " If PORT is set there, set it here as well."
        )

    def ask(self) -> tuple[dict[str, Any], dict[str, float]]:
        with urlopen(self.url, timeout=5) as answer:  # noqa: S310  # it is on this machine
            found = json.load(answer)
        return found["plan"], {name: value or 0 for name, value in found["now"].items()}

    def sample(self) -> dict[str, float] | None:
        with contextlib.suppress(OSError, ValueError, HTTPException):
            _, now = self.ask()
            self.most = {name: max(value, now[name]) for name, value in self.most.items()}
            return now
        return None

    def run(self) -> None:
        began = told = time.monotonic()
        while True:
            now = self.sample()
            if time.monotonic() - told > TELL_SECONDS:
                told = time.monotonic()
                slots, held = self.plan["slots"], self.plan["connections_per_instance"]
                line = "the service does not answer"
                if now:
                    busy, opened = now["web_slots_busy"], now["db_connections_open"]
                    line = f"{busy:.0f} of {slots} slots busy, {opened:.0f} of {held} connections open"
                print(f"{told - began:4.0f} s  {line}", flush=True)
            time.sleep(SAMPLE_SECONDS)

    def report(self) -> list[tuple[str, str]]:
        plan, most, before = self.plan, self.most, self.before
        waits = most["db_pool_wait_seconds_count"] - before["db_pool_wait_seconds_count"]
        waited = most["db_pool_wait_seconds_sum"] - before["db_pool_wait_seconds_sum"]
        held = plan["connections_per_instance"]
        return [
            (
                "slots",
                f"{most['web_slots_busy']:.0f} of {plan['slots']} busy at most, backlog {most['web_backlog']:.0f}",
            ),
            ("connections", f"{most['db_connections_open']:.0f} of {held} open at most"),
            ("in use", f"{most['db_pool_checked_out']:.0f} of {held} at most"),
            ("waits", f"{waits:.0f} for a connection, {waited:.2f} seconds in all"),
            ("plan", plan["sum"]),
        ]

    def problem(self) -> str | None:
        if self.sample() is None:
            return f"the service does not answer any more: {self.url}"
        held = max(self.most["db_connections_open"], self.most["db_pool_checked_out"])
        planned = self.plan["connections_per_instance"]
        return f"{held:.0f} connections, more than the {planned} of the plan" if held > planned else None


def wait_time(user: Any) -> float:
    """Seconds until the next request: 0, or with --rate random times that add up to that rate."""
    options, now = user.environment.parsed_options, time.monotonic()
    if not options.rate:
        return 0
    user.asks_at = getattr(user, "asks_at", now) + random.expovariate(options.rate / options.num_users)
    return max(0.0, float(user.asks_at - now))


def on_start(user: Any) -> None:
    """Spread the first requests: all clients start at the same time."""
    time.sleep(wait_time(user))


def rate(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError
    return number


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    parser.add_argument("--rate", type=rate, default=0, help="Requests a second; fewer if answers take over a second.")


@events.init.add_listener
def begin(environment: Any, **_: Any) -> None:
    options = environment.parsed_options
    environment.host = environment.host or f"http://127.0.0.1:{os.environ.get('PORT', '8000')}"
    try:
        address = urlsplit(environment.host)
        address.port  # noqa: B018  # is looked at
    except ValueError as error:
        raise SystemExit(f"{environment.host}: {error}") from None
    if address.hostname not in LOOPBACK:
        raise SystemExit(f"{environment.host}: only a server on this machine is put under load")
    watch = environment.watch = Watch(environment.host.rstrip("/"))
    clients = CLIENTS_PER_SLOT * watch.plan["slots"]
    # Enough clients for the rate, also when each waits a second for its answer.
    options.num_users = options.num_users or max(clients, math.ceil(options.rate))
    options.spawn_rate = options.spawn_rate or options.rate or options.num_users  # each asks as soon as it is there
    options.run_time = options.run_time or SECONDS
    page = watch.url.removesuffix(".json")
    clients = f"{options.num_users} client{'' if options.num_users == 1 else 's'}"
    print(f"{clients} for {options.run_time} seconds; watch {page}", flush=True)
    gevent.signal_handler(signal.SIGINT, environment.runner.quit)  # else it ends whatever runs when it comes
    threading.Thread(target=watch.run, daemon=True).start()  # a greenlet, since Locust has patched threads


@events.test_start.add_listener
def start(environment: Any, **_: Any) -> None:
    environment.watch.lasted = -time.monotonic()


@events.test_stop.add_listener
def stop(environment: Any, **_: Any) -> None:
    environment.watch.lasted += time.monotonic()


@events.quitting.add_listener
def end(environment: Any, **_: Any) -> None:
    watch, total, options = environment.watch, environment.stats.total, environment.parsed_options
    problem, good = watch.problem(), total.num_requests - total.num_failures
    if watch.lasted < 0:  # Ctrl-C
        watch.lasted += time.monotonic()
    offered = f", {options.rate:g} offered" if options.rate else f", {options.num_users} clients"
    percentiles = (f"p{share} {total.get_response_time_percentile(share / 100):.0f} ms" for share in (50, 95, 99))
    rows = [
        ("answers", f"{good} good, {total.num_failures} failed"),
        ("rate", f"{good / watch.lasted:.1f} good answers a second{offered}"),
        ("latency", ", ".join(percentiles)),
        *watch.report(),
    ]
    if problem:
        rows.append(("problem", problem))
        environment.process_exit_code = 1
    if options.html_file:
        rows.append(("report", os.path.abspath(options.html_file)))
    text = "\n".join(f"{name:<12} {text}" for name, text in rows)
    environment.events.quit.add_listener(lambda **_: print(text))  # after Locust's own tables
