"""More clients than the service can serve: it serves as many as ever, and says so to the rest."""

import contextlib
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator

import pytest

from chaos.harness import (
    CLEAN,
    GENEROUS,
    HERE,
    Answer,
    Clusters,
    Copy,
    Held,
    Load,
    Postgres,
    Project,
    Result,
    end,
    fetch,
    free_port,
    listens,
    read,
    record,
    wait_for,
)

QUERY = "/chaos/query?s=0.05"
SMALL = {"APP_INSTANCES": 1, "DB_MAX_CONNECTIONS": 20, "DB_RESERVED_CONNECTIONS": 0}
PROBES = ("/livez", "/readyz")
PROBE_SECONDS = 1  # Kubernetes' default timeoutSeconds


@pytest.fixture
def small(server: Clusters) -> Iterator[Postgres]:
    """A server with 20 connections, 17 of them for ordinary roles."""
    with server(20) as postgres:
        yield postgres


def overload(copy: Copy, seconds: float, rounds: int, share: float) -> Result:
    """Let the loads take turns: the best turn of each counts: a machine that does other things as well disturbs all."""
    result = Result(
        "Overload", f"256 clients, 50 ms query, max_connections=20, {rounds} x {seconds:g} s",
        f"200, or 503 + Retry-After; goodput >= {share:.0%} of the best at any load; normal again <= 2 s",
    )  # fmt: skip
    fetch(copy.port, QUERY)
    rates: dict[int, float] = {12: 0, 64: 0, 256: 0}
    answers: list[Answer] = []
    waits = []
    for _ in range(rounds):
        for clients in rates:
            load = Load(copy.port, read(QUERY), clients=clients, seconds=seconds).run()
            rates[clients] = max(rates[clients], load.good(until=seconds))
            answers += load.answers
        ended = load.began + load.took
        normal = wait_for(lambda: (a := fetch(copy.port, QUERY)).seconds < 0.3 and a.status == 200 and a, 20, "return")
        waits.append(normal.ended - ended)
    bad = Counter(a.kind for a in answers if not (a.status == 200 or (a.status == 503 and "retry-after" in a.headers)))
    result.counted = {
        "answers": dict(Counter(a.kind for a in answers)),
        "good/s by clients": {clients: round(rate) for clients, rate in rates.items()},
        "p99 s": round(load.quantile(0.99), 2),
        "normal after s": round(max(waits), 2),
    }
    result.expect(not bad, f"answers that are neither: {dict(bad)}")
    result.expect(rates[256] >= share * max(rates.values()), f"goodput {rates[256]:.0f} of {max(rates.values()):.0f}")
    result.expect(max(waits) <= 2, f"normal after {max(waits):.1f} s")
    return result


def probes(copy: Copy, clients: int, seconds: float, port: int) -> Result:
    """Ask for liveness five times a second as long as the load lasts."""
    result = Result(
        "Probes under overload", f"{clients} clients, 50 ms query, {seconds:g} s",
        f"/livez 200 within {PROBE_SECONDS} s every time",
    )  # fmt: skip
    answers: list[Answer] = []
    ready: list[Answer] = []
    with Load(copy.port, read(QUERY), clients=clients) as load:
        time.sleep(1)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            answers.append(fetch(port, "/livez", timeout=10))
            ready.append(fetch(port, "/readyz", timeout=10))
            time.sleep(0.2)
        load.timeout = 0.1
    late = [a for a in answers if a.status != 200 or a.seconds > PROBE_SECONDS]
    result.counted = {
        "probes": len(answers),
        "late or lost": len(late),
        "slowest s": round(max(a.seconds for a in answers), 2),
        "readyz": dict(Counter(a.kind for a in ready)),
        "slowest readyz s": round(max(a.seconds for a in ready), 2),
    }
    result.expect(not late, f"{len(late)} of {len(answers)} probes late or lost")
    return result


def beside(copy: Copy, held: Held, port: int, patience: float) -> Result:
    """Let requests hold every slot and 64 more wait, for as long as the probes ask."""
    result = Result(
        "Probes while all slots are held", "64 more requests wait, 10 probes of each kind",
        "/livez and /readyz answer 200 while nothing else is served",
    )  # fmt: skip
    slots = copy.plan["workers"] * copy.plan["pool"]
    held.send(copy, slots)
    wait_for(lambda: held.came() == slots, GENEROUS, "held requests")
    with Load(copy.port, read("/chaos/query?s=0"), clients=64, requests=64, timeout=GENEROUS) as load:
        kinds = {path: Counter(fetch(port, path, timeout=patience).kind for _ in range(10)) for path in PROBES}
        served = len(load.answers)
        ended = held.let_go()
        load.wait()
    result.counted = {**{path: dict(kind) for path, kind in kinds.items()}, "served meanwhile": served,
                      "then": dict(load.kinds() + Counter(answer.kind for answer in ended))}  # fmt: skip
    result.expect(all(set(kind) == {"200"} for kind in kinds.values()), f"the probes said {kinds}")
    result.expect(not served, f"{served} were served, so not all slots were held")
    result.expect(set(load.kinds()) == {"200"}, f"afterwards {dict(load.kinds())}")
    return result


def too_many(copy: Copy, requests: int) -> Result:
    """Send more than there are slots for, at once."""
    result = Result(
        "Overload", f"{requests} requests, 256 clients, 50 ms query, max_connections=20",
        "200, or 503 + Retry-After; normal again afterwards",
    )  # fmt: skip
    load = Load(copy.port, read(QUERY), clients=256, requests=requests, timeout=GENEROUS).run()
    bad = Counter(
        a.kind for a in load.answers if not (a.status == 200 or (a.status == 503 and "retry-after" in a.headers))
    )
    after = Counter(fetch(copy.port, QUERY, timeout=GENEROUS).kind for _ in range(20))
    result.counted = {"answers": dict(load.kinds()), "then": dict(after)}
    result.expect(not bad, f"answers that are neither: {dict(bad)}")
    result.expect(load.kinds()["200"] > 0, "nothing was served")
    result.expect(set(after) == {"200"}, f"afterwards {dict(after)}")
    return result


def test_overload(baked: Project, small: Postgres) -> None:
    """`make chaos` measures how many are served in a second."""
    with Copy(baked, small.url(), **SMALL) as copy:
        assert not record(too_many(copy, 1500)).missed


def test_probes_do_not_wait(baked: Project, small: Postgres) -> None:
    with Held() as held, Copy(baked, small.url(), **SMALL, **held.env) as copy:
        assert not record(beside(copy, held, copy.probe_port, GENEROUS)).missed


@pytest.mark.long
def test_sabotage_probes(baked: Project, small: Postgres) -> None:
    """The same probe on the main listener, where it queues."""
    with Held() as held, Copy(baked, small.url(), **SMALL, **held.env) as copy:
        assert record(beside(copy, held, copy.port, 0.5), sabotaged="a listener for probes").missed


@pytest.mark.long
def test_speed_under_overload(baked: Project, small: Postgres) -> None:
    with Copy(baked, small.url(), **SMALL) as copy:
        result = record(overload(copy, 5, 4, 0.95))
        again = [record(probes(copy, clients, 20, copy.probe_port)) for clients in (256, 1000)]
    assert not result.missed
    assert not [probed.missed for probed in again if probed.missed]


@pytest.mark.long
def test_sabotage_speed_of_probes(baked: Project, small: Postgres) -> None:
    """The same probe on the main listener, where it queues."""
    with Copy(baked, small.url(), **SMALL) as copy:
        results = [probes(copy, clients, 2, copy.port) for clients in (256, 1000)]
    for result in results:
        record(result, sabotaged="a listener for probes")
    assert all(result.missed for result in results)


@pytest.mark.long
def test_sabotage_overload(sabotaged: Callable[[str], Project], small: Postgres) -> None:
    """More slots than connections, and errors as they come."""
    with Copy(sabotaged("a pool held to the budget, and 503s"), small.url(), **SMALL) as copy:
        result = record(overload(copy, 1, 1, 0.75), sabotaged="a pool held to the budget, and 503s")
    assert result.missed


@contextlib.contextmanager
def guide(project: Project, postgres: Postgres) -> Iterator[int]:
    """Run the app with the command of the guide that people find."""
    port = free_port()
    process = subprocess.Popen(
        [project.venv / "bin" / "gunicorn", "--no-control-socket", "-w", "5", "--threads", "8", "-b",
         f"127.0.0.1:{port}", "-c", "/dev/null", "guide:app"],
        cwd=HERE / "service", env={**CLEAN, "DATABASE_URL": postgres.url().replace("postgresql", "postgresql+psycopg")},
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        wait_for(lambda: listens(port), 20, "gunicorn")
        wait_for(lambda: fetch(port, "/").status == 200, 20, "answer")
        yield port
    finally:
        end(process, signal.SIGTERM, seconds=5)
        process.wait()


def test_guide(baked: Project, small: Postgres, long: bool) -> None:
    """The settings of the guide, for comparison: Flask-SQLAlchemy ignores them, and the pools are 5 + 10."""
    seconds = 20 if long else 3
    result = Result(
        "Overload on the guide's settings", f"256 clients, 50 ms query, 5 x 8, {seconds} s", "reported only"
    )
    with guide(baked, small) as port:
        load = Load(port, read("/query"), clients=256, seconds=seconds).run()
    kinds = load.kinds()
    failed = 1 - kinds["200"] / sum(kinds.values())
    result.counted = {"answers": dict(kinds), "failed": f"{failed:.1%}", "good/s": round(load.good(until=seconds))}
    result.note = "reported"
    record(result)
