"""New code while requests keep coming, through the proxy that the project ships: none of them may fail."""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from chaos.harness import (
    Answer,
    Copy,
    Load,
    Postgres,
    Project,
    Request,
    Result,
    Sampler,
    fetch,
    free_port,
    missing,
    proxy,
    record,
    wait_for,
)

ADDRESSES = ("127.0.0.2", "127.0.0.3")


@pytest.fixture(autouse=True)
def tools() -> None:
    assert not missing("nginx"), missing("nginx")


def mixed(number: int) -> Request:
    """Mix four reads with each write."""
    if number % 5 == 0:
        return "POST", "/api/notes", json.dumps({"title": f"write {number}"}).encode()
    return "GET", "/chaos/query?s=0.02", b""


def progress(load: Load, requests: float) -> None:
    """Wait for so many answers more."""
    enough = len(load.answers) + requests
    wait_for(lambda: len(load.answers) >= enough, 120, "progress")


def rolling(project: Project, postgres: Postgres, requests: int, *, drained: bool) -> Result:
    """Run two instances, one replaced after the other: stopped, and started again at the same address. `drained`: the
    name server leaves an instance out before it is stopped, as Kubernetes does with its preStop hook, and a write that
    takes longer is still in flight then. Compose stops it at once, and SIGTERM must not lose a request."""
    how = "out of the name server two seconds before TERM" if drained else "TERM at once"
    lost = "none failed, not even one in flight at TERM" if drained else "none failed"
    result = Result(
        f"Deploy behind the proxy: one instance after the other, {how}",
        f"{requests} requests, 1 write to 4 reads, 24 clients, 20 ms query",
        f"{lost}; both instances new; peak <= plan",
    )  # fmt: skip
    port = free_port()
    with contextlib.ExitStack() as stack:
        copies = [
            Copy(project, postgres.url(), APP_INSTANCES=2, WEB_TRUSTED_PROXIES=1, WEB_HOST=address, PORT=port)
            for address in ADDRESSES
        ]
        for copy in copies:
            stack.push(copy)
            copy.start(wait=False)
        for copy in copies:
            copy.ready()
        before = {pid for copy in copies for pid in copy.workers()}
        plan = copies[0].plan["peak"]
        nginx = stack.enter_context(proxy(project, port, *ADDRESSES))
        sampler = stack.enter_context(Sampler(postgres, project.slug))
        in_flight: list[Future[Answer]] = []
        pool = stack.enter_context(ThreadPoolExecutor())
        with Load(nginx.port, mixed, clients=24) as load:
            progress(load, requests / 4)
            for copy, address in zip(copies, ADDRESSES, strict=True):
                if drained:
                    long = pool.submit(fetch, port, "/chaos/query?s=2.5", "POST", host=address)
                    in_flight.append(long)
                    nginx.names.addresses.remove(address)
                    time.sleep(2)  # nginx asks each second
                copy.stop()
                copy.start()
                wait_for(lambda copy=copy: copy.get("/readyz").status == 200, 20, "ready instance")
                if drained:
                    nginx.names.addresses.append(address)
                progress(load, requests / 4)
            wait_for(lambda: len(load.answers) >= requests, 120, "progress")
        peak, old = sampler.peak(), before & {pid for copy in copies for pid in copy.workers()}
    bad = Counter("write" if a.path == "/api/notes" else "read" for a in load.answers if a.status not in (200, 201))
    finished = Counter(answer.result().kind for answer in in_flight)
    result.counted = {"answers": dict(load.kinds()), "failed": dict(bad), "in flight at TERM": dict(finished),
                      "peak": peak, "plan": plan, "old workers left": len(old)}  # fmt: skip
    result.expect(set(finished) <= {"200"}, f"in flight at TERM: {dict(finished)}")
    result.expect(len(load.answers) >= requests, f"only {len(load.answers)} answers")
    result.expect(not bad, f"failed: {dict(bad)} of {dict(load.kinds())}")
    result.expect(peak <= plan, f"peak {peak} > {plan}")
    result.expect(not old, f"{len(old)} old workers are left")
    return result


@pytest.mark.parametrize("drained", [True, False], ids=["drained", "TERM at once"])
def test_rolling(drained: bool, baked: Project, postgres: Postgres, long: bool) -> None:
    assert not record(rolling(baked, postgres, 10_000 if long else 1500, drained=drained)).missed


@pytest.mark.parametrize(
    ("name", "drained"),
    [
        ("the graceful stop", True),
        ("the next instance for who was refused", False),
        ("the queue that is emptied before the end", False),
    ],
)
@pytest.mark.long
def test_sabotage(name: str, drained: bool, sabotaged: Callable[[str], Project], postgres: Postgres) -> None:
    result = rolling(sabotaged(name), postgres, 1500, drained=drained)
    assert record(result, sabotaged=name).missed
