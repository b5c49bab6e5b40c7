"""`flask pool plan`, `check`, `limit` and `version`: the plan, whether it fits, the server's own limit, the library."""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Annotated, Any

import click
import sqlalchemy as sa
from flask import Flask, current_app
from flask.cli import with_appcontext
from psycopg import sql
from pydantic import TypeAdapter, ValidationError
from sqlalchemy.exc import SQLAlchemyError

from flask_pooling import budget, sizing, version
from flask_pooling.engine import engine_options, time_limits
from flask_pooling.fleet import fleet
from flask_pooling.settings import PLANNED_WITH, Settings, SettingsError
from flask_pooling.urls import database_url

AFTERWARDS = """\
-- Then run RECONNECT in the console of each PgBouncer: its new connections to the server have the time limits.
-- To undo this, run the lines with SET as RESET, without the value; then RECONNECT, and restart the service."""
SUMS = ("connections_per_instance", "connections_peak", "connections_jobs", "connections_usable", "sum")
MEAN_SECONDS = 0.05  # of a request, for an example of Little's law: requests at once = requests a second x seconds each


def register(app: Flask, settings: type[Settings]) -> None:
    """Add `flask pool` to the app. `flask pool plan` works without anything else of this package."""
    app.extensions["pooling_settings"] = settings
    app.cli.add_command(pool)


def _options_for_settings(command: Any) -> Any:
    """Add an option for each number of a plan that comes from a setting, with the limits of that setting."""
    for number, name in reversed(PLANNED_WITH.items()):
        words: dict[str, Any] = {"help": f"Instead of {name.upper()}, in the same form.", "metavar": "VALUE"}
        command = click.option(f"--{number.replace('_', '-')}", callback=_as_the_setting, **words)(command)
    return command


def _as_the_setting(context: click.Context, option: click.Parameter, value: str | None) -> Any:
    field = Settings.model_fields[PLANNED_WITH[str(option.name)]]
    limits: Any = Annotated[field.annotation, field]
    try:
        return None if value is None else TypeAdapter(limits).validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise click.BadParameter(f"{value!r}: {reason}", param=option) from None


class _Group(click.Group):
    def invoke(self, ctx: click.Context) -> Any:
        """Say in one line, without a traceback, that there is no plan."""
        try:
            return super().invoke(ctx)
        except (SettingsError, sizing.PlanError) as error:
            raise click.ClickException(str(error)) from None


@click.group(cls=_Group, commands=[fleet])
def pool() -> None:
    """Workers, threads and database connections: how many, and why."""


@pool.command()
@click.option("--cpus", type=click.FloatRange(min=0.01, max=4096), help="Instead of this machine's.")
@click.option("--memory-mib", type=click.IntRange(min=1), help="Instead of this machine's, in MiB.")
@_options_for_settings
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--for-pgbouncer", is_flag=True, help="Print the sizes for deploy/pgbouncer/pgbouncer.ini.")
@with_appcontext
def plan(as_json: bool, for_pgbouncer: bool, **what_if: Any) -> None:
    """Show the plan, and where each number is from.

    It is for this machine and these settings, or for other numbers. Exits with 1 when the numbers do not fit together.
    """
    if what_if["cpus"] != what_if["cpus"]:  # nan, which FloatRange lets pass
        raise click.BadParameter("'nan' is not a number of cpus", param_hint="--cpus")
    what_if |= {"pooler": "pgbouncer"} if for_pgbouncer else {}
    settings: type[Settings] = current_app.extensions["pooling_settings"]
    chosen = settings.load(numbers_only=True).plan_if(**what_if)
    shown = json.dumps(plan_as_dict(chosen)) if as_json else _table(_described(chosen))
    if for_pgbouncer:
        shown = "\n".join(f"{name} = {size}" for name, size in chosen.pooler_sizes.items())
    click.echo(shown)


def plan_as_dict(chosen: sizing.Plan) -> dict[str, Any]:
    """Return the plan's inputs and results, and its one line. `servers` has the results of DB_BIND_SERVERS."""
    sums = {name: {key: getattr(each, key) for key in SUMS} for name, each in chosen.servers.items()}
    inputs = {name: value for name, value in asdict(chosen).items() if name != "server"}
    return inputs | {"slots": chosen.slots} | sums.pop("") | {"servers": sums}


def _described(chosen: sizing.Plan) -> Iterator[tuple[str, str]]:
    """Describe the plan for a person: every number with the sum that it came from."""
    by_memory = f"{chosen.workers_by_memory} by memory ({chosen.worker_memory_mib} MiB each)"
    bounds = f"{chosen.workers_by_cpus} by cpus, {by_memory}, {sizing.MAX_WORKERS} by cap"
    held = sizing.counted(chosen.connections_per_instance, "connection")
    yield "machine", f"{chosen.cpus:g} cpu{'' if chosen.cpus == 1 else 's'}, {chosen.memory_mib} MiB"
    yield "workers", f"{chosen.workers} {chosen.worker_class}: at most {bounds}"
    yield "threads", f"{chosen.threads} a worker: {chosen.workers} x {chosen.threads} = {chosen.slots} requests at once"
    rate = f"{chosen.slots / MEAN_SECONDS:.0f} requests a second if each takes {MEAN_SECONDS} seconds"
    yield "capacity", f"{rate}: {chosen.slots} / {MEAN_SECONDS}"
    yield "pool", f"{chosen.pool_size} + {chosen.max_overflow} overflow a worker"
    yield "one instance", f"{chosen.workers} x {chosen.connections_per_worker} = {held}"
    for name, server in chosen.servers.items():
        yield f"on {name}" if name else "all instances", server.sum
    for name, job in chosen.jobs.items():
        connections = sizing.counted(chosen.connections_of(job), "connection")
        yield "job", f"{name}: {job}{chosen.databases} = {connections}"
    for note in chosen.notes:
        yield "note", note


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<14} {text}" for name, text in rows)


@pool.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@with_appcontext
def check(as_json: bool) -> None:
    """Compare the plan with the live servers.

    Exits with 1 when it does not, and with 2 when a server cannot be asked.
    """
    verdicts: dict[str, dict[str, Any]] = {}
    rows: list[tuple[str, str]] = []
    for chosen, engine, name in current_app.extensions["flask_pooling"].servers():
        try:
            verdict = budget.judge(chosen, budget.ask(chosen, engine, name))
        except SQLAlchemyError as error:
            said = chosen.named(f"the database cannot be asked: {budget.driver_message(error)}")
            raise click.UsageError(said) from None
        verdicts[chosen.server] = asdict(verdict) | {"holds": verdict.holds}
        rows += _judged(chosen, verdict)
    if "" not in verdicts:
        raise click.UsageError("the database is SQLite, which has no connection limit; there is nothing to check")
    holds = all(verdict["holds"] for verdict in verdicts.values())
    as_dict = verdicts.pop("") | {"servers": verdicts, "holds": holds}
    click.echo(json.dumps(as_dict) if as_json else _table(rows))
    sys.exit(0 if holds else 1)


def _judged(chosen: sizing.Plan, verdict: budget.Verdict) -> Iterator[tuple[str, str]]:
    server = verdict.server
    connected = "".join(f"{count} {kind}, " for kind, count in server.connected.items())
    yield "server", chosen.named(f"max_connections {server.max_connections}, {server.kept} reserved by the server")
    yield "role limit", "none" if server.role_limit < 0 else str(server.role_limit)
    yield "database limit", "none" if server.database_limit < 0 else str(server.database_limit)
    yield "connected now", f"{connected}{server.connected_others} of others"
    yield "usable", f"{verdict.usable} after {chosen.reserved} reserved"
    yield "peak", f"{verdict.peak}: {chosen.sum}"
    yield from [("problem", each) for each in verdict.problems] + [("warning", each) for each in verdict.warnings]
    yield "verdict", verdict.words


@pool.command()
@click.option("--apply", is_flag=True, help="Run the SQL as well, on the server of DATABASE_URL.")
@click.option("--admin-url", envvar="DATABASE_ADMIN_URL", help="URL of a role that may run it. Default: DATABASE_URL.")
@with_appcontext
def limit(apply: bool, admin_url: str | None) -> None:
    """Print the role's connection limit, as SQL.

    With it, each server itself holds the service to its plan. Behind PgBouncer there are also statements that give the
    role its time limits in the service's databases. Transactions then need not send them.
    """
    state = current_app.extensions["flask_pooling"]
    settings, url, role = state.settings, state.first.url, state.first.url.username
    urls = {engine.url for engine in state.db.engines.values()}
    asked = {chosen.server: (chosen, engine.url) for chosen, engine, _ in state.servers()}
    if "" not in asked or not all(theirs.username for _, theirs in asked.values()):
        raise click.UsageError("each URL of a database has to name a role: postgresql://role@host/name")
    statements = {server: [*_limits(*each, settings, urls)] for server, each in asked.items()}
    for server, lines in statements.items():
        click.echo((f"-- On the server of {server}:\n" if server else "") + ";\n".join(lines) + ";")
    if settings.db_pooler != "none":
        click.echo(AFTERWARDS)
    if not apply:
        return
    try:
        url = database_url(admin_url) if admin_url else url
        with sa.create_engine(url, **engine_options(settings, url)).begin() as connection:
            if connection.scalar(sa.text("select rolsuper from pg_roles where rolname = :role"), {"role": role}):
                raise click.ClickException(f"{role} is a superuser, whom no limit holds; give the service its own role")
            for statement in statements[""]:
                connection.exec_driver_sql(statement.replace("%", "%%"))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="DATABASE_ADMIN_URL") from None
    except SQLAlchemyError as error:
        said = f"DATABASE_ADMIN_URL has to name a role that may set the limit of {role}: {budget.driver_message(error)}"
        raise click.ClickException(said) from None


def _limits(chosen: sizing.Plan, url: sa.URL, settings: Settings, urls: set[sa.URL]) -> Iterator[str]:
    """Give the role its limits on the server of that URL."""
    role = f"ALTER ROLE {sql.Identifier(str(url.username)).as_string()}"
    yield f"{role} CONNECTION LIMIT {chosen.role_limit}"
    ours = {each.database or url.username for each in urls if each.set(database=None) == url.set(database=None)}
    for name in sorted(map(str, ours)) if settings.db_pooler != "none" else ():
        database = sql.Identifier(name).as_string()
        for limit, milliseconds in time_limits(settings).items():
            yield f"{role} IN DATABASE {database} SET {limit} = {milliseconds}"


@pool.command("version")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show_version(as_json: bool) -> None:
    """Show the library's version and changed files.

    Exits with 1 when a file was changed since the release.
    """
    changed = version.changed()
    how = "installed" if version.installed() == version.HERE.resolve() else "vendored"
    facts = {"version": version.__version__, "unmodified": not changed, "changed": changed, "how": how}
    said = f"changed: {', '.join(changed)}" if changed else "unmodified"
    text = f"flask_pooling {version.__version__}, {said} ({how} in {version.HERE})"
    click.echo(json.dumps(facts | {"folder": str(version.HERE)}) if as_json else text)
    sys.exit(1 if changed else 0)
