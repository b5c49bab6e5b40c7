"""The promise held against the live server: does the plan's peak fit what this database really gives?"""

from dataclasses import dataclass

import sqlalchemy as sa

from app import defaults, pools
from app.config import Settings
from app.sizing import Plan

# One round trip, and nothing that an ordinary role may not read: of other roles' connections it sees little more than
# that they belong to a database. reserved_connections exists since Postgres 16.
FACTS = sa.text("""
    select current_setting('max_connections')::int as max_connections,
           current_setting('superuser_reserved_connections')::int as superuser_reserved,
           coalesce(current_setting('reserved_connections', true)::int, 0) as role_reserved,
           (select rolconnlimit from pg_roles where rolname = current_user) as role_limit,
           (select datconnlimit from pg_database where datname = current_database()) as database_limit,
           count(*) filter (where application_name = :service)::int as connected_ours,
           count(*) filter (where application_name <> :service)::int as connected_others
    from pg_stat_activity
    where datid is not null and backend_type is distinct from 'parallel worker' and pid <> pg_backend_pid()
""")


@dataclass(frozen=True, kw_only=True)
class Server:
    """What the server says of itself. A limit of -1 is none."""

    max_connections: int
    superuser_reserved: int
    role_reserved: int
    role_limit: int
    database_limit: int
    connected_ours: int
    connected_others: int

    @property
    def slots(self) -> int:
        """Connections for all ordinary roles together."""
        return self.max_connections - self.superuser_reserved - self.role_reserved


@dataclass(frozen=True, kw_only=True)
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


def ask(settings: Settings) -> Server:
    """Ask over a connection of its own, closed again before anything forks.

    :raises sqlalchemy.exc.OperationalError: the server cannot be reached, or has no connection to spare.
    """
    arguments = pools.engine_options(settings, web=False)["connect_args"]
    engine = sa.create_engine(settings.database_url, poolclass=sa.NullPool, connect_args=arguments)
    with engine.connect() as connection:
        return Server(**connection.execute(FACTS, {"service": defaults.SERVICE_NAME}).mappings().one())


def judge(plan: Plan, server: Server) -> Verdict:
    """Hold the plan against the server's limits, and against who is connected now."""
    limits = {
        f"max_connections {server.max_connections} - {server.superuser_reserved + server.role_reserved} kept by the"
        f" server - {plan.reserved} reserved": server.slots - plan.reserved,
        "the role's connection limit": server.role_limit,
        "the database's connection limit": server.database_limit,
    }
    binding = {name: limit for name, limit in limits.items() if limit >= 0 or "max_connections" in name}
    usable = min(binding.values())
    problems, warnings = [], []
    if plan.pooler != "none":
        # The server's connections are PgBouncer's. Whether its pool fits is for its own configuration to say.
        if usable < 1:
            problems.append(f"no connection is left for {plan.pooler}: {usable} usable")
    else:
        problems = [
            f"{plan.instances} instances x {plan.workers} workers x ({plan.pool_size} + {plan.max_overflow})"
            f" = {plan.connections_peak} > {limit} ({name})"
            for name, limit in binding.items()
            if plan.connections_peak > limit
        ]
        if not problems and plan.connections_peak + server.connected_others > server.slots:
            warnings.append(
                f"{server.connected_others} connections of others are open, more than the {plan.reserved} reserved:"
                f" {plan.connections_peak} + {server.connected_others} > {server.slots}"
            )
    return Verdict(
        server=server,
        peak=plan.connections_peak,
        usable=usable,
        problems=tuple(problems),
        warnings=tuple(warnings),
    )
