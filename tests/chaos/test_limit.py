"""Requests that hang in something that is not the database: an outbound call without a timeout."""

import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable

import pytest

from chaos.harness import GENEROUS, Copy, Postgres, Project, Result, fetch, record, wait_for

WEB_TIMEOUT = 4
SECONDS = 120
SABOTAGED_SECONDS = 20  # stock gthread ends neither of them
WAITING = 3
# One worker with two threads, and a ladder of times below WEB_TIMEOUT.
LEAST = {
    "WEB_CONCURRENCY": 1,
    "WEB_THREADS": 2,
    "WEB_TIMEOUT": WEB_TIMEOUT,
    "WEB_GRACEFUL_TIMEOUT": WEB_TIMEOUT,
    "DB_CONNECT_TIMEOUT": 2,
    "DB_POOL_TIMEOUT": 2,
    "DB_STATEMENT_TIMEOUT": 3,
}


def hang(project: Project, postgres: Postgres, seconds: int, bar: float) -> Result:
    """Let two requests that hang take both threads of the only worker.

    :param bar: the most seconds until it serves again.
    """
    result = Result(
        "Every thread hangs", f"2 requests of {seconds} s on 1 x 2, WEB_TIMEOUT={WEB_TIMEOUT}",
        f"served again within {bar:g} s; logs, metrics and probes say why",
    )  # fmt: skip
    with Copy(project, postgres.url(), **LEAST) as copy:
        began, probes, told = time.monotonic(), set(), set()
        for _ in range(2):
            threading.Thread(target=copy.get, args=(f"/chaos/slow?s={seconds}",), daemon=True).start()
        time.sleep(0.5)

        def served() -> bool:
            probes.update((path, fetch(copy.probe_port, path).status) for path in ("/livez", "/readyz"))
            if copy.metric("web_slots_over_limit") == 2:
                told.add("web_slots_over_limit")
            return fetch(copy.port, "/livez", timeout=0.3).status == 200

        try:
            wait_for(served, seconds - 5, "answer")
        except TimeoutError:
            result.expect(False, f"no answer in {seconds - 5} s")
        took = time.monotonic() - began
        stacks = len(re.findall("/chaos/slow' has made no progress", copy.text()))
        replaced = copy.metric("web_workers_replaced_total")
        result.counted = {"served after s": round(took, 1), "stacks": stacks, "replaced": int(replaced)}
    result.expect(took <= bar, f"served after {took:.1f} s")
    result.expect({("/livez", 503), ("/readyz", 503)} <= probes, f"the probes said {sorted(probes, key=str)}")
    result.expect(stacks == 2 and replaced == 1 and bool(told), f"{stacks} stacks, {replaced:g} replaced, {told}")
    return result


def get_on(project: Project, postgres: Postgres) -> Result:
    """Run one request that hangs, beside a stream that sends and a view that has no limit."""
    result = Result(
        "Only one hangs", f"1 hangs, 1 streams, 1 is unlimited, WEB_TIMEOUT={WEB_TIMEOUT}",
        "no worker is replaced; only the one that hangs is logged",
    )  # fmt: skip
    with Copy(project, postgres.url(), **LEAST | {"WEB_THREADS": 4}) as copy:
        for path in (f"slow?s={SECONDS}", f"unlimited?s={SECONDS}", f"stream?s=1&times={SECONDS}"):
            threading.Thread(target=copy.get, args=(f"/chaos/{path}",), daemon=True).start()
        wait_for(lambda: "/chaos/slow' has made no progress" in copy.text(), GENEROUS, "line about the one that hangs")
        time.sleep(1.5 * WEB_TIMEOUT)  # more than the others would need to be noticed
        busy, over = copy.metric("web_slots_busy"), copy.metric("web_slots_over_limit")
        served = fetch(copy.port, "/livez").status, fetch(copy.probe_port, "/livez").status
        logged = re.findall("GET '(/chaos/[a-z]+)' has made no progress", copy.text())
        replaced = copy.metric("web_workers_replaced_total")
        # The fourth thread's place is taken by a client that sends nothing; three more wait in the kernel.
        with contextlib.ExitStack() as waiting:
            for _ in range(1 + WAITING):
                waiting.enter_context(socket.create_connection(("127.0.0.1", copy.port), timeout=5))
            with contextlib.suppress(TimeoutError):
                wait_for(lambda: copy.metric("web_backlog") == WAITING, GENEROUS, "clients in the backlog")
            backlog = copy.metric("web_backlog")
        result.counted = {"busy": int(busy), "past the limit": int(over), "replaced": int(replaced),
                          "backlog": int(backlog)}  # fmt: skip
    result.expect(backlog == WAITING, f"{backlog:g} wait, by the metric")
    result.expect((busy, over, replaced) == (3, 1, 0), f"{busy:g} busy, {over:g} past the limit, {replaced:g} replaced")
    result.expect(served == (200, 200), f"/livez on both ports said {served}")
    result.expect(logged == ["/chaos/slow"], f"logged: {logged}")
    return result


def test_whoever_gets_on_is_left_alone(baked: Project, postgres: Postgres) -> None:
    assert not record(get_on(baked, postgres)).missed


def test_every_thread_hangs(baked: Project, postgres: Postgres, long: bool) -> None:
    assert not record(hang(baked, postgres, SECONDS, 2 * WEB_TIMEOUT if long else SECONDS)).missed


@pytest.mark.long
def test_sabotage_heartbeat(sabotaged: Callable[[str], Project], postgres: Postgres) -> None:
    """As stock gthread: the heartbeat goes on, and nobody is replaced."""
    name = "the heartbeat that stops"
    assert record(hang(sabotaged(name), postgres, SABOTAGED_SECONDS, SABOTAGED_SECONDS), sabotaged=name).missed
