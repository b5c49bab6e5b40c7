"""Troubles of the database reach clients as a 503 at most, and for no longer than they last."""

import contextlib
import itertools
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest

from chaos.harness import (
    GENEROUS,
    ROLE,
    Clusters,
    Copy,
    Load,
    Postgres,
    Project,
    Request,
    Result,
    fetch,
    read,
    record,
    wait_for,
)


def mixed(number: int) -> Request:
    """Mix four reads with each write. The title says which write it was."""
    if number % 5 == 0:
        return "POST", "/api/notes", json.dumps({"title": f"write {number}", "body": "x"}).encode()
    return "GET", "/api/notes?limit=5", b""


def successes_since(load: Load, moment: float) -> int:
    return sum(answer.status in (200, 201) and answer.began > moment for answer in load.answers)


def exactly_once(postgres: Postgres, load: Load, result: Result) -> None:
    with psycopg.connect(postgres.url()) as connection:
        stored = Counter(row[0] for row in connection.execute("select title from notes"))
    acknowledged = [a.json["title"] for a in load.answers if a.status == 201]
    result.counted["writes acknowledged"] = len(acknowledged)
    wrong = [title for title in acknowledged if stored[title] != 1]
    twice = [title for title, count in stored.items() if count > 1]
    result.expect(not wrong and not twice, f"{len(wrong)} acknowledged writes not there once, {len(twice)} there twice")


def terminated(project: Project, postgres: Postgres, seconds: float) -> Result:
    result = Result(
        "Backends terminated every second", f"24 clients, 1 write to 4 reads, {seconds:g} s",
        "a request fails only in flight: with 503, at most one for each connection; a read with Retry-After; "
        "none on a connection that died idle; each acknowledged write there once",
    )  # fmt: skip
    with Copy(project, postgres.url()) as copy:
        killed = 0
        with Load(copy.port, mixed, clients=24) as load:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                time.sleep(1)
                killed += postgres.terminate()
        # Without a load nothing is in flight, so nothing may fail at all.
        idle: Counter[str] = Counter()
        for number in range(10):
            postgres.terminate()
            time.sleep(0.05)
            idle.update(copy.get("/api/notes", "POST", title=f"idle {number} {again}").kind for again in range(3))
        workers = copy.text().count("Booting worker")
    failed = {method: Counter(a.kind for a in load.answers if (a.path == "/api/notes") == (method == "write"))
              for method in ("read", "write")}  # fmt: skip
    result.counted = {
        "killed": killed,
        "reads": dict(failed["read"]),
        "writes": dict(failed["write"]),
        "idle": dict(idle),
    }
    unsaid = sum(a.status == 503 and a.path != "/api/notes" and "retry-after" not in a.headers for a in load.answers)
    result.expect(set(failed["read"]) <= {"200", "503"}, f"reads {dict(failed['read'])}")
    result.expect(unsaid == 0, f"{unsaid} failed reads without Retry-After")
    result.expect(set(failed["write"]) <= {"201", "503"}, f"writes {dict(failed['write'])}")
    in_flight = failed["read"]["503"] + failed["write"]["503"]
    result.expect(in_flight <= killed, f"{in_flight} failed requests, {killed} connections killed")
    result.expect(set(idle) == {"201"}, f"writes with nothing in flight: {dict(idle)}")
    result.expect(workers == 3, f"{workers} workers were started")
    exactly_once(postgres, load, result)
    return result


def test_terminated(baked: Project, postgres: Postgres, long: bool) -> None:
    assert not record(terminated(baked, postgres, 20 if long else 4)).missed


@pytest.mark.parametrize("name", ["the check at checkout", "503 for the database's errors"])
@pytest.mark.long
def test_sabotage_terminated(name: str, sabotaged: Callable[[str], Project], postgres: Postgres) -> None:
    assert record(terminated(sabotaged(name), postgres, 6), sabotaged=name).missed


def restarted(
    project: Project, postgres: Postgres, how: signal.Signals, name: str, down: float, within: float = GENEROUS
) -> Result:
    """Restart the server. :param within: the most seconds until it serves again."""
    result = Result(
        f"Postgres restarted: {name}", f"24 clients, 1 write to 4 reads, down for {down:g} s",
        f"503s only while it is down; first success <= {within:g} s after it accepts; no worker dies",
    )  # fmt: skip
    with Copy(project, postgres.url()) as copy:
        before = set(copy.workers())
        with Load(copy.port, mixed, clients=24) as load:
            time.sleep(1)
            stopped = time.monotonic()
            postgres.stop(how)
            time.sleep(down)
            postgres.start()
            accepts = time.monotonic()
            wait_for(lambda: successes_since(load, accepts), GENEROUS, "success")
            time.sleep(3)
        died = before - set(copy.workers())
    first = min((a.ended for a in load.answers if a.status in (200, 201) and a.ended > accepts), default=float("inf"))
    late = [a for a in load.answers if a.status not in (200, 201) and (a.ended < stopped or a.began > first)]
    result.counted = {"answers": dict(load.kinds()), "first success after s": round(first - accepts, 2),
                      "failures outside": len(late), "workers that died": len(died)}  # fmt: skip
    result.expect(set(load.kinds()) <= {"200", "201", "503"}, f"answers {dict(load.kinds())}")
    result.expect("503" in load.kinds(), "nothing failed, so it was not down")
    result.expect(first - accepts <= within, f"first success after {first - accepts:.1f} s")
    result.expect(not late, f"{len(late)} failures when it was up")
    result.expect(not died, f"{len(died)} workers died")
    exactly_once(postgres, load, result)
    return result


@pytest.mark.parametrize(("how", "name"), [(signal.SIGINT, "fast"), (signal.SIGQUIT, "immediate")])
def test_restarted(how: signal.Signals, name: str, baked: Project, postgres: Postgres, long: bool) -> None:
    assert not record(restarted(baked, postgres, how, name, *((10, 1) if long else (1, GENEROUS)))).missed


@pytest.mark.long
def test_sabotage_restarted(sabotaged: Callable[[str], Project], postgres: Postgres) -> None:
    name = "503 for the database's errors"
    result = restarted(sabotaged(name), postgres, signal.SIGINT, "fast", 1)
    assert record(result, sabotaged=name).missed


def read_only(project: Project, server: Clusters, seconds: float) -> Result:
    """Let the primary refuse writes, and the other server take them, while both accept connections."""
    result = Result(
        "Failover: the server becomes read-only", f"12 clients that write, {seconds:g} s, two hosts in the URL",
        "at most one failed write per pooled connection; then the other server",
    )  # fmt: skip

    def writable(postgres: Postgres, yes: bool) -> None:
        postgres.ask(f"alter system set default_transaction_read_only = {'off' if yes else 'on'}")
        postgres.ask("select pg_reload_conf()")

    with server() as one, server() as two:
        writable(two, False)
        url = f"postgresql://app@/service?host=127.0.0.1,127.0.0.1&port={one.port},{two.port}"
        with Copy(project, url) as copy:
            connections = copy.plan["peak"] // copy.plan["instances"]
            with Load(copy.port, lambda number: ("POST", "/api/notes", b'{"title": "w"}'), clients=12) as load:
                time.sleep(1)
                writable(two, True)
                writable(one, False)
                flipped = time.monotonic()
                time.sleep(seconds)
            last = [copy.get("/api/notes", "POST", title="last").kind for _ in range(20)]
            here, there = len(one.backends()), len(two.backends())
    failed = [a for a in load.answers if a.status != 201]
    result.counted = {"answers": dict(load.kinds()), "connections": connections, "failed": len(failed),
                      "last failure after s": round(max((a.ended - flipped for a in failed), default=0), 2),
                      "then": dict(Counter(last)), "on the old, the new": (here, there)}  # fmt: skip
    result.expect(len(failed) <= connections, f"{len(failed)} failed writes with {connections} connections")
    result.expect(all(a.status == 503 for a in failed), f"failed with {Counter(a.kind for a in failed)}")
    result.expect(set(last) == {"201"}, f"then: {Counter(last)}")
    return result


def test_read_only(baked: Project, server: Clusters, long: bool) -> None:
    assert not record(read_only(baked, server, 10 if long else 2)).missed


@pytest.mark.long
def test_sabotage_read_only(sabotaged: Callable[[str], Project], server: Clusters) -> None:
    name = "25006 as a disconnect"
    assert record(read_only(sabotaged(name), server, 1), sabotaged=name).missed


def failed_over(project: Project, server: Clusters, down: float, within: float = GENEROUS) -> Result:
    """Run a primary and its standby. The primary dies and the standby is promoted. The replication is synchronous, so
    what was acknowledged must be there."""
    result = Result(
        "Failover to a standby", f"3 copies, 24 clients, 1 write to 4 reads, no primary for {down:g} s",
        f"503s only while there is none; first write <= {within:g} s after the promotion; "
        "each acknowledged write there once; "
        "readiness red while there is none, green behind full pools; no worker dies",
    )  # fmt: skip
    with (
        server(settings={"synchronous_standby_names": "*"}) as one,
        server(standby_of=one) as two,
        contextlib.ExitStack() as stack,
    ):
        wait_for(lambda: one.ask("select 1 from pg_stat_replication where sync_state = 'sync'"), GENEROUS, "standby")
        hosts = [  # every way to name both, and in both orders
            f"host={one.host}:{one.port}&host={two.host}:{two.port}",
            f"host={two.host}:{two.port}&host={one.host}:{one.port}",
            f"host={two.host},{one.host}&port={two.port},{one.port}",
        ]
        copies = [
            Copy(project, f"postgresql://app@/service?{both}", APP_INSTANCES=len(hosts), WEB_CONCURRENCY=2)
            for both in hosts
        ]
        for copy in copies:
            stack.push(copy)
            copy.start(wait=False)
        for copy in copies:
            copy.ready()
        ready = [ready_when_full(copies, one, two)]
        before = {pid for copy in copies for pid in copy.workers()}
        with Load(next_port(copies), mixed, clients=24) as load:
            time.sleep(1)
            stopped = time.monotonic()
            one.stop(signal.SIGQUIT)
            time.sleep(down / 2)
            without = Counter(fetch(copy.probe_port, "/readyz").kind for copy in copies for _ in range(4))
            time.sleep(down / 2)
            two.ask("select pg_promote()")
            promoted = time.monotonic()
            wait_for(lambda: writes_since(load, promoted), GENEROUS, "write")
            time.sleep(2.5)  # more than the bar, or what fails later would not be seen
        exactly_once(two, load, result)
        last = Counter(copy.get("/api/notes", "POST", title="last").kind for copy in copies for _ in range(10))
        ready.append(ready_when_full(copies, two))
        died = before - {pid for copy in copies for pid in copy.workers()}
    writes = [a.ended for a in load.answers if a.status == 201]
    first = min((ended for ended in writes if ended > promoted), default=float("inf"))
    late = [
        a for a in load.answers if a.status not in (200, 201) and not stopped <= a.ended <= max(first, promoted + 2)
    ]
    result.counted |= {"answers": dict(load.kinds()), "first write after s": round(first - promoted, 2),
                       "failures outside": len(late), "then": dict(last), "ready without a primary": dict(without),
                       "ready behind full pools, before, after": tuple(map(dict, ready))}  # fmt: skip
    result.expect(set(load.kinds()) == {"200", "201", "503"}, f"answers {dict(load.kinds())}")
    result.expect(first - promoted <= within, f"first write after {first - promoted:.1f} s")
    result.expect(not late, f"{len(late)} failures when there was a primary")
    result.expect(set(last) == {"201"}, f"then: {dict(last)}")
    # Green is no mistake: for a second, a connection that came back is proof enough, and no longer is there no primary.
    result.expect(set(without) <= {"200", "503"}, f"without a primary, readiness says {dict(without)}")
    result.expect([set(answers) for answers in ready] == [{"200 in time"}] * 2, f"readiness behind full pools: {ready}")
    result.expect(not died, f"{len(died)} workers died")
    return result


def writes_since(load: Load, moment: float) -> int:
    return sum(answer.status == 201 and answer.began > moment for answer in load.answers)


def next_port(copies: list[Copy]) -> Callable[[], int]:
    return itertools.cycle(copy.port for copy in copies).__next__


def ready_when_full(copies: list[Copy], *servers: Postgres) -> Counter[str]:
    """Ask for readiness, which has a second, while queries hold every connection that the copies have."""
    slots = sum(copy.plan["workers"] * copy.plan["pool"] for copy in copies)
    busy = "select 1 from pg_stat_activity where usename = %s and query like %s and state = 'active'"

    def all_busy() -> bool:
        return sum(len(server.ask(busy, ROLE, "%pg_sleep%")) for server in servers) == slots

    with Load(next_port(copies), read("/chaos/query?s=1.5"), clients=slots, requests=slots):
        wait_for(all_busy, GENEROUS, f"{slots} queries")
        time.sleep(0.3)  # until a connection that has just come back is no proof any more
        answers = [fetch(copy.probe_port, "/readyz") for copy in copies for _ in range(4)]
    return Counter(f"{a.kind} {'in time' if a.seconds <= 1 else 'late'}" for a in answers)


def test_failed_over(baked: Project, server: Clusters, long: bool) -> None:
    assert not record(failed_over(baked, server, *((6, 2) if long else (1, GENEROUS)))).missed


@pytest.mark.parametrize("name", ["target_session_attrs", "the whereabouts of the server"])
@pytest.mark.long
def test_sabotage_failed_over(name: str, sabotaged: Callable[[str], Project], server: Clusters) -> None:
    assert record(failed_over(sabotaged(name), server, 1, 2), sabotaged=name).missed


def killed(project: Project, postgres: Postgres) -> Result:
    result = Result(
        "Workers and master killed with SIGKILL", "10 s queries in flight",
        "a new worker serves; no orphan backend after 5 s",
    )  # fmt: skip
    with Copy(project, postgres.url()) as copy:
        with Load(copy.port, read("/chaos/query?s=10"), clients=12, requests=12) as load:
            wait_for(lambda: len(postgres.backends()) >= 12, GENEROUS, "12 backends")
            backends = set(postgres.backends())
            for pid in copy.workers():
                os.kill(pid, signal.SIGKILL)
            died = time.monotonic()
            served = (
                wait_for(lambda: fetch(copy.port, "/api/notes").status == 200, GENEROUS, "answer") and time.monotonic()
            )
            time.sleep(max(0, died + 5 - time.monotonic()))
            orphans = backends & set(postgres.backends())
            load.wait()
        with Load(copy.port, read("/chaos/query?s=10"), clients=12, requests=12):
            wait_for(lambda: len(postgres.backends()) >= 12, GENEROUS, "12 backends")
            workers = copy.workers()
            copy.signal(signal.SIGKILL)
            for pid in workers:
                os.kill(pid, signal.SIGKILL)
            time.sleep(5)
            left = len(postgres.backends())
        copy.stop()
        copy.start()
        again = copy.get("/api/notes").kind
        Load(copy.port, read("/chaos/query?s=0.2"), clients=12, requests=24).run()
        workers = copy.workers()
        copy.signal(signal.SIGKILL)  # the master alone: its workers notice, and end by themselves
        time.sleep(5)
        deserted = len(postgres.backends())
        workers = [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    result.counted = {"served again after s": round(served - died, 2), "orphans of workers": len(orphans),
                      "orphans of all": left, "after a new start": again,
                      "orphans of the master": deserted, "workers without it": len(workers)}  # fmt: skip
    result.expect(not orphans, f"{len(orphans)} orphans of killed workers")
    result.expect(not left, f"{left} orphans when all were killed")
    result.expect(again == "200", f"after a new start {again}")
    result.expect(not deserted, f"{deserted} orphans of a killed master")
    result.expect(not workers, f"{len(workers)} workers left by a killed master")
    return result


def test_killed(baked: Project, postgres: Postgres) -> None:
    assert not record(killed(baked, postgres)).missed


@pytest.mark.long
def test_sabotage_killed(sabotaged: Callable[[str], Project], postgres: Postgres) -> None:
    name = "client_connection_check_interval"
    assert record(killed(sabotaged(name), postgres), sabotaged=name).missed


SHORT = {"DB_CONNECT_TIMEOUT": 2, "DB_POOL_TIMEOUT": 2, "DB_STATEMENT_TIMEOUT": 3}


def stuck(project: Project, postgres: Postgres, bar: float = float("inf")) -> list[Result]:
    """Send each of them twice as often as there are slots, then the whole pool must be there again."""
    results = []
    cases = {
        "a query beyond the statement timeout": ("GET", "/chaos/query?s=20", {"500"}),
        "a transaction left idle": ("POST", "/chaos/idle?s=5", {"500"}),
        "two connections in one request": ("GET", "/chaos/two?s=0.3", {"200", "503"}),
        "a nested app context": ("GET", "/chaos/nested?s=0.3", {"200", "503"}),
    }
    with Copy(project, postgres.url(), **SHORT) as copy:
        slots = copy.plan["workers"] * copy.plan["pool"]
        for name, (method, path, allowed) in cases.items():
            result = Result(
                f"Stuck: {name}", f"{slots} at once, statement timeout 3 s, pool timeout 2 s",
                f"ended in <= {bar:g} s with a clear error; the pool is whole afterwards",
            )  # fmt: skip
            load = Load(
                copy.port, lambda n, m=method, p=path: (m, p, b""), clients=slots, requests=slots, timeout=GENEROUS
            ).run()
            slowest = load.quantile(1)
            after = Load(copy.port, read("/chaos/query?s=0.3"), clients=slots, requests=slots).run()
            with contextlib.suppress(TimeoutError):
                wait_for(lambda: copy.metric("db_pool_checked_out") == 0, GENEROUS, "whole pool")
            held = copy.metric("db_pool_checked_out")
            result.counted = {"answers": dict(load.kinds()), "slowest s": round(slowest, 1), "checked out after": held,
                              "then": dict(after.kinds())}  # fmt: skip
            result.expect(set(load.kinds()) <= allowed, f"answers {dict(load.kinds())}")
            result.expect(slowest <= bar, f"slowest {slowest:.1f} s")
            result.expect(held == 0, f"{held} connections are still checked out")
            result.expect(set(after.kinds()) == {"200"}, f"afterwards {dict(after.kinds())}")
            results.append(result)
    return results


def test_stuck(baked: Project, postgres: Postgres, long: bool) -> None:
    results = [record(result) for result in stuck(baked, postgres, 8 if long else float("inf"))]
    assert not [result.missed for result in results if result.missed]


@pytest.mark.long
def test_sabotage_stuck(sabotaged: Callable[[str], Project], postgres: Postgres) -> None:
    name = "statement and idle timeouts"
    results = stuck(sabotaged(name), postgres, 8)[:2]
    for result in results:
        record(result, sabotaged=name)
    assert all(result.missed for result in results)
