"""The sizing arithmetic: numbers in, a frozen plan out.

gunicorn.conf.py and the app ask the same :func:`plan`, so the workers and their pools cannot disagree. Nothing here
reads the environment, the machine or the database.

The plan in one line:

>>> print(plan(cpus=2, memory_mib=4096, max_connections=100, instances=2).sum)
2 instances x 3 workers x (4 + 0) = 24 of 87 connections (100 - 3 for superusers - 10 reserved)

Behind a pooler the peak is the number of its clients. The server has the pooler's connections:

>>> thousand = {"cpus": 1, "memory_mib": 1024, "max_connections": 100, "instances": 1000, "pooler": "pgbouncer"}
>>> print(plan(**thousand).sum)
1000 instances x 2 workers x (4 + 0) = 8000 clients of pgbouncer, which opens at most 87 of 87 connections \
(100 - 3 for superusers - 10 reserved)
>>> print(plan(**thousand, poolers=2, binds=1, jobs={"worker": Job(2, 4)}).sum)
1000 instances x 2 workers x (4 + 0) x 2 databases + 16 for jobs = 16016 clients of 2 x pgbouncer, which open at most \
2 x 21 x 2 databases = 84 of 87 connections (100 - 3 for superusers - 10 reserved)

A bind on another server counts against that one, and the plan is the largest that fits all of them:

>>> small = {"cpus": 2, "memory_mib": 4096, "max_connections": 100, "instances": 2}
>>> for server in plan(**small, bind_servers={"reports": BindServer(30)}).servers.values():
...     print(server.named(server.sum))
2 instances x 2 workers x (4 + 0) = 16 of 87 connections (100 - 3 for superusers - 10 reserved)
the server of reports: 2 instances x 2 workers x (4 + 0) = 16 of 17 connections (30 - 3 for superusers - 10 reserved)
"""

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Self

# Postgres keeps these for superusers (superuser_reserved_connections): an ordinary role never gets them.
SUPERUSER_RESERVED = 3
DEFAULT_RESERVED = 10
# Measured: 32 MiB (PSS) after 10,000 reads with the master's share, and up to 108 (RSS) with the largest pages in
# all threads. The rest is for an app that grows.
DEFAULT_WORKER_MEMORY_MIB = 150
# One worker more than there are cores keeps the cores busy while others wait for the database. Four threads are enough
# for requests that compute and ask the database in turn. More threads only help where requests mostly wait for the
# database, and each takes a connection: WEB_THREADS is for that.
GTHREAD_THREADS = 4
# With four threads and two instances these are 96 connections, more than a Postgres with default settings has. And each
# idle worker wakes up for each new client. On a larger machine, run more instances.
MAX_WORKERS = 12
# One slot means that a single slow request is an outage.
MIN_SLOTS = 2
# The memory of the master and the page cache, and the share of the memory that is planned.
MASTER_MEMORY_MIB = 64
MEMORY_SHARE = 0.8
PGBOUNCER_POOL_SIZE = 20
PGBOUNCER_FILES = 10  # besides its clients and servers, by its own count
# The numbers that an owner may set. If the plan does not fit, a smaller number may.
GIVEN = {"workers": "WEB_CONCURRENCY", "threads": "WEB_THREADS"}
GIVEN |= {"pool_size": "DB_POOL_SIZE", "max_overflow": "DB_MAX_OVERFLOW"}


def counted(number: int, noun: str) -> str:
    """Write a number and its noun.

    >>> counted(1, "worker"), counted(2, "worker")
    ('1 worker', '2 workers')
    """
    return f"{number} {noun}{'' if number == 1 else 's'}"


def left_over(max_connections: int, reserved: int, jobs: int = 0) -> str:
    """Return the sum behind the usable connections."""
    for_jobs = f" - {jobs} for jobs" if jobs else ""
    return f"{max_connections} - {SUPERUSER_RESERVED} for superusers - {reserved} reserved{for_jobs}"


@dataclass(frozen=True)
class Job:
    """Processes of one kind, other than web workers: `copies` of them, with `connections` each to each database."""

    copies: int
    connections: int

    def __str__(self) -> str:
        return f"{self.copies} x {self.connections}"


@dataclass(frozen=True)
class BindServer:
    """A server other than the first one, with some of its binds."""

    max_connections: int
    reserved: int = DEFAULT_RESERVED


class Remedy(NamedTuple):
    """One way out of a plan that does not fit: set `name` to `value` and leave the rest as it is."""

    name: str
    value: int | str

    def __str__(self) -> str:
        return f"{self.value} MiB of memory" if self.name == "memory_mib" else f"{self.name}={self.value}"


class PlanError(ValueError):
    """The numbers do not fit together. The message shows the sum; `remedies` are numbers that would make it fit."""

    def __init__(self, problem: str, remedies: list[Remedy]) -> None:
        self.problem, self.remedies = problem, tuple(remedies)
        ways = " or ".join(str(remedy) for remedy in remedies)
        super().__init__(f"{problem}; what would help: {ways}" if ways else problem)


class TooLittleMemoryError(PlanError):
    """Too little memory for web workers. For other processes it may be enough."""


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """The inputs of a plan. `workers`, `threads` and `pool_size` stay as they are if they are given."""

    cpus: float
    memory_mib: int
    max_connections: int  # of the server
    instances: int  # the most that run at the same time, old and new during a deploy
    reserved: int = DEFAULT_RESERVED
    worker_class: str = "gthread"
    worker_memory_mib: int = DEFAULT_WORKER_MEMORY_MIB
    workers: int | None = None
    threads: int | None = None
    pool_size: int | None = None
    max_overflow: int = 0
    pooler: str = "none"
    poolers: int = 1  # how many of it; a client may connect to any of them
    binds: int = 0  # more Postgres databases on this server; every worker keeps a pool for each
    jobs: Mapping[str, Job] = field(default_factory=dict)  # other processes that keep connections, by name
    bind_servers: Mapping[str, BindServer] = field(default_factory=dict)  # by their binds: "reports", "audit+archive"
    server: str = ""  # which of those these numbers are about; the first one has no name

    @property
    def servers(self) -> dict[str, Self]:
        """The numbers of each server, by its name. The name of the first one is empty."""
        others = self.bind_servers.items()
        return {"": self} | {n: replace(self, server=n, binds=n.count("+"), **vars(each)) for n, each in others}

    def named(self, text: str) -> str:
        """Put the name of the server before a text, unless it is the first one."""
        return f"the server of {self.server}: {text}" if self.server else text

    def giving(self, max_connections: int) -> Remedy:
        """Return the setting by which this server has so many connections."""
        servers = {**self.bind_servers, self.server: BindServer(max_connections, self.reserved)}
        listed = ",".join(f"{name}={each.max_connections}:{each.reserved}" for name, each in servers.items())
        return Remedy("DB_BIND_SERVERS", listed) if self.server else Remedy("DB_MAX_CONNECTIONS", max_connections)

    def connections_for(self, threads: int) -> int:
        """Return the connections of a worker with so many threads."""
        return (1 + self.binds) * ((threads if self.pool_size is None else self.pool_size) + self.max_overflow)

    def connections_of(self, job: Job) -> int:
        """Return the most connections that all copies of a job can hold: each has a pool for each database."""
        return (1 + self.binds) * job.copies * job.connections

    @property
    def connections_jobs(self) -> int:
        """The most connections that all jobs together can hold."""
        return sum(map(self.connections_of, self.jobs.values()))

    @property
    def connections_usable(self) -> int:
        """The connections that the server has for the web workers, or for the poolers, which serve the jobs as well."""
        jobs = self.connections_jobs if self.pooler == "none" else 0
        return self.max_connections - SUPERUSER_RESERVED - self.reserved - jobs

    @property
    def connections_per_pooler(self) -> int:
        """The most connections that each pooler may open to each database."""
        return max(0, self.connections_usable) // ((1 + self.binds) * self.poolers)

    @property
    def left_over(self) -> str:
        """The sum behind the usable connections."""
        return left_over(self.max_connections, self.reserved, self.connections_jobs if self.pooler == "none" else 0)

    @property
    def workers_by_cpus(self) -> int:
        """One worker more than there are cores for gthread, and gunicorn's 2n + 1 for sync, where a worker serves one
        request. There are at least two, so that one serves while the other restarts."""
        return max(2, math.floor(2 * self.cpus) + 1 if self.worker_class == "sync" else math.ceil(self.cpus) + 1)

    @property
    def workers_by_memory(self) -> int:
        """The workers that fit beside the master into four fifths of the memory."""
        return max(0, math.floor((self.memory_mib * MEMORY_SHARE - MASTER_MEMORY_MIB) / self.worker_memory_mib))

    def fits(self, workers: int, threads: int) -> bool:
        """Return whether this server has enough connections for instances of that size. Behind a pooler any fit."""
        connections = workers * self.connections_for(threads)
        return self.pooler != "none" or self.instances * connections <= self.connections_usable


@dataclass(frozen=True, kw_only=True)
class Plan(Numbers):
    """The workers, threads and connections of one instance, and the connections of all instances together."""

    workers: int
    threads: int
    pool_size: int
    notes: tuple[str, ...] = ()

    @property
    def slots(self) -> int:
        """Requests that one instance serves at the same time."""
        return self.workers * self.threads

    @property
    def connections_per_worker(self) -> int:
        """The connections of one worker, to all its databases."""
        return self.connections_for(self.threads)

    @property
    def connections_per_instance(self) -> int:
        return self.workers * self.connections_per_worker

    @property
    def connections_peak(self) -> int:
        """The most connections that the web workers of all instances together can hold."""
        return self.instances * self.connections_per_instance

    @property
    def role_limit(self) -> int:
        """The server's own limit for the service's role: the connections of the plan, and half of the reserved ones for
        migrations, checks, cron jobs and shells. The other half stays free for psql, monitoring and other roles."""
        ours = self.connections_peak + self.connections_jobs if self.pooler == "none" else self.connections_usable
        return ours + math.ceil(self.reserved / 2)

    @property
    def pooler_sizes(self) -> dict[str, int]:
        """The settings of each PgBouncer. Clients: the peak, and a fifth more (at least the reserved connections) for
        migrations, shells and deploys. If one of several poolers fails, the others have room for its clients. The last
        two are for each database on the first server. `default_pool_size` is PgBouncer's own default of 20, or less if
        less is usable."""
        planned = sum(each.connections_peak + each.connections_jobs for each in self.servers.values())
        clients = planned + max(math.ceil(planned / 5), self.reserved)
        most = max(1, replace(self, pooler="pgbouncer").connections_per_pooler)
        sizes = {"max_client_conn": math.ceil(clients / max(1, self.poolers - 1)), "max_db_connections": most}
        return sizes | {"default_pool_size": min(most, PGBOUNCER_POOL_SIZE)}

    @property
    def sum(self) -> str:
        """The plan in one line."""
        usable = f"{counted(self.connections_usable, 'connection')} ({self.left_over})"
        if self.pooler == "none":
            return f"{self.factors} = {self.connections_peak} of {usable}"
        for_jobs = f" + {self.connections_jobs} for jobs" if self.connections_jobs else ""
        clients = f"{self.factors}{for_jobs} = {self.connections_peak + self.connections_jobs} clients"
        several, opens = (f"{self.poolers} x ", "open") if self.poolers > 1 else ("", "opens")
        opened = f"{several}{self.connections_per_pooler}{self.databases}"
        if several or self.binds:
            opened += f" = {self.connections_per_pooler * self.poolers * (1 + self.binds)}"
        return f"{clients} of {several}{self.pooler}, which {opens} at most {opened} of {usable}"

    @property
    def factors(self) -> str:
        """The factors of the peak."""
        workers = f"{counted(self.instances, 'instance')} x {counted(self.workers, 'worker')}"
        return f"{workers} x ({self.pool_size} + {self.max_overflow}){self.databases}"

    @property
    def databases(self) -> str:
        """The factor of the databases, if there are several."""
        return f" x {1 + self.binds} databases" if self.binds else ""


def plan(**numbers: Any) -> Plan:
    """Size one instance so that all of them together fit every server. The parameters are those of :class:`Numbers`.

    Numbers that are given stay, and the others are chosen. If the preferred size does not fit, the choice among all
    smaller ones is: the most slots, then the most workers that have a core each, then the most workers. Behind a pooler
    nothing shrinks, since the pooler limits the connections.

    :raises PlanError: nothing fits, or only a single slot for each instance would.
    """
    given = Numbers(**numbers)
    threads, pool_size, max_overflow = given.threads, given.pool_size, given.max_overflow
    if given.worker_class == "sync" and threads not in (None, 1):
        raise PlanError(f"WEB_THREADS={threads}: a sync worker has one thread", [Remedy("WEB_THREADS", 1)])
    if pool_size is not None and threads is not None and pool_size + max_overflow < threads:
        less = f"DB_POOL_SIZE={pool_size} + DB_MAX_OVERFLOW={max_overflow} is less than WEB_THREADS={threads}"
        ways = [Remedy("DB_POOL_SIZE", threads - max_overflow), Remedy("WEB_THREADS", pool_size + max_overflow)]
        raise PlanError(f"{less}: a thread would wait for a connection that its own process cannot open", ways)
    choices = _choices(given)
    if not choices:
        raise _too_small(given)
    for name, server in given.servers.items():
        if given.pooler != "none" and server.connections_per_pooler < 1:
            raise _out_of_connections_for_poolers(given, name)
        if not any(server.fits(*choice) for choice in choices):
            raise _out_of_connections(given, name)

    def preference(choice: tuple[int, int]) -> tuple[int, int, int]:
        w, t = choice
        return w * t, min(w, math.ceil(given.cpus)), w

    wanted, (w, t) = max(choices, key=preference), max(_fitting(given), key=preference)
    chosen = Plan(**(vars(given) | {"workers": w, "threads": t, "pool_size": pool_size or t}))
    return replace(chosen, notes=tuple(_notes(chosen, given, wanted)))


def _choices(given: Numbers) -> list[tuple[int, int]]:
    """List the workers and threads that this machine is large enough for, with at least two slots, and a connection
    for each thread."""
    most_workers = min(given.workers_by_cpus, given.workers_by_memory, MAX_WORKERS)
    return [
        (w, t)
        for w in (range(1, most_workers + 1) if given.workers is None else (given.workers,))
        for t in (range(1, _most_threads(given) + 1) if given.threads is None else (given.threads,))
        if w * t >= MIN_SLOTS and (given.pool_size is None or t <= given.pool_size + given.max_overflow)
    ]


def _most_threads(given: Numbers) -> int:
    most = 1 if given.worker_class == "sync" else GTHREAD_THREADS
    return most if given.pool_size is None else min(most, given.pool_size + given.max_overflow)


def _fitting(given: Numbers) -> list[tuple[int, int]]:
    """List the choices that every server has enough connections for."""
    servers = given.servers.values()
    return [choice for choice in _choices(given) if all(each.fits(*choice) for each in servers)]


def _notes(chosen: Plan, given: Numbers, wanted: tuple[int, int]) -> Iterator[str]:
    """Say why the plan is not larger."""
    by_cpus, by_memory, servers = given.workers_by_cpus, given.workers_by_memory, chosen.servers
    if wanted != (chosen.workers, chosen.threads):
        tight = [each.server for each in given.servers.values() if not each.fits(*wanted)]
        by = " and ".join(f"the server of {server}" if server else "the database" for server in tight)
        more = "more connections, fewer instances or a pooler would give more slots"
        yield f"shrunk by {by} from {wanted[0]} x {wanted[1]}: {more}"
    if given.workers is None and by_cpus > min(by_memory, MAX_WORKERS):
        bound = f"memory ({chosen.memory_mib} MiB)" if by_memory < MAX_WORKERS else f"the cap of {MAX_WORKERS}"
        yield f"workers held to {min(by_memory, MAX_WORKERS)} by {bound}; {by_cpus} by cpus"
    if given.workers is not None and given.workers > by_memory:
        yield f"WEB_CONCURRENCY={given.workers} is more than memory holds ({by_memory})"
    if (pool := chosen.pool_size + chosen.max_overflow) > chosen.threads:
        never = f"requests never use {pool - chosen.threads} of the {pool} connections of a worker"
        yield f"{never}: it has {counted(chosen.threads, 'thread')}"
    if chosen.pooler != "none":
        clients, most, _ = chosen.pooler_sizes.values()
        opened = sum(each.connections_per_pooler * (1 + each.binds) for each in servers.values())
        one_may_fail = f" of each of {chosen.poolers}, of which one may fail" if chosen.poolers > 1 else ""
        sizes = f"max_db_connections and default_pool_size to at most {most}{one_may_fail}"
        files = clients + opened + PGBOUNCER_FILES
        more = f"(2 x the database's cores + 1 is a good start); it needs {files} open files"
        yield f"set {chosen.pooler}'s max_client_conn to at least {clients} and its {sizes} {more}"
        for name in chosen.bind_servers:
            most = servers[name].connections_per_pooler
            yield f"for {name} set max_db_connections and pool_size to at most {most}, in {chosen.pooler}'s [databases]"


def _out_of_connections_for_poolers(given: Numbers, name: str) -> PlanError:
    """Explain that a server does not even have one connection for each pooler and database."""
    server = given.servers[name]
    databases, usable = 1 + server.binds, server.connections_usable
    enough = server.max_connections - usable + max(PGBOUNCER_POOL_SIZE, given.poolers * databases)
    fewer = min(each.connections_usable // (1 + each.binds) for each in given.servers.values())
    each = "" if given.poolers * databases == 1 else f" ({given.poolers} of it, {counted(databases, 'database')})"
    problem = f"no connection is left for {given.pooler}{each}: {server.left_over} = {usable}"
    remedies = [server.giving(enough), *([Remedy("DB_POOLERS", fewer)] if fewer >= 1 else [])]
    return PlanError(server.named(problem), remedies)


def _out_of_connections(given: Numbers, name: str) -> PlanError:
    """Explain that not even the smallest instances fit on a server."""
    server, servers, instances = given.servers[name], given.servers.values(), given.instances
    least, slots, w, t = min((w * server.connections_for(t), w * t, w, t) for w, t in _choices(given))
    usable, jobs = server.connections_usable, server.connections_jobs
    remedies = [server.giving(instances * least + server.max_connections - usable)]
    fewer = min(each.connections_usable // (w * each.connections_for(t)) for each in servers)
    remedies += [Remedy("APP_INSTANCES", fewer)] if fewer >= 1 else []
    for number, variable in GIVEN.items():
        smaller = range((getattr(given, number) or 0) - 1, 0 if number != "max_overflow" else -1, -1)
        fitting = (value for value in smaller if _fitting(Numbers(**(vars(given) | {number: value}))))
        remedies += [Remedy(variable, value) for value in itertools.islice(fitting, 1)]
    if all(each.connections_per_pooler >= 1 for each in replace(given, pooler="pgbouncer").servers.values()):
        remedies.append(Remedy("DB_POOLER", "pgbouncer"))
    peak = f"{counted(instances, 'instance')} x {least} connections for {slots} slots each = {instances * least}"
    problem = f"{peak} > {usable} usable ({server.left_over})"
    if usable < least <= usable + jobs:
        listed = ", ".join(f"{job_name} {job}" for job_name, job in given.jobs.items())
        alone = f"the jobs alone hold {jobs} of {usable + jobs} usable connections ({listed})"
        problem = f"{alone}: {server.left_over} = {usable}"
    return PlanError(server.named(problem), remedies)


def _too_small(given: Numbers) -> PlanError:
    """Explain that the given numbers serve one request at a time, or that the memory holds too few workers."""
    least = MIN_SLOTS if (given.threads or _most_threads(given)) == 1 else 1
    if given.workers is None and given.workers_by_memory < least:
        needed = math.ceil((least * given.worker_memory_mib + MASTER_MEMORY_MIB) / MEMORY_SHARE)
        smaller = math.floor((given.memory_mib * MEMORY_SHARE - MASTER_MEMORY_MIB) / least)
        room = f"{given.memory_mib} MiB x {MEMORY_SHARE} - {MASTER_MEMORY_MIB} for the master"
        ways = [Remedy("memory_mib", needed), *([Remedy("WEB_WORKER_MEMORY_MIB", smaller)] if smaller >= 1 else [])]
        fewer = f"{room} holds fewer than {counted(least, 'worker')} of {given.worker_memory_mib} MiB"
        return TooLittleMemoryError(fewer, ways)
    asked = {variable: getattr(given, name) for name, variable in GIVEN.items() if name != "max_overflow"}
    given_as = ", ".join(f"{variable}={value}" for variable, value in asked.items() if value is not None)
    problem = f"{given_as}: an instance has to serve at least {MIN_SLOTS} requests at once"
    return PlanError(problem, [Remedy("WEB_CONCURRENCY", MIN_SLOTS)])
