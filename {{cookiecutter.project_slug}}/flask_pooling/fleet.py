"""`flask pool fleet FILE` and `python -m flask_pooling fleet FILE`: the sum of all services on each server, for CI.

The keys of the file have the names that they have in a plan:

    [servers.main]
    max_connections = 100
    reserved = 10            # 10 where it is left out
    pooler = "pgbouncer"     # and poolers = 2; none where it is left out
    url_env = "MAIN_URL"     # the variable with its URL, for --check

    [services.web]
    server = "main"          # or a list: it holds a pool to each
    instances = 4
    workers = 3              # 1 where it is left out
    pool_size = 4
    max_overflow = 0         # 0 where it is left out
    jobs = { worker = "2x4" }
"""

import json
import os
import re
import sys
import tomllib
from collections.abc import Iterator
from typing import Annotated, Any, BinaryIO, Literal

import click
import psycopg
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from flask_pooling.settings import Jobs
from flask_pooling.sizing import DEFAULT_RESERVED, SUPERUSER_RESERVED, counted, left_over

# A role needs pg_read_all_stats to see the names of others' connections.
CONNECTED = """
    select coalesce(nullif(application_name, ''), 'no name'), count(*) filter (where pid <> pg_backend_pid())::int,
           current_setting('max_connections')::int
    from pg_stat_activity where datid is not null and backend_type is distinct from 'parallel worker' group by 1
"""


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _as_setting(jobs: Any) -> Any:
    """Write jobs as APP_JOBS has them."""
    return ",".join(f"{name}={job}" for name, job in jobs.items()) if isinstance(jobs, dict) else jobs


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Server(_Table):
    max_connections: int = Field(ge=1)
    reserved: int = Field(DEFAULT_RESERVED, ge=0)
    pooler: Literal["none", "pgbouncer"] = "none"
    poolers: int = Field(1, ge=1)
    url_env: str = ""

    @property
    def usable(self) -> int:
        return self.max_connections - SUPERUSER_RESERVED - self.reserved


class Service(_Table):
    servers: Annotated[list[str], BeforeValidator(_as_list)] = Field(alias="server")
    instances: int = Field(ge=0)
    workers: int = Field(1, ge=1)
    pool_size: int = Field(ge=1)
    max_overflow: int = Field(0, ge=0)
    jobs: Annotated[Jobs, BeforeValidator(_as_setting)] = {}

    def held(self) -> dict[str, int]:
        """Count the connections to each of its servers, by the suffix of the service's name."""
        web = self.instances * self.workers * (self.pool_size + self.max_overflow)
        return {"": web} | {f"/{name}": job.copies * job.connections for name, job in self.jobs.items()}

    @property
    def sum(self) -> str:
        jobs = "".join(f" + {job} of {name}" for name, job in self.jobs.items())
        web = f"{counted(self.instances, 'instance')} x {counted(self.workers, 'worker')}"
        return f"{web} x ({self.pool_size} + {self.max_overflow}){jobs} = {sum(self.held().values())}"


class Fleet(_Table):
    servers: dict[str, Server]
    services: dict[str, Service]

    def on(self, server: str) -> dict[str, Service]:
        return {name: service for name, service in self.services.items() if server in service.servers}


def summed(name: str, server: Server, ours: dict[str, Service]) -> tuple[dict[str, Any], str, list[str]]:
    """Return the sums of a server, its line, and what does not fit there with what would help.

    Behind a pooler each service has a database of its own.
    """
    services = {each: sum(service.held().values()) for each, service in ours.items()}
    needed, usable, behind = sum(services.values()), server.usable, server.pooler != "none"
    sums = {"usable": usable, "connections": needed, "services": services}
    opened = server.poolers * len(ours) if behind else needed
    line = f"{name}: {needed} of {counted(usable, 'connection')}"
    if behind:
        most = max(0, usable) // max(1, opened)
        line = f"{name}: {needed} clients of {server.poolers} x {server.pooler}, max_db_connections={most}"
    if opened <= max(0, usable):
        return sums, line, []
    ways = [f"servers.{name}.max_connections={opened - usable + server.max_connections}"]
    if not behind:
        ways += _smaller(ours, usable - opened)
        ways += [f'servers.{name}.pooler="pgbouncer"'] if usable >= len(ours) else []
    each = f" (one for each {server.pooler} and service)" if behind else ""
    problem = f"{opened}{each} > {usable} usable ({left_over(server.max_connections, server.reserved)})"
    return sums, line, [f"{name}: {problem}; what would help: {' or '.join(ways)}"]


def _smaller(ours: dict[str, Service], missing: int) -> Iterator[str]:
    """Suggest smaller numbers for the largest service."""
    name, largest = max(ours.items(), key=lambda item: item[1].held()[""])
    for number in "instances", "pool_size":
        sizes = [(value, largest.model_copy(update={number: value})) for value in range(1, getattr(largest, number))]
        fitting = [value for value, size in sizes if size.held()[""] <= largest.held()[""] + missing]
        yield from (f"services.{name}.{number}={value}" for value in fitting[-1:])


def read(file: BinaryIO) -> Fleet:
    """Read the file. :raises click.UsageError: with all that is wrong in it."""
    try:
        fleet = Fleet.model_validate(tomllib.load(file))
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors()]
    except ValueError as error:  # no UTF-8, no TOML
        problems = [str(error)]
    else:
        named = [(name, each) for name, service in fleet.services.items() for each in service.servers]
        unknown = [(name, each) for name, each in named if each not in fleet.servers]
        problems = [f"services.{name}.server: {each!r} is not one of the servers" for name, each in unknown]
    if problems:
        raise click.UsageError("\n".join(f"{file.name}: {problem}" for problem in problems))
    return fleet


def check(fleet: Fleet) -> Iterator[str]:
    """Compare the connections of the live servers with the file. :raises click.UsageError: one cannot be asked."""
    for name, server in fleet.servers.items():
        if not (url := os.environ.get(server.url_env)):
            raise click.UsageError(f"servers.{name}.url_env={server.url_env!r}: has to name a variable with the URL")
        try:
            with psycopg.connect(re.sub(r"^postgres(ql)?\+?\w*:", "postgresql:", url), connect_timeout=5) as connection:
                connected = connection.execute(CONNECTED).fetchall()
        except psycopg.Error as error:
            raise click.UsageError(f"{name} cannot be asked: {' '.join(str(error).split())}") from None
        if (most := connected[0][2]) != server.max_connections:
            yield f"{name}: max_connections is {most} there, and {server.max_connections} in the file"
        held = {f"{each}{kind}": n for each, service in fleet.on(name).items() for kind, n in service.held().items()}
        # A pooled connection has the name of a client that has used it.
        for who, count, _ in sorted(connected) if server.pooler == "none" else ():
            if count > held.get(who, server.reserved):
                yield f"{name}: {counted(count, 'connection')} of {who!r}, and the file has {held.get(who, 'none')}"


@click.command()
@click.argument("file", type=click.File("rb"))
@click.option("--check", "ask", is_flag=True, help="Compare with the connections of the live servers.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def fleet(file: BinaryIO, ask: bool, as_json: bool) -> None:
    """Add up all services on each server of FILE.

    Exits with 1 when they do not fit, and with 2 when the file cannot be used or a server cannot be asked.
    """
    told = read(file)
    sums, lines, problems = {}, [], []
    for name, server in told.servers.items():
        sums[name], line, found = summed(name, server, told.on(name))
        lines += [line, *(f"  {each}: {service.sum}" for each, service in told.on(name).items())]
        problems += found
    problems += check(told) if ask else ()
    lines += [f"problem: {problem}" for problem in problems]
    as_dict = {"servers": sums, "problems": problems, "holds": not problems}
    click.echo(json.dumps(as_dict) if as_json else "\n".join(lines))
    sys.exit(1 if problems else 0)
