"""The database's host vanishes without a word: no FIN, no RST, nothing acknowledged. Only a network shows it."""

import contextlib
import os
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from chaos.harness import (
    GENEROUS,
    Answer,
    Clusters,
    Copy,
    Load,
    Postgres,
    Project,
    Result,
    fetch,
    missing,
    read,
    record,
    wait_for,
)

NAMESPACE = f"chaos{os.getpid()}"
OURS, THEIRS = "10.213.7.1", "10.213.7.2"


@pytest.fixture(autouse=True)
def tools() -> None:
    assert not missing("ip", "setpriv"), missing("ip", "setpriv")
    assert os.geteuid() == 0, "a network namespace takes root"


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], capture_output=True, check=True)


class Network:
    """A host of its own for the database, that can vanish and come back."""

    def __enter__(self) -> "Network":
        ip("netns", "add", NAMESPACE)
        ip("link", "add", "chaos0", "type", "veth", "peer", "name", "chaos1", "netns", NAMESPACE)
        ip("addr", "add", f"{OURS}/30", "dev", "chaos0")
        ip("link", "set", "chaos0", "up")
        ip("-n", NAMESPACE, "addr", "add", f"{THEIRS}/30", "dev", "chaos1")
        ip("-n", NAMESPACE, "link", "set", "chaos1", "up")
        ip("-n", NAMESPACE, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(subprocess.CalledProcessError):
            ip("link", "del", "chaos0")
        ip("netns", "del", NAMESPACE)

    def vanish(self) -> None:
        """Lead the answers from there into a black hole."""
        ip("-n", NAMESPACE, "route", "add", "blackhole", f"{OURS}/32")

    def come_back(self) -> None:
        ip("-n", NAMESPACE, "route", "del", "blackhole", f"{OURS}/32")


@pytest.fixture
def far(server: Clusters) -> Iterator[tuple[Network, Postgres]]:
    with Network() as network, server(namespace=NAMESPACE, host=THEIRS) as postgres:
        yield network, postgres


# Seconds that a client waits, and the most for an answer, a probe and the recovery. On a busy machine all are longer.
BARS = {"client": 15, "answer": 10, "probe": 1, "recovery": 10}
PATIENT = {"client": GENEROUS} | dict.fromkeys(("answer", "probe", "recovery"), float("inf"))


def vanished(project: Project, network: Network, postgres: Postgres, held: str, limits: dict[str, float]) -> Result:
    result = Result(
        f"Database host vanishes: {held}", "12 requests at once",
        "each ends <= 10 s; probes from 0.5 s on answer <= 1 s: /livez 200, /readyz 503; recovers without help",
    )  # fmt: skip
    with Copy(project, postgres.url(), APP_INSTANCES=2) as copy:
        slots = copy.plan["workers"] * copy.plan["pool"]
        if held == "idle connections":
            Load(copy.port, read("/chaos/query?s=0.3"), clients=slots, requests=slots * 2).run()
        in_flight = held == "queries in flight"
        source = read("/chaos/query?s=14" if in_flight else "/api/notes")
        load = Load(copy.port, source, clients=slots, requests=slots, timeout=limits["client"])
        if not in_flight:
            network.vanish()
        with load:
            if in_flight:
                busy = "select 1 from pg_stat_activity where query like '%%pg_sleep%%' and state = 'active'"
                wait_for(lambda: len(postgres.ask(busy)) > slots, GENEROUS, f"{slots} queries")  # and the one that asks
                network.vanish()
            gone = time.monotonic()
            if limits is PATIENT:
                wait_for(lambda: fetch(copy.probe_port, "/readyz", timeout=GENEROUS).status == 503, GENEROUS, "503")
            time.sleep(0.5)
            live: list[Answer] = []
            ready: list[Answer] = []
            while time.monotonic() < gone + 7:
                live.append(fetch(copy.probe_port, "/livez", timeout=GENEROUS))
                ready.append(fetch(copy.probe_port, "/readyz", timeout=GENEROUS))
                time.sleep(0.2)
            load.wait()
        slowest = max(answer.ended - max(answer.began, gone) for answer in load.answers)
        red = next((answer.ended - gone for answer in ready if answer.status == 503), float("inf"))
        network.come_back()
        back = time.monotonic()
        wait_for(lambda: copy.get("/api/notes").status == 200, GENEROUS, "answer")
        recovered = time.monotonic() - back
    result.counted = {"answers": dict(load.kinds()), "slowest s": round(slowest, 1),
                      "livez": summary(live), "readyz": summary(ready), "readyz red after s": round(red, 1),
                      "recovered after s": round(recovered, 1)}  # fmt: skip
    result.expect(slowest <= limits["answer"], f"slowest {slowest:.1f} s")
    result.expect(set(load.kinds()) <= {"503"}, f"answers {dict(load.kinds())}")
    result.expect(all(a.status == 200 and a.seconds <= limits["probe"] for a in live), f"livez {summary(live)}")
    result.expect(all(a.seconds <= limits["probe"] and a.status == 503 for a in ready), f"readyz {summary(ready)}")
    result.expect(recovered <= limits["recovery"], f"recovered after {recovered:.1f} s")
    return result


def summary(answers: list[Answer]) -> str:
    return f"{dict(Counter(a.kind for a in answers))} <= {max(a.seconds for a in answers):.2f} s"


HELD = ("idle connections", "queries in flight", "no connection yet")


@pytest.mark.parametrize("held", HELD)
def test_vanished(held: str, baked: Project, far: tuple[Network, Postgres], long: bool) -> None:
    assert not record(vanished(baked, *far, held, BARS if long else PATIENT)).missed


@pytest.mark.long
def test_sabotage(sabotaged: Callable[[str], Project], far: tuple[Network, Postgres]) -> None:
    name = "TCP limits"
    assert record(vanished(sabotaged(name), *far, "queries in flight", BARS), sabotaged=name).missed
