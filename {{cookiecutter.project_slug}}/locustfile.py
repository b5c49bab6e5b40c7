"""The requests of `make load`. Add tasks for your own views: Locust's manual says how.

    make load                                        50 users for 10 seconds
    make load ARGS="--users 200 --run-time 60s"      Locust's own options

A user sends its next request when it has its answer; with `wait_time = constant_throughput(1)` it sends one a second.
The tasks only read. Fill the tables first: an empty page costs less than yours will.
"""

import json
import os
import signal
from collections import Counter
from contextlib import suppress
from http.client import HTTPException
from urllib.parse import urlsplit
from urllib.request import urlopen

import gevent
from locust import HttpUser, events, task


class Reader(HttpUser):
    @task(4)
    def page(self):
        self.client.get("/api/notes?limit=20")

    @task(1)
    def home(self):
        self.client.get("/")


# The rest shows the connections of the service beside those of its plan, from its /pool.json.
BUSY, OPEN, WAITS = "web_slots_busy", "db_connections_open", "db_pool_wait_seconds_count"


def ask(url):
    """Return the plan and the current numbers: a Counter, since `|` of two Counters takes the larger numbers."""
    with urlopen(url, timeout=5) as answer:  # noqa: S310  # it is the host that is put under load
        found = json.load(answer)
    return found["plan"], Counter({name: found["now"][name] or 0 for name in (BUSY, OPEN, WAITS)})


def sample(environment):
    with suppress(OSError, HTTPException, ValueError):
        environment.most |= ask(environment.numbers)[1]


def watch(environment):
    while True:
        sample(environment)
        gevent.sleep(0.2)


@events.init.add_listener
def begin(environment, **_):
    gevent.signal_handler(signal.SIGINT, environment.runner.quit)  # Ctrl-C ends it with the results so far
    address = urlsplit(environment.host)
    # In production the port of the probes has the numbers, and a request there does not queue behind the load.
    probes = os.environ.get("WEB_PROBE_PORT") or (address.port or 80) + 1
    for url in (f"http://{address.hostname}:{probes}/pool.json", f"{environment.host}/pool.json"):
        with suppress(OSError, HTTPException, ValueError, KeyError):
            environment.plan, environment.before = ask(url)
            environment.numbers, environment.most = url, environment.before.copy()
            print(f"watch {url.removesuffix('.json')}", flush=True)
            gevent.spawn(watch, environment)
            return
    raise SystemExit(f"nothing to load on {environment.host}: start `make run` or `make prod` in another terminal")


@events.quitting.add_listener
def compare(environment, **_):
    """Print the comparison. More connections than planned fail the command, as failed requests do."""
    sample(environment)  # once at least, however busy the machine was
    plan, most = environment.plan, environment.most
    planned, held, waits = plan["connections_per_instance"], most[OPEN], most[WAITS] - environment.before[WAITS]
    text = f"""
slots        {most[BUSY]:.0f} of {plan["slots"]} busy at most
connections  {held:.0f} of {planned} open at most; {waits:.0f} waits for one
plan         {plan["sum"]}"""
    if held > planned:
        text += f"\nproblem      {held:.0f} connections, more than the {planned} of the plan"
        environment.process_exit_code = 1
    environment.events.quit.add_listener(lambda **_: print(text))  # after Locust's own tables
