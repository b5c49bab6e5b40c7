"""Clients that are slow, and requests that are: neither may hold up the others while there is room."""

import contextlib
import http.client
import signal
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from chaos.harness import (
    HERE,
    Copy,
    Load,
    Postgres,
    Project,
    Result,
    end,
    fetch,
    listens,
    missing,
    proxy,
    read,
    record,
    wait_for,
)


def mixed(project: Project, postgres: Postgres, rounds: int) -> Result:
    """Slow requests on all slots but two, and fast ones through what is left. They come from far away: what a client
    sends arrives a while after its connection."""
    result = Result(
        "Fairness: slow (1 s) and fast requests", f"{rounds} rounds, all slots but two slow, fast ones one at a time",
        "none waits behind a busy worker while another is idle: slow < 1.8 s, fast < 0.8 s",
    )  # fmt: skip
    slow: list[float] = []
    fast: list[float] = []
    with Copy(project, postgres.url()) as copy, ThreadPoolExecutor(32) as pool:
        slots = copy.plan["workers"] * copy.plan["pool"]
        for _ in range(rounds):
            waiting = [pool.submit(fetch, copy.port, "/chaos/slow?s=1", far=0.02) for _ in range(slots - 2)]
            time.sleep(0.1)
            for _ in range(10):
                fast.append(fetch(copy.port, "/chaos/slow?s=0.01", far=0.02).seconds)
            slow += [answer.result().seconds for answer in waiting]
    result.counted = {"slow": len(slow), "slowest slow s": round(max(slow), 2),
                      "slow that waited": sum(s > 1.8 for s in slow),
                      "fast": len(fast), "slowest fast s": round(max(fast), 2)}  # fmt: skip
    result.expect(max(slow) <= 1.8, f"slow {max(slow):.2f} s")
    result.expect(max(fast) <= 0.8, f"fast {max(fast):.2f} s")
    return result


def test_fairness(baked: Project, postgres: Postgres, long: bool) -> None:
    assert not record(mixed(baked, postgres, 10 if long else 3)).missed


def test_sabotage_fairness(sabotaged: Callable[[str], Project], postgres: Postgres) -> None:
    name = "worker_connections = threads"
    assert record(mixed(sabotaged(name), postgres, 4), sabotaged=name).missed


@contextlib.contextmanager
def slow_clients(port: int, kind: str, count: int = 200) -> Iterator[None]:
    """In a process of their own, so that they do not slow down the client that is measured."""
    process = subprocess.Popen([sys.executable, HERE / "service" / "slow_clients.py", str(port), kind, str(count)])
    try:
        yield
    finally:
        end(process, signal.SIGTERM)


def slowed(
    project: Project, postgres: Postgres, kind: str, seconds: float, rounds: int, share: float, *, behind: bool = True
) -> Result:
    """With and without take turns, and the best turn of each counts, since other programs disturb all of them.

    :param behind: the shipped proxy, which is there for them.
    """
    what = {"head": "drip the head", "body": "drip the body", "open": "never close", "read": "hardly read"}[kind]
    count = 40 if kind == "read" else 200
    result = Result(
        f"Slow clients: {count} connections {what}",
        f"a byte a second; normal: 24 clients, 10 ms, {rounds} x {seconds:g} s",
        f"normal traffic keeps >= {share:.0%} of its throughput",
    )  # fmt: skip
    with Copy(project, postgres.url(), WEB_TRUSTED_PROXIES=1) as copy, proxy(project, copy.port) as nginx:
        port = nginx.port if behind else copy.port
        with Load(port, read("/chaos/query?s=0.01"), clients=24) as load:
            time.sleep(0.5)
            rates: dict[bool, float] = {}
            for slow in (False, True) * rounds:
                with slow_clients(port, kind, count) if slow else contextlib.nullcontext():
                    time.sleep(3 if slow and kind == "read" else 1)  # until they have what they can get
                    start, began = len(load.answers), time.monotonic()
                    time.sleep(seconds)
                    rate = (len(load.answers) - start) / (time.monotonic() - began)
                    rates[slow] = max(rates.get(slow, 0), rate)
        failed = {kind: count for kind, count in load.kinds().items() if kind != "200"}
    result.counted = {"good/s without": round(rates[False]), "with": round(rates[True]),
                      "share": f"{rates[True] / rates[False]:.0%}", "failed": failed}  # fmt: skip
    result.expect(rates[True] >= share * rates[False], f"{rates[True]:.0f} of {rates[False]:.0f}")
    result.expect(not failed, f"failed {failed}")
    return result


KINDS = ("head", "body", "open", "read")


@pytest.mark.parametrize("kind", KINDS)
def test_slow_clients(kind: str, baked: Project, postgres: Postgres, long: bool) -> None:
    assert not record(slowed(baked, postgres, kind, *((6, 4, 0.8) if long else (1, 2, 0.8)))).missed


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.long
def test_sabotage_slow_clients(kind: str, baked: Project, postgres: Postgres) -> None:
    assert record(slowed(baked, postgres, kind, 1.5, 1, 0.8, behind=False), sabotaged="the proxy").missed


def test_tls(baked: Project, postgres: Postgres, tmp_path: Path) -> None:
    """Nobody's plan, since a proxy ends TLS; but gunicorn's own options for it must still work."""
    assert not missing("openssl"), missing("openssl")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj", "/CN=localhost",
         "-keyout", key, "-out", certificate], check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.create_default_context(cafile=str(certificate))
    context.check_hostname = False
    copy = Copy(baked, postgres.url(), GUNICORN_CMD_ARGS=f"--keyfile '{key}' --certfile '{certificate}'")
    try:
        copy.start(wait=False)
        wait_for(lambda: listens(copy.port), 30, "gunicorn")
        for method, body, status in [("GET", None, 200), ("POST", b'{"title": "sealed"}', 201)] * 5:
            with contextlib.closing(
                http.client.HTTPSConnection("127.0.0.1", copy.port, timeout=10, context=context)
            ) as connection:
                connection.request(method, "/api/notes", body, {"Content-Type": "application/json"})
                assert connection.getresponse().status == status
    finally:
        copy.__exit__()
