"""Forks: no request may ever get another request's row."""

from collections.abc import Callable

import pytest

from chaos.harness import DEBIAN_POSTGRES, Clusters, Copy, Load, Project, Result, missing, record


def reads(copy: Copy, requests: int, name: str, timeout: float = 30) -> Result:
    result = Result(
        f"Fork: engine used before the fork, {name}", f"{requests} reads, 24 clients", "no foreign row, no error"
    )
    load = Load(
        copy.port, lambda number: ("GET", f"/chaos/echo/{number}", b""), clients=24, requests=requests, timeout=timeout
    ).run()  # fmt: skip
    good = [a for a in load.answers if a.status == 200]
    foreign = sum(a.json["number"] != int(a.path.rsplit("/", 1)[1]) for a in good)
    workers = {a.json["worker"] for a in good}
    result.counted = {
        "right": len(good) - foreign,
        "foreign": foreign,
        "answers": dict(load.kinds()),
        "workers": len(workers),
    }
    result.expect(foreign == 0, f"{foreign} foreign rows")
    result.expect(len(good) == len(load.answers) == requests, f"errors: {dict(load.kinds())}")
    result.expect(len(workers) >= copy.plan["workers"], f"only {len(workers)} workers served")
    return result


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
def test_fork(tls: bool, baked: Project, server: Clusters, long: bool) -> None:
    absent = missing(DEBIAN_POSTGRES / "postgres", "openssl") if tls else ""
    assert not absent, absent
    with server(debian=tls, tls=tls) as postgres:
        url = postgres.url(sslmode="require" if tls else "disable")
        with Copy(baked, url, CHAOS_USE_IN_MASTER=4) as copy:
            name = f"preload, {'TLS' if tls else 'plain'}"
            result = record(reads(copy, 100_000 if long else 1500, name))
    assert not result.missed


@pytest.mark.long
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
def test_sabotage(tls: bool, sabotaged: Callable[[str], Project], server: Clusters) -> None:
    absent = missing(DEBIAN_POSTGRES / "postgres", "openssl") if tls else ""
    assert not absent, absent
    name = "emptying the pools at a fork"
    with server(debian=tls, tls=tls) as postgres:
        url = postgres.url(sslmode="require" if tls else "disable")
        with Copy(sabotaged(name), url, CHAOS_USE_IN_MASTER=4) as copy:
            result = record(reads(copy, 500, "preload, TLS" if tls else "preload, plain", timeout=3), sabotaged=name)
    assert result.missed
