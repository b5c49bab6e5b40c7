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
from pathlib import Path
from typing import Annotated, Any, Literal

import click
import psycopg
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from flask_pooling.settings import JOB
from flask_pooling.sizing import DEFAULT_RESERVED, SUPERUSER_RESERVED, Job, counted

CONNECTED = """
    select coalesce(application_name, ''), count(*)::int from pg_stat_activity
    where datid is not null and backend_type is distinct from 'parallel worker' and pid <> pg_backend_pid() group by 1
"""
NAMELESS = "no name (a role needs pg_read_all_stats to see the names of others)"


def _job(value: Any) -> Job:
    if not isinstance(value, str) or not (match := JOB.fullmatch(f"job={value}")):
        raise ValueError('is written "COPIESxCONNECTIONS", for example "2x4"')
    return Job(int(match[2]), int(match[3]))


def _list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Server(_Table):
    max_connections: int = Field(ge=1)
    reserved: int = Field(DEFAULT_RESERVED, ge=0)
    pooler: Literal["none", "pgbouncer"] = "none"
    poolers: int = Field(1, ge=1)
    url_env: str | None = None

    @property
    def usable(self) -> int:
        return self.max_connections - SUPERUSER_RESERVED - self.reserved


class Service(_Table):
    servers: Annotated[list[str], BeforeValidator(_list)] = Field(alias="server")
    instances: int = Field(ge=0)
    workers: int = Field(1, ge=1)
    pool_size: int = Field(ge=1)
    max_overflow: int = Field(0, ge=0)
    jobs: dict[str, Annotated[Job, BeforeValidator(_job)]] = {}

    @property
    def web(self) -> int:
        return self.instances * self.workers * (self.pool_size + self.max_overflow)

    @property
    def connections(self) -> int:
        """To each of its servers."""
        return self.web + sum(job.copies * job.connections for job in self.jobs.values())

    @property
    def sum(self) -> str:
        jobs = "".join(f" + {job} of {name}" for name, job in self.jobs.items())
        web = f"{counted(self.instances, 'instance')} x {counted(self.workers, 'worker')}"
        return f"{web} x ({self.pool_size} + {self.max_overflow}){jobs} = {self.connections}"


class Fleet(_Table):
    servers: dict[str, Server]
    services: dict[str, Service]

    def on(self, server: str) -> dict[str, Service]:
        return {name: service for name, service in self.services.items() if server in service.servers}

    def needed(self, server: str) -> int:
        return sum(service.connections for service in self.on(server).values())

    def problems(self) -> Iterator[str]:
        """Name each server where the sum does not fit, and what would help."""
        for name, server in self.servers.items():
            ours, usable = self.on(name), server.usable
            pooled = server.pooler != "none"
            needed = server.poolers * len(ours) if pooled else self.needed(name)
            if not ours or needed <= usable:
                continue
            each = f" (one for each {server.pooler} and service)" if pooled else ""
            left_over = f"{server.max_connections} - {SUPERUSER_RESERVED} for superusers - {server.reserved} reserved"
            ways = [f"servers.{name}.max_connections={needed - usable + server.max_connections}"]
            if not pooled:
                ways += self._smaller(ours, usable - needed)
                ways += [f'servers.{name}.pooler="pgbouncer"'] if usable >= len(ours) else []
            yield f"{name}: {needed}{each} > {usable} usable ({left_over}); what would help: {' or '.join(ways)}"

    @staticmethod
    def _smaller(ours: dict[str, Service], missing: int) -> Iterator[str]:
        """Suggest smaller numbers for the largest service."""
        name, largest = max(ours.items(), key=lambda item: item[1].web)
        for number in "instances", "pool_size":
            for value in range(getattr(largest, number) - 1, 0, -1):
                if largest.model_copy(update={number: value}).web <= largest.web + missing:
                    yield f"services.{name}.{number}={value}"
                    break

    def total(self, name: str) -> str:
        """Say what the services need, and what their server has. Behind a pooler each has a database of its own."""
        server, needed = self.servers[name], self.needed(name)
        if server.pooler == "none":
            return f"{needed} of {counted(server.usable, 'connection')}"
        poolers = f"{server.poolers} x {server.pooler}" if server.poolers > 1 else server.pooler
        most = max(0, server.usable) // (server.poolers * max(1, len(self.on(name))))
        return f"{needed} clients of {poolers}, max_db_connections={most}"


def read(file: Path) -> Fleet:
    """Read the file. :raises click.UsageError: with all that is wrong in it."""
    try:
        fleet = Fleet.model_validate(tomllib.loads(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        problems = [_said(found) for found in error.errors()]
    except (OSError, ValueError) as error:  # no such file; no UTF-8, no TOML
        problems = [str(error)]
    else:
        problems = [
            f"services.{name}.server: {each!r} is not one of the servers ({', '.join(fleet.servers)})"
            for name, service in fleet.services.items()
            for each in service.servers
            if each not in fleet.servers
        ]
    if problems:
        raise click.UsageError("\n".join(f"{file}: {problem}" for problem in problems))
    return fleet


def _said(found: Any) -> str:
    reason = {"extra_forbidden": "no such key", "missing": "is missing"}.get(found["type"], found["msg"])
    return f"{'.'.join(map(str, found['loc']))}: {reason.removeprefix('Value error, ')}"


def check(fleet: Fleet, urls: dict[str, str]) -> Iterator[str]:
    """Compare the connections of the live servers with the file. :raises click.UsageError: one cannot be asked."""
    for name, server in fleet.servers.items():
        url = urls.get(name) or os.environ.get(server.url_env or "")
        if not url:
            where = f"the variable {server.url_env}, which is not set" if server.url_env else "url_env in the file"
            raise click.UsageError(f"the URL of {name} comes from --url {name}=URL, or from {where}")
        try:
            with psycopg.connect(re.sub(r"^postgres(ql)?\+?\w*:", "postgresql:", url), connect_timeout=5) as connection:
                (most,) = connection.execute("select current_setting('max_connections')::int").fetchone() or (0,)
                connected: dict[str, int] = dict(connection.execute(CONNECTED).fetchall())
        except psycopg.Error as error:
            raise click.UsageError(f"{name} cannot be asked: {' '.join(str(error).split())}") from None
        if most != server.max_connections:
            yield f"{name}: max_connections is {most} there, and {server.max_connections} in the file"
        if server.pooler != "none":
            continue  # a pooled connection has the name of a client that has used it
        planned = {each: service.web for each, service in fleet.on(name).items()}
        for each, service in fleet.on(name).items():
            planned |= {f"{each}/{job}": of.copies * of.connections for job, of in service.jobs.items()}
        for who, count in sorted(connected.items()):
            if count > planned.get(who, server.reserved):
                called, most = repr(who) if who else NAMELESS, planned.get(who, "none")
                yield f"{name}: {counted(count, 'connection')} of {called}, and the file has {most}"


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--check", "ask", is_flag=True, help="Ask the live servers who is connected.")
@click.option("--url", "urls", multiple=True, metavar="SERVER=URL", help="For --check.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def fleet(file: Path, ask: bool, urls: tuple[str, ...], as_json: bool) -> None:
    """Sum up all services on each server of FILE.

    Exits with 1 when they do not fit, and with 2 when the file cannot be used or a server cannot be asked.
    """
    told = read(file)
    url_of = {server: url for server, _, url in (each.partition("=") for each in urls)}
    problems = [*told.problems(), *(check(told, url_of) if ask else ())]
    sums: dict[str, Any] = {}
    lines = []
    for name, server in told.servers.items():
        services = told.on(name)
        sums[name] = {"usable": server.usable, "connections": told.needed(name)}
        sums[name]["services"] = {each: service.connections for each, service in services.items()}
        lines += [f"{name}: {told.total(name)}", *(f"  {each}: {service.sum}" for each, service in services.items())]
    lines += [f"problem: {problem}" for problem in problems]
    told_as_json = json.dumps({"servers": sums, "problems": problems, "holds": not problems})
    click.echo(told_as_json if as_json else "\n".join(lines))
    sys.exit(1 if problems else 0)
