"""The sizing arithmetic: numbers in, a frozen plan out.

gunicorn.conf.py and the Flask config ask the same :func:`plan`, so the workers that are started and the pools that
they open cannot disagree. Nothing here reads the environment, the machine or the database.

The promise is one line:

>>> print(plan(cpus=2, memory_mib=4096, max_connections=100, instances=2).sum)
2 instances x 3 workers x (4 + 0) = 24 of 87 connections (100 - 3 for superusers - 10 reserved)
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

# Postgres keeps these for superusers (superuser_reserved_connections): an ordinary role never gets them.
SUPERUSER_RESERVED = 3
DEFAULT_RESERVED = 10
# Measured: 26 MiB (PSS) after 10,000 reads, 36 with the master's share, and up to 108 (RSS) with the largest pages in
# all threads. The rest is for the app that this becomes.
DEFAULT_WORKER_MEMORY_MIB = 150
# One worker more than cores keeps the cores busy while others wait for the database, and one that hangs or is replaced
# is not the only one. Four threads are enough where requests compute and ask the database in turn. More only help those
# whose requests mostly wait for the database, at a connection each: WEB_THREADS is for them.
GTHREAD_THREADS = 4
# With four threads and two instances these are 96 connections, more than a Postgres with its own defaults has to give.
# And each idle worker wakes up for each new client. A larger machine is better filled with more instances.
MAX_WORKERS = 12
# One slot means that a single slow request is an outage.
MIN_SLOTS = 2
# What the master and the page cache need, and the share of the memory that is planned at all.
MASTER_MEMORY_MIB = 64
MEMORY_SHARE = 0.8
PGBOUNCER_POOL_SIZE = 20


@dataclass(frozen=True)
class Job:
    """A kind of process beside the web workers that keeps connections: `copies` of it, with `connections` each."""

    copies: int
    connections: int

    @property
    def total(self) -> int:
        return self.copies * self.connections

    def __str__(self) -> str:
        return f"{self.copies} x {self.connections}"


@dataclass(frozen=True)
class Remedy:
    """One way out of a plan that does not fit: set `name` to `value` and leave the rest as it is."""

    name: str
    value: int | str

    def __str__(self) -> str:
        return f"{self.value} MiB of memory" if self.name == "memory_mib" else f"{self.name}={self.value}"


class PlanError(ValueError):
    """The numbers do not fit together. The message shows the sum; `remedies` are numbers that would make it fit."""

    def __init__(self, problem: str, remedies: list[Remedy]) -> None:
        self.problem = problem
        self.remedies = tuple(remedies)
        ways = " or ".join(str(remedy) for remedy in remedies)
        super().__init__(f"{problem}; what would help: {ways}" if ways else problem)


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What a plan is made from. `workers`, `threads` and `pool_size` are taken as they are where given."""

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
    binds: int = 0  # Postgres databases of SQLALCHEMY_BINDS; every worker keeps a pool for each
    jobs: Mapping[str, Job] = field(default_factory=dict)  # other processes that keep connections, by name


@dataclass(frozen=True, kw_only=True)
class Plan(Numbers):
    """How many processes, threads and connections one instance gets, and what all instances may hold at once."""

    workers: int
    threads: int
    pool_size: int
    notes: tuple[str, ...] = ()

    @property
    def slots(self) -> int:
        """Requests that one instance serves at the same time."""
        return self.workers * self.threads

    @property
    def connections_per_pool(self) -> int:
        return self.pool_size + self.max_overflow

    @property
    def connections_per_worker(self) -> int:
        """Each database of SQLALCHEMY_BINDS has a pool like the first one."""
        return (1 + self.binds) * self.connections_per_pool

    @property
    def connections_per_instance(self) -> int:
        return self.workers * self.connections_per_worker

    @property
    def connections_peak(self) -> int:
        """The most connections that the web workers of all instances together can hold open."""
        return self.instances * self.connections_per_instance

    @property
    def connections_jobs(self) -> int:
        """The most connections that all jobs together can hold open."""
        return _total(self.jobs)

    @property
    def connections_usable(self) -> int:
        """The connections of the server that are left for the web workers."""
        return usable_connections(self.max_connections, self.reserved, self.connections_jobs)

    @property
    def role_limit(self) -> int:
        """The server's own limit for the service's role: what the plan counts, and half of what is reserved for its
        migrations, checks, cron jobs and shells. The other half stays free of it, for psql, monitoring and others."""
        ours = self.connections_peak if self.pooler == "none" else self.connections_usable
        return ours + self.connections_jobs + math.ceil(self.reserved / 2)

    @property
    def pooler_sizes(self) -> dict[str, int]:
        """PgBouncer's settings. Its own default of 20 connections for a pool is held to what is usable."""
        most = usable_connections(self.max_connections, self.reserved)  # jobs come through it as well
        return {
            "max_client_conn": self.pooler_clients,
            "max_db_connections": most,
            "default_pool_size": min(most, PGBOUNCER_POOL_SIZE),
        }

    @property
    def pooler_clients(self) -> int:
        """PgBouncer's max_client_conn: the peak and a fifth more, for deploys and reconnects."""
        return math.ceil((self.connections_peak + self.connections_jobs) * 1.2)

    @property
    def sum(self) -> str:
        """The promise in words."""
        return (
            f"{self.factors} = {self.connections_peak} of {self.connections_usable} connections"
            f" ({_left_over(self.max_connections, self.reserved, self.connections_jobs)})"
        )

    @property
    def factors(self) -> str:
        """What is multiplied for the peak."""
        databases = f" x {1 + self.binds} databases" if self.binds else ""
        return (
            f"{self.instances} instances x {self.workers} workers x ({self.pool_size} + {self.max_overflow}){databases}"
        )


def usable_connections(max_connections: int, reserved: int, jobs: int = 0) -> int:
    """The connections that an ordinary role may fill with web workers."""
    return max_connections - SUPERUSER_RESERVED - reserved - jobs


def _total(jobs: Mapping[str, Job]) -> int:
    return sum(job.total for job in jobs.values())


def _left_over(max_connections: int, reserved: int, jobs: int) -> str:
    """How the usable connections are reckoned, in words."""
    for_jobs = f" - {jobs} for jobs" if jobs else ""
    return f"{max_connections} - {SUPERUSER_RESERVED} for superusers - {reserved} reserved{for_jobs}"


def workers_for_cpus(cpus: float, worker_class: str) -> int:
    """One worker more than cores where threads hide the waits; gunicorn's 2n + 1 where a worker is the only
    concurrency; two at the least, so that one that restarts leaves one that serves.

    >>> [workers_for_cpus(cpus, "gthread") for cpus in (0.5, 1, 2, 4)]
    [2, 2, 3, 5]
    >>> [workers_for_cpus(cpus, "sync") for cpus in (0.25, 1, 2, 4)]
    [2, 3, 5, 9]
    """
    by_rule = math.floor(2 * cpus) + 1 if worker_class == "sync" else math.ceil(cpus) + 1
    return max(2, by_rule)


def workers_for_memory(memory_mib: int, worker_memory_mib: int) -> int:
    """The workers that fit beside the master in four fifths of the memory.

    >>> [workers_for_memory(mib, 150) for mib in (128, 512, 1024)]
    [0, 2, 5]
    """
    return max(0, math.floor((memory_mib * MEMORY_SHARE - MASTER_MEMORY_MIB) / worker_memory_mib))


def plan(**numbers: Any) -> Plan:
    """Size one instance so that all of them together fit the database. The parameters are those of :class:`Numbers`.

    What is not given is chosen around what is. Where the preferred size does not fit, the choice among all smaller ones
    is: the most slots, then the most workers that have a core each, then the most workers. Behind a pooler the
    connections are the pooler's, so nothing shrinks.

    :raises PlanError: nothing fits, or fewer than two slots an instance would.
    """
    given = Numbers(**numbers)
    workers, threads, pool_size, max_overflow = given.workers, given.threads, given.pool_size, given.max_overflow
    memory_mib, worker_memory_mib, worker_class = given.memory_mib, given.worker_memory_mib, given.worker_class
    cpus, instances = given.cpus, given.instances
    usable = usable_connections(given.max_connections, given.reserved, _total(given.jobs))
    by_memory = workers_for_memory(memory_mib, worker_memory_mib)
    most_workers = min(workers_for_cpus(cpus, worker_class), by_memory, MAX_WORKERS)
    most_threads = 1 if worker_class == "sync" else GTHREAD_THREADS

    if worker_class == "sync" and threads not in (None, 1):
        raise PlanError(f"WEB_THREADS={threads}: a sync worker has one thread", [Remedy("WEB_THREADS", 1)])
    if pool_size is not None and threads is not None and pool_size + max_overflow < threads:
        raise PlanError(
            f"DB_POOL_SIZE={pool_size} + DB_MAX_OVERFLOW={max_overflow} is less than WEB_THREADS={threads}:"
            " a thread would wait for a connection that its own process cannot open",
            [Remedy("DB_POOL_SIZE", threads - max_overflow), Remedy("WEB_THREADS", pool_size + max_overflow)],
        )
    if pool_size is not None:
        most_threads = min(most_threads, pool_size + max_overflow)
    if workers is None and (most_workers < 1 or most_workers * (threads or most_threads) < MIN_SLOTS):
        raise _out_of_memory(memory_mib, worker_memory_mib, MIN_SLOTS if (threads or most_threads) == 1 else 1)

    worker_choices = range(1, most_workers + 1) if workers is None else (workers,)
    thread_choices = range(1, most_threads + 1) if threads is None else (threads,)

    def per_worker(threads: int) -> int:
        return (1 + given.binds) * ((threads if pool_size is None else pool_size) + max_overflow)

    def candidates(limit: float) -> Iterator[tuple[int, int]]:
        return (
            (w, t)
            for w in worker_choices
            for t in thread_choices
            if w * t >= MIN_SLOTS and instances * w * per_worker(t) <= limit
        )

    def preference(choice: tuple[int, int]) -> tuple[int, int, int]:
        w, t = choice
        return w * t, min(w, math.ceil(cpus)), w

    unbounded = list(candidates(math.inf))
    if not unbounded:
        one = Remedy("WEB_CONCURRENCY", MIN_SLOTS)
        two = [] if worker_class == "sync" else [Remedy("WEB_THREADS", MIN_SLOTS)]
        fits = pool_size is None or pool_size + max_overflow >= MIN_SLOTS
        set_to = {"WEB_CONCURRENCY": workers, "WEB_THREADS": threads, "DB_POOL_SIZE": pool_size}
        given_as = ", ".join(f"{name}={value}" for name, value in set_to.items() if value is not None)
        problem = f"{given_as}: an instance has to serve at least {MIN_SLOTS} requests at once"
        raise PlanError(problem, [one, *(two if fits else [])])
    if given.pooler != "none" and usable < 1:
        left = _left_over(given.max_connections, given.reserved, _total(given.jobs))
        enough = given.max_connections - usable + PGBOUNCER_POOL_SIZE
        raise PlanError(f"no connection is left for {given.pooler}: {left}", [Remedy("DB_MAX_CONNECTIONS", enough)])
    fitting = unbounded if given.pooler != "none" else list(candidates(usable))
    if not fitting:
        raise _out_of_connections(min(w * per_worker(t) for w, t in unbounded), given)

    wanted = max(unbounded, key=preference)
    chosen = max(fitting, key=preference)
    sizes = {"workers": chosen[0], "threads": chosen[1], "pool_size": chosen[1] if pool_size is None else pool_size}
    result = Plan(**(vars(given) | sizes))
    return _with_notes(result, wanted, by_memory, workers)


def _with_notes(result: Plan, wanted: tuple[int, int], by_memory: int, asked_workers: int | None) -> Plan:
    """Say what bent the plan, for the person who wonders why it is not larger."""
    notes = []
    by_cpus = workers_for_cpus(result.cpus, result.worker_class)
    if wanted != (result.workers, result.threads):
        notes.append(
            f"shrunk by the database from {wanted[0]} x {wanted[1]}: more connections, fewer instances or a pooler"
            " would give more slots"
        )
    if asked_workers is None and by_cpus > min(by_memory, MAX_WORKERS):
        bound = f"memory ({result.memory_mib} MiB)" if by_memory < MAX_WORKERS else f"the cap of {MAX_WORKERS}"
        notes.append(f"workers held to {min(by_memory, MAX_WORKERS)} by {bound}; {by_cpus} by cpus")
    if asked_workers is not None and asked_workers > by_memory:
        notes.append(f"WEB_CONCURRENCY={asked_workers} is more than memory holds ({by_memory})")
    if result.connections_per_pool > result.threads:
        idle = result.connections_per_pool - result.threads
        notes.append(f"{idle} of {result.connections_per_pool} connections a worker can only serve background threads")
    if result.pooler != "none":
        notes.append(
            f"set {result.pooler}'s max_client_conn to at least {result.pooler_clients} and its default_pool_size to"
            f" at most {result.connections_usable} (2 x the database's cores + 1 is a good start)"
        )
    return Plan(**{**vars(result), "notes": tuple(notes)})


def _out_of_connections(least: int, given: Numbers) -> PlanError:
    """Not even the smallest instance fits, which has two slots, and `least` connections for them."""
    max_connections, reserved, jobs, instances = given.max_connections, given.reserved, given.jobs, given.instances
    jobs_total = _total(jobs)
    usable = usable_connections(max_connections, reserved, jobs_total)
    without_jobs = usable_connections(max_connections, reserved)
    remedies = [Remedy("DB_MAX_CONNECTIONS", instances * least + SUPERUSER_RESERVED + reserved + jobs_total)]
    if usable >= least:
        remedies.append(Remedy("APP_INSTANCES", usable // least))
    if usable >= 1:
        remedies.append(Remedy("DB_POOLER", "pgbouncer"))
    if usable < least and without_jobs >= least and jobs:
        listed = ", ".join(f"{name} {job}" for name, job in jobs.items())
        return PlanError(
            f"the jobs alone hold {jobs_total} of {without_jobs} usable connections ({listed}):"
            f" {_left_over(max_connections, reserved, jobs_total)} = {usable}",
            remedies,
        )
    return PlanError(
        f"{instances} instances x {least} connections for {MIN_SLOTS} slots each = {instances * least}"
        f" > {usable} usable ({_left_over(max_connections, reserved, jobs_total)})",
        remedies,
    )


def _out_of_memory(memory_mib: int, worker_memory_mib: int, least: int) -> PlanError:
    """Not even the least workers fit into the memory."""
    needed = math.ceil((least * worker_memory_mib + MASTER_MEMORY_MIB) / MEMORY_SHARE)
    remedies = [Remedy("memory_mib", needed)]
    smaller = math.floor((memory_mib * MEMORY_SHARE - MASTER_MEMORY_MIB) / least)
    if smaller >= 1:
        remedies.append(Remedy("WEB_WORKER_MEMORY_MIB", smaller))
    return PlanError(
        f"{memory_mib} MiB x {MEMORY_SHARE} - {MASTER_MEMORY_MIB} for the master holds fewer than"
        f" {least} workers of {worker_memory_mib} MiB",
        remedies,
    )
