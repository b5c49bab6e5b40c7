"""Compare the plan with the live server: does its peak fit what this database really gives?"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import sqlalchemy as sa

from flask_pooling.engine import name_of
from flask_pooling.process import CLI, WEB
from flask_pooling.sizing import SUPERUSER_RESERVED, Plan, counted

# One round trip, and only what an ordinary role may read: of other roles' connections, little more than their role and
# their database. reserved_connections exists since Postgres 16. Only the server's own limit holds a superuser.
FACTS = sa.text("""
    select current_setting('max_connections')::int as max_connections,
           current_setting('superuser_reserved_connections')::int
           + coalesce(current_setting('reserved_connections', true)::int, 0) as kept,
           case when rolsuper then -1 else rolconnlimit end as role_limit,
           case when rolsuper then -1 else datconnlimit end as database_limit,
           (select source = 'client' from pg_settings where name = 'client_connection_check_interval') as obeys,
           (select json_agg(json_build_array(application_name, usename = rolname, pg_stat_activity.datname = d.datname))
            from pg_stat_activity where datid is not null and backend_type is distinct from 'parallel worker'
            and pid <> pg_backend_pid()) as clients
    from pg_roles, pg_database as d where rolname = current_user and d.datname = current_database()
""")
# What the server, or a pooler, says when it has no connection left.
FULL = re.compile("too many clients|remaining connection slots|too many connections|no more connections allowed")
# What PgBouncer and Neon, or RDS Proxy, say of startup options. pgcat, Supavisor and Odyssey ignore them.
REFUSES_OPTIONS = re.compile("unsupported startup parameter|support command-line options")


@dataclass(frozen=True, kw_only=True)
class Server:
    """The server's limits, and who is connected. A limit of -1 means none."""

    max_connections: int
    kept: int  # for superusers and the roles of reserved_connections: no ordinary role gets these
    role_limit: int
    database_limit: int
    obeys: bool  # the time limits that a connection brings along
    connected: Mapping[str, int]  # by kind of process: web, a job's name, cli
    connected_others: int
    connected_role: int  # of the role, in any database
    connected_database: int  # of any role, in the database

    @property
    def for_roles(self) -> int:
        """Connections for all ordinary roles together."""
        return self.max_connections - self.kept


@dataclass(frozen=True)
class Verdict:
    """`problems` prove that the plan cannot fit; `warnings` say what is in the way at the moment."""

    server: Server
    peak: int
    usable: int
    problems: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def holds(self) -> bool:
        return not self.problems and not self.warnings

    @property
    def words(self) -> str:
        fits = "the plan fits, but not beside the connections that are open now" if self.warnings else "the plan fits"
        return "the plan does not fit" if self.problems else fits


def ask(plan: Plan, engine: sa.Engine, name: str) -> Server:
    """Ask the server, over a connection of the app's own engine.

    :param plan: the server's.
    :param name: the application_name of the web workers' connections.
    :raises sqlalchemy.exc.OperationalError: the server cannot be reached, or has no connection to spare.
    """
    with engine.connect() as connection:
        facts = dict(connection.execute(FACTS).mappings().one())
    clients = facts.pop("clients") or []
    # Count by role and database as well: another environment on the same server has the same names.
    by_name = Counter(called for called, of_role, here in clients if of_role and (here or plan.binds))
    ours = {kind: by_name[name_of(kind, name)] for kind in (WEB, CLI, *plan.jobs)}
    return Server(
        **facts,
        connected=ours,
        connected_others=len(clients) - sum(ours.values()),
        connected_role=sum(bool(of_role) for _, of_role, _ in clients),
        connected_database=sum(bool(of_database) for _, _, of_database in clients),
    )


def driver_message(error: sa.exc.SQLAlchemyError) -> str:
    """Return the driver's message, in one line, and the remedy if a pooler says it."""
    said = " ".join(str(getattr(error, "orig", error)).split())
    return f"{said}; it is a pooler: set DB_POOLER=pgbouncer, and no options" if REFUSES_OPTIONS.search(said) else said


def judge(plan: Plan, server: Server, *, starting: bool = False) -> Verdict:
    """Compare a server's plan with its limits, and with the connections that are open now.

    :param starting: an instance is about to start, so its connections come on top of those that are open. That is a
        problem only where both cannot fit: open connections may be left over from a host that has died.
    """
    on_server = f"max_connections {server.max_connections} - {server.kept} kept by the server"
    connected = sum(server.connected.values()) + server.connected_others
    # Each limit with the connections that count towards it now, and how many of the databases have as much each.
    limits = [("the role's connection limit", server.role_limit, server.connected_role, 1)]
    limits += [("the database's connection limit", server.database_limit, server.connected_database, 1 + plan.binds)]
    open_to = [(on_server, server.for_roles, connected, 1), *(each for each in limits if each[1] >= 0)]
    planned = {name: limit * databases for name, limit, _, databases in open_to[1:]}
    planned |= {f"{on_server} - {plan.reserved} reserved": server.for_roles - plan.reserved}
    usable = min(planned.values())
    reserve = "DB_BIND_SERVERS" if plan.server else "DB_RESERVED_CONNECTIONS"
    problems, warnings = [], []
    if plan.pooler != "none":
        # Only the poolers connect to the server, and their own configuration sizes their pools.
        opened = plan.connections_per_pooler * plan.poolers * (1 + plan.binds)
        if usable < 1:
            problems.append(f"no connection is left for {plan.pooler}: {usable} usable; raise max_connections")
        elif opened > usable:
            may_open = f"{plan.pooler} with the plan's sizes may open {opened} connections, and {usable} are usable"
            warnings.append(f"{may_open}; set {plan.giving(usable + SUPERUSER_RESERVED + plan.reserved)}")
    else:
        needed, starts = plan.connections_peak + plan.connections_jobs, plan.connections_per_instance
        for_jobs = f" + {plan.connections_jobs} for jobs" if plan.jobs else ""
        problems = [
            f"{plan.factors}{for_jobs} = {needed} > {limit} ({name}); raise that limit, or set"
            f" {plan.giving(max(1, limit + SUPERUSER_RESERVED + plan.reserved))} to plan with it"
            for name, limit in planned.items()
            if needed > limit
        ]
        problems += [
            f"{counted(connected, 'connection')} of {limit} are open ({name}), and this instance may open"
            f" {starts // databases}; close some, or raise that limit"
            for name, limit, connected, databases in open_to
            if starting and not problems and connected + starts // databases > limit
        ]
        others = server.connected_others
        if not problems and needed + others > server.for_roles:
            warnings.append(
                f"others have {counted(others, 'connection')} open, more than the {plan.reserved} reserved:"
                f" {needed} + {others} > {server.for_roles}; close some, or reserve more in {reserve}"
            )
        warnings += _more_than_planned(plan, server, starts if starting else 0)
        warnings += [] if server.obeys else ["a pooler drops connections' time limits; set DB_POOLER=pgbouncer"]
    told = [tuple(map(plan.named, said)) for said in (problems, warnings)]
    return Verdict(server, plan.connections_peak, usable, *told)


def _more_than_planned(plan: Plan, server: Server, starting: int) -> list[str]:
    """Name each kind of process that has more connections open than the plan has for it."""
    planned = {WEB: (plan.connections_peak - starting, f"APP_INSTANCES={plan.instances}")}
    for name, job in plan.jobs.items():
        planned[name] = plan.connections_of(job), f"{name}={job.copies}x{job.connections} in APP_JOBS"
    return [
        f"connections of kind {kind}: {server.connected.get(kind, 0)} are open, and the plan has {most}"
        f"{' beside the instance that starts' if kind == WEB and starting else ''}: more processes run than {setting}"
        " says; stop some, or raise it"
        for kind, (most, setting) in planned.items()
        if server.connected.get(kind, 0) > most
    ]
