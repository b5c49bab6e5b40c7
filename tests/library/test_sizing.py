"""The arithmetic: its examples, its rules, and errors whose remedies work."""

import doctest
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from flask_pooling import sizing
from flask_pooling.settings import BindServers
from flask_pooling.sizing import MIN_SLOTS, BindServer, Job, Plan, PlanError, Remedy, plan

pytestmark = pytest.mark.sqlite  # no database in it: once is enough


def test_the_examples_in_the_docstrings_are_true() -> None:
    """Doctests."""
    results = doctest.testmod(sizing)
    assert results.attempted
    assert not results.failed


@pytest.mark.parametrize(
    ("cpus", "memory_mib", "max_connections", "instances", "more", "expected"),
    [
        (2, 4096, 100, 2, {}, (3, 4, 4, 24, 87)),
        (0.5, 512, 100, 4, {}, (2, 4, 4, 32, 87)),
        (1, 1024, 100, 6, {}, (2, 4, 4, 48, 87)),
        (2, 2048, 100, 8, {}, (3, 3, 3, 72, 87)),
        (4, 1024, 100, 4, {}, (5, 4, 4, 80, 87)),
        (2, 2048, 100, 6, {"worker_class": "sync"}, (5, 1, 1, 30, 87)),
        (8, 16384, 200, 20, {}, (9, 1, 1, 180, 187)),
        (64, 262144, 100, 4, {}, (7, 3, 3, 84, 87)),
        (2, 4096, 100, 2, {"jobs": {"worker": Job(2, 4), "beat": Job(1, 1)}}, (3, 4, 4, 24, 78)),
        (2, 2048, 100, 8, {"jobs": {"worker": Job(4, 8)}}, (3, 2, 2, 48, 55)),
        # Each database of SQLALCHEMY_BINDS has a pool beside the first one's.
        (2, 4096, 100, 2, {"binds": 1}, (3, 4, 4, 48, 87)),
        (2, 4096, 100, 4, {"binds": 2}, (3, 2, 2, 72, 87)),
        (2, 4096, 100, 2, {"binds": 1, "jobs": {"worker": Job(1, 4)}}, (3, 4, 4, 48, 79)),
        # A bind on another server counts against that one: the smallest plan over all servers.
        (2, 4096, 100, 2, {"bind_servers": {"other": BindServer(100)}}, (3, 4, 4, 24, 87)),
        (2, 4096, 100, 2, {"bind_servers": {"other": BindServer(25)}}, (3, 2, 2, 12, 87)),
        (2, 4096, 100, 2, {"bind_servers": {"other": BindServer(18, 3)}}, (3, 2, 2, 12, 87)),
        (2, 4096, 100, 2, {"bind_servers": {"a+b": BindServer(37)}}, (3, 2, 2, 12, 87)),
        (2, 4096, 100, 2, {"bind_servers": {"a": BindServer(37), "b": BindServer(37)}}, (3, 4, 4, 24, 87)),
        (2, 4096, 100, 2, {"bind_servers": {"a": BindServer(50)}, "jobs": {"x": Job(5, 5)}}, (3, 2, 2, 12, 62)),
        # What was asked for is taken as it is, and the rest is chosen around it.
        (2, 4096, 100, 2, {"workers": 5}, (5, 4, 4, 40, 87)),
        (2, 4096, 100, 2, {"workers": 20}, (20, 2, 2, 80, 87)),
        (2, 4096, 100, 2, {"threads": 8}, (3, 8, 8, 48, 87)),
        (2, 4096, 100, 2, {"pool_size": 20}, (2, 4, 20, 80, 87)),
        (2, 4096, 100, 2, {"pool_size": 2}, (3, 2, 2, 12, 87)),
        (2, 4096, 100, 2, {"max_overflow": 6}, (3, 4, 4, 60, 87)),
        (2, 4096, 100, 1, {"reserved": 85}, (3, 4, 4, 12, 12)),
        (2, 4096, 100, 500, {"pooler": "pgbouncer"}, (3, 4, 4, 6000, 87)),
    ],
)
def test_worked_examples(  # noqa: PLR0917  # the numbers of an example
    cpus: float, memory_mib: int, max_connections: int, instances: int, more: dict[str, Any], expected: tuple[int, ...]
) -> None:
    """Workers, threads, pool, peak and usable, as the design has them."""
    chosen = plan(cpus=cpus, memory_mib=memory_mib, max_connections=max_connections, instances=instances, **more)
    assert (
        chosen.workers,
        chosen.threads,
        chosen.pool_size,
        chosen.connections_peak,
        chosen.connections_usable,
    ) == expected


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"cpus": 1, "memory_mib": 128, "instances": 1}, "128 MiB"),
        ({"cpus": 1, "memory_mib": 1024, "instances": 120}, "240 > 87"),
        ({"instances": 44}, "88 > 87"),
        ({"max_connections": 13, "pooler": "pgbouncer"}, "no connection is left for pgbouncer: 13 - 3 for superusers"),
        ({"pooler": "pgbouncer", "poolers": 88}, "no connection is left for pgbouncer (88 of it, 1 database): 100 - 3"),
        ({"pooler": "pgbouncer", "poolers": 44, "binds": 1}, "(44 of it, 2 databases): 100 - 3 for superusers - 10"),
        ({"pooler": "pgbouncer", "poolers": 88}, "help: DB_MAX_CONNECTIONS=101 or DB_POOLERS=87"),
        ({"max_connections": 13}, "0 usable"),
        ({"max_connections": 5}, "-8 usable"),
        ({"workers": 50, "threads": 1}, "100 > 87"),
        ({"workers": 1, "threads": 1}, "WEB_CONCURRENCY=1, WEB_THREADS=1: an instance has to serve at least 2"),
        ({"worker_class": "sync", "workers": 1}, "WEB_CONCURRENCY=1: an instance has to serve at least 2 requests"),
        ({"worker_class": "sync", "threads": 4}, "WEB_THREADS=4"),
        ({"pool_size": 3, "threads": 4}, "DB_POOL_SIZE=3"),
        ({"pool_size": 50}, "100 > 87"),
        ({"max_overflow": 90}, "> 87"),
        # What was asked for itself is named, with the largest number that fits.
        ({"workers": 50, "threads": 1}, "50 connections for 50 slots each = 100 > 87 usable (100 - 3 for superusers"),
        ({"workers": 50, "threads": 1}, "or WEB_CONCURRENCY=43 or"),
        ({"workers": 1, "threads": 50}, "or WEB_THREADS=43 or"),
        ({"pool_size": 50}, "or DB_POOL_SIZE=43 or"),
        ({"max_overflow": 90}, "or DB_MAX_OVERFLOW=41 or"),
        ({"memory_mib": 300, "threads": 1}, "300 MiB"),
        ({"jobs": {"worker": Job(20, 5)}}, "the jobs alone hold 100 of 87 usable connections (worker 20 x 5)"),
        ({"jobs": {"worker": Job(4, 8)}, "instances": 30}, "60 > 55"),
        ({"binds": 50}, "> 87"),
        (
            {"bind_servers": {"a": BindServer(16)}},
            "the server of a: 2 instances x 2 connections for 2 slots each = 4 > 3",
        ),
        (
            {"bind_servers": {"a": BindServer(16), "b+c": BindServer(50, 5)}},
            "help: DB_BIND_SERVERS=a=17:10,b+c=50:5 or ",
        ),
        ({"bind_servers": {"a": BindServer(13), "b": BindServer(9)}}, "the server of a: "),
        ({"instances": 40, "bind_servers": {"a": BindServer(16)}}, " or APP_INSTANCES=1 or DB_POOLER=pgbouncer"),
        (
            {"bind_servers": {"a": BindServer(20)}, "jobs": {"x": Job(5, 5)}},
            "the server of a: the jobs alone hold 25 of 7",
        ),
        (
            {"bind_servers": {"a+b": BindServer(14)}, "pooler": "pgbouncer"},
            "the server of a+b: no connection is left for",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_the_sum(more: dict[str, Any], says: str) -> None:
    """One line that shows the numbers and ends with what would help."""
    with pytest.raises(PlanError) as caught:
        plan(**({"cpus": 2, "memory_mib": 4096, "max_connections": 100, "instances": 2} | more))
    assert says in str(caught.value)
    assert "what would help: " in str(caught.value)
    assert "\n" not in str(caught.value)


# How long an example takes is the machine's affair.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def numbers() -> st.SearchStrategy[dict[str, Any]]:
    """Draw inputs of every size, odd ones included."""
    return st.fixed_dictionaries(
        {
            "cpus": st.one_of(st.floats(0.05, 4), st.integers(1, 256)),
            "memory_mib": st.integers(64, 300_000),
            "max_connections": st.integers(1, 5000),
            "instances": st.integers(1, 400),
            "reserved": st.integers(0, 60),
            "worker_class": st.sampled_from(["gthread", "sync"]),
            "worker_memory_mib": st.integers(20, 2000),
        },
        optional={
            "workers": st.integers(1, 40),
            "threads": st.integers(1, 40),
            "pool_size": st.integers(1, 60),
            "max_overflow": st.integers(0, 20),
            "pooler": st.sampled_from(["none", "pgbouncer"]),
            "poolers": st.integers(1, 60),
            "binds": st.integers(0, 4),
            "bind_servers": st.dictionaries(
                st.sampled_from(["a", "b+c", "d+e+f"]), st.builds(BindServer, st.integers(1, 5000), st.integers(0, 60))
            ),
            "jobs": st.dictionaries(
                st.sampled_from(["worker", "beat", "mail"]), st.builds(Job, st.integers(1, 60), st.integers(1, 20))
            ),
        },
    )


def planned(inputs: dict[str, Any]) -> Plan | PlanError:
    try:
        return plan(**inputs)
    except PlanError as error:
        return error


# The names under which a remedy's setting enters the arithmetic.
INPUTS = {
    "DB_MAX_CONNECTIONS": "max_connections",
    "DB_BIND_SERVERS": "bind_servers",
    "APP_INSTANCES": "instances",
    "DB_POOLER": "pooler",
    "DB_POOLERS": "poolers",
    "DB_POOL_SIZE": "pool_size",
    "DB_MAX_OVERFLOW": "max_overflow",
    "WEB_CONCURRENCY": "workers",
    "WEB_THREADS": "threads",
    "WEB_WORKER_MEMORY_MIB": "worker_memory_mib",
    "memory_mib": "memory_mib",
}


@given(numbers())
def test_the_promises_hold_for_any_numbers(inputs: dict[str, Any]) -> None:
    """Never over the budget, never under two slots, never a thread without a connection; or an error with a way out."""
    result = planned(inputs)
    if isinstance(result, PlanError):
        assert result.remedies
        return
    assert result.slots >= MIN_SLOTS
    assert result.pool_size + result.max_overflow >= result.threads
    a_process = result.pool_size + result.max_overflow
    jobs = sum(job.copies * job.connections for job in result.jobs.values())
    given = {"": (result.max_connections, result.reserved, 1 + result.binds)}
    for name, other in result.bind_servers.items():
        given[name] = other.max_connections, other.reserved, len(name.split("+"))
    most_open = 0
    for name, (most, reserved, databases) in given.items():
        server = result.servers[name]
        assert server.connections_peak == result.instances * result.workers * a_process * databases
        most_open += server.connections_peak + databases * jobs
        if result.pooler == "none":
            assert server.connections_peak + databases * jobs <= most - 3 - reserved
        else:
            assert 1 <= server.connections_per_pooler * result.poolers * databases <= most - 3 - reserved
    if result.pooler != "none":
        clients, opened, in_a_pool = result.pooler_sizes.values()
        assert 1 <= in_a_pool <= opened == result.connections_per_pooler
        assert clients * max(1, result.poolers - 1) >= most_open


@pytest.mark.parametrize(
    ("more", "sizes", "note"),
    [
        ({}, (9600, 87, 20), "max_client_conn to at least 9600 and its max_db_connections and default_pool_size to at"),
        ({}, (9600, 87, 20), "it needs 9697 open files"),
        ({"poolers": 2}, (9600, 43, 20), "at most 43 of each of 2, of which one may fail"),
        ({"poolers": 6}, (1920, 14, 14), "it needs 1944 open files"),
        ({"poolers": 6, "binds": 1, "jobs": {"worker": Job(10, 10)}}, (3888, 7, 7), "it needs 3912 open files"),
        ({"poolers": 87}, (112, 1, 1), "it needs 123 open files"),
        (
            {"bind_servers": {"a+b": BindServer(40)}},
            (28800, 87, 20),
            "for a+b set max_db_connections and pool_size to at most 13, in pgbouncer's [databases]",
        ),
    ],
)
def test_many_poolers_share_what_one_may_have(more: dict[str, Any], sizes: tuple[int, ...], note: str) -> None:
    """All of them together never open more than what is usable, and when one has failed, the others take its
    clients."""
    chosen = plan(cpus=1, memory_mib=1024, max_connections=100, instances=1000, pooler="pgbouncer", **more)
    assert tuple(chosen.pooler_sizes.values()) == sizes
    assert note in chosen.notes[-1]


@given(numbers())
def test_every_remedy_leads_on_when_it_is_followed(inputs: dict[str, Any]) -> None:
    """It cures what it was offered for. Where several things are wrong at once, following them one by one ends well."""
    for _ in range(8):
        result = planned(inputs)
        if isinstance(result, Plan):
            return
        for remedy in result.remedies:
            after = planned(inputs | followed(remedy))
            assert isinstance(after, Plan) or after.problem != result.problem
        inputs = inputs | followed(result.remedies[0])
    raise AssertionError(f"eight remedies did not help: {inputs}")


def followed(remedy: Remedy) -> dict[str, Any]:
    """Return the input of the plan that the named setting gives, as it is read from the environment."""
    value: Any = remedy.value
    if remedy.name == "DB_BIND_SERVERS":
        value = TypeAdapter(BindServers).validate_python(value)
    return {INPUTS[remedy.name]: value}


@given(numbers(), st.sampled_from(["cpus", "memory_mib", "max_connections"]), st.integers(1, 500))
def test_more_room_never_gives_fewer_slots(inputs: dict[str, Any], which: str, more: int) -> None:
    """More cpus, more memory or more connections: as many slots as before at the least."""
    before, after = planned(inputs), planned(inputs | {which: inputs[which] + more})
    if isinstance(before, Plan):
        assert isinstance(after, Plan)
        assert after.slots >= before.slots
