"""Clients that are slow, and requests that are: neither may hold up the others while there is room."""

import contextlib
import http.client
import signal
import ssl
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from chaos.harness import (
    GENEROUS,
    HERE,
    Copy,
    Held,
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

WHAT = {"head": "drip the head", "body": "drip the body", "open": "never close", "read": "hardly read"}
COUNT = {"head": 200, "body": 200, "open": 200, "read": 40}
ESTABLISHED = "01"  # in /proc/net/tcp
SERVED_WITHIN = 30  # unless it waits for the held ones, which end when they are told


def beside_slow(project: Project, postgres: Postgres, rounds: int) -> Result:
    """Let requests hold all slots but two, and others go through those two. They come from far away: the bytes arrive a
    while after the connection."""
    result = Result(
        "Fairness: slow and fast requests", f"{rounds} rounds, all slots but two held, 10 others one at a time",
        "none waits behind a busy worker while another is idle: each is served before the held ones end",
    )  # fmt: skip
    held_up, fast = 0, []
    for _ in range(rounds):
        with Held() as held, Copy(project, postgres.url(), **held.env) as copy:
            slots = copy.plan["workers"] * copy.plan["pool"]
            held.send(copy, slots - 2, far=0.02)
            with contextlib.suppress(TimeoutError):
                wait_for(lambda held=held, slots=slots: held.came() == slots - 2, SERVED_WITHIN, "held requests")
            held_up += slots - 2 - held.came()
            if not held_up:
                fast += [fetch(copy.port, "/chaos/slow?s=0", far=0.02, timeout=SERVED_WITHIN).kind for _ in range(10)]
            held.let_go()
        if held_up or set(fast) != {"200"}:
            break
    result.counted = {"held up among the slow": held_up, "fast": dict(Counter(fast))}
    result.expect(not held_up, f"{held_up} of the slow waited")
    result.expect(set(fast) <= {"200"}, f"fast {dict(Counter(fast))}")
    return result


def test_fairness(baked: Project, postgres: Postgres, long: bool) -> None:
    assert not record(beside_slow(baked, postgres, 10 if long else 2)).missed


@pytest.mark.long
def test_sabotage_fairness(sabotaged: Callable[[str], Project], postgres: Postgres) -> None:
    name = "worker_connections = threads"
    assert record(beside_slow(sabotaged(name), postgres, 4), sabotaged=name).missed


@contextlib.contextmanager
def slow_clients(port: int, kind: str, count: int = 200) -> Iterator[None]:
    """Run them in a process of their own, so that they do not slow down the client that is measured."""
    process = subprocess.Popen([sys.executable, HERE / "service" / "slow_clients.py", str(port), kind, str(count)])
    try:
        yield
    finally:
        end(process, signal.SIGTERM)


def connected(port: int) -> int:
    """Count the clients of this port, by the kernel."""
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    return sum(line.split()[1].endswith(f":{port:04X}") and line.split()[3] == ESTABLISHED for line in lines)


def served_beside(
    project: Project, postgres: Postgres, kind: str, requests: int, patience: float, *, behind: bool = True
) -> Result:
    """Check that all slow clients are there before the others come, and still are when the last of those was served."""
    count = COUNT[kind]
    result = Result(
        f"Slow clients: {count} connections {WHAT[kind]}",
        f"a byte a second; beside them {requests} others, 24 clients",
        "each is served while the slow ones are there",
    )  # fmt: skip
    with Copy(project, postgres.url(), WEB_TRUSTED_PROXIES=1) as copy, proxy(project, copy.port) as nginx:
        port = nginx.port if behind else copy.port
        with slow_clients(port, kind, count):
            wait_for(lambda: connected(port) >= count / 2, GENEROUS, "slow clients")
            path = "/chaos/query?s=0.01"
            load = Load(port, read(path), clients=24, requests=requests, timeout=patience).run()
            still = connected(port)
    result.counted = {"answers": dict(load.kinds()), "slow ones in the end": still}
    result.expect(set(load.kinds()) == {"200"}, f"answers {dict(load.kinds())}")
    result.expect(still >= count / 2, f"only {still} slow clients are left")
    return result


def slowed(
    project: Project, postgres: Postgres, kind: str, seconds: float, rounds: int, share: float, *, behind: bool = True
) -> Result:
    """Measure with and without them in turns. The best turn of each counts, since other programs disturb all of them.

    :param behind: the shipped proxy, which is there for them.
    """
    count = COUNT[kind]
    result = Result(
        f"Slow clients: {count} connections {WHAT[kind]}",
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


@pytest.mark.parametrize("kind", WHAT)
def test_slow_clients(kind: str, baked: Project, postgres: Postgres) -> None:
    """`make chaos` measures how fast the others are meanwhile."""
    assert not record(served_beside(baked, postgres, kind, 200, GENEROUS)).missed


@pytest.mark.long
def test_sabotage_slow_clients(baked: Project, postgres: Postgres) -> None:
    """Without the proxy they take every slot."""
    result = served_beside(baked, postgres, "head", 24, 5, behind=False)
    assert record(result, sabotaged="the proxy").missed


@pytest.mark.parametrize("kind", WHAT)
@pytest.mark.long
def test_speed_beside_slow_clients(kind: str, baked: Project, postgres: Postgres) -> None:
    assert not record(slowed(baked, postgres, kind, 6, 4, 0.8)).missed


@pytest.mark.parametrize("kind", WHAT)
@pytest.mark.long
def test_sabotage_speed_beside_slow_clients(kind: str, baked: Project, postgres: Postgres) -> None:
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
        wait_for(lambda: listens(copy.port), GENEROUS, "gunicorn")
        for method, body, status in [("GET", None, 200), ("POST", b'{"title": "sealed"}', 201)] * 5:
            with contextlib.closing(
                http.client.HTTPSConnection("127.0.0.1", copy.port, timeout=GENEROUS, context=context)
            ) as connection:
                connection.request(method, "/api/notes", body, {"Content-Type": "application/json"})
                assert connection.getresponse().status == status
    finally:
        copy.__exit__()
