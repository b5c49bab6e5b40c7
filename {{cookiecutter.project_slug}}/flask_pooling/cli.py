"""`flask pool plan`, `check`, `limit` and `version`: the plan, whether it fits, the server's own limit, the library."""

import json
import sys
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

AFTERWARDS = """
-- Then RECONNECT in the console of each PgBouncer: its connections to the server have the time limits from then on.
-- To undo it: the lines with SET, as RESET and without the value; RECONNECT; and restart the service."""
MEAN_SECONDS = 0.05  # of a request, for an example of Little's law: requests at once = requests a second x seconds each


def register(app: Flask, settings: type[Settings]) -> None:
    """Add `flask pool` to the app. `flask pool plan` works without anything else of this package."""
    app.extensions["pooling_settings"] = settings
    app.cli.add_command(pool)


def _options_for_settings(command: Any) -> Any:
    """Add an option for each number of a plan that comes from a setting, with the limits of that setting."""
    for number, name in reversed(PLANNED_WITH.items()):
        command = click.option(
            f"--{number.replace('_', '-')}",
            metavar="worker=2x4,beat=1x1" if number == "jobs" else "VALUE",
            callback=_as_the_setting,
            help=f"Instead of {name.upper()}.",
        )(command)
    return command


def _as_the_setting(context: click.Context, option: click.Parameter, value: str | None) -> Any:
    field = Settings.model_fields[PLANNED_WITH[str(option.name)]]
    limits: Any = Annotated[field.annotation, field]
    try:
        return None if value is None else TypeAdapter(limits).validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise click.BadParameter(f"{value!r}: {reason}", param=option) from None


@click.group()
def pool() -> None:
    """Workers, threads and database connections: how many, and why."""


pool.add_command(fleet)


@pool.command()
@click.option("--cpus", type=click.FloatRange(min=0.01, max=4096), help="Instead of this machine's.")
@click.option("--memory-mib", type=click.IntRange(min=1), help="Instead of this machine's, in MiB.")
@_options_for_settings
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--for-pgbouncer", is_flag=True, help="Print the sizes for deploy/pgbouncer/pgbouncer.ini.")
@with_appcontext
def plan(as_json: bool, for_pgbouncer: bool, **what_if: Any) -> None:
    """Show the plan for this machine and these settings, or for other numbers.

    Exits with 1 when the numbers do not fit together.
    """
    if what_if["cpus"] != what_if["cpus"]:  # nan, which FloatRange lets pass
        raise click.BadParameter("'nan' is not a number of cpus", param_hint="--cpus")
    try:
        settings: type[Settings] = current_app.extensions["pooling_settings"]
        if for_pgbouncer:
            what_if["pooler"] = "pgbouncer"
        chosen = settings.load(numbers_only=True).plan_if(**what_if)
    except (SettingsError, sizing.PlanError) as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(json.dumps(plan_as_dict(chosen)))
    elif for_pgbouncer:
        click.echo("\n".join(f"{name} = {size}" for name, size in chosen.pooler_sizes.items()))
    else:
        click.echo(_described(chosen))


def _plan_of(settings: Settings) -> sizing.Plan:
    try:
        return settings.plan
    except sizing.PlanError as error:  # of this machine
        raise click.ClickException(str(error)) from None


def plan_as_dict(chosen: sizing.Plan) -> dict[str, Any]:
    """Return the plan's inputs and results, and its one line."""
    of_one, of_all = ("slots", "connections_per_instance"), ("connections_peak", "connections_jobs")
    return asdict(chosen) | {name: getattr(chosen, name) for name in (*of_one, *of_all, "connections_usable", "sum")}


def _described(chosen: sizing.Plan) -> str:
    """Describe the plan for a person: every number with the sum that it came from."""
    by_cpus = sizing.workers_for_cpus(chosen.cpus, chosen.worker_class)
    by_memory = sizing.workers_for_memory(chosen.memory_mib, chosen.worker_memory_mib)
    bounds = f"{by_cpus} by cpus, {by_memory} by memory ({chosen.worker_memory_mib} MiB each)"
    held = sizing.counted(chosen.connections_per_instance, "connection")
    mean, slots = MEAN_SECONDS, chosen.slots
    databases = f" x {1 + chosen.binds} databases" if chosen.binds else ""
    rows = [
        ("machine", f"{chosen.cpus:g} cpu{'' if chosen.cpus == 1 else 's'}, {chosen.memory_mib} MiB"),
        ("workers", f"{chosen.workers} {chosen.worker_class}: at most {bounds}, {sizing.MAX_WORKERS} by cap"),
        ("threads", f"{chosen.threads} a worker: {chosen.workers} x {chosen.threads} = {slots} requests at once"),
        ("capacity", f"{slots / mean:.0f} requests a second if each takes {mean} seconds: {slots} / {mean}"),
        ("pool", f"{chosen.pool_size} + {chosen.max_overflow} overflow a worker"),
        ("one instance", f"{chosen.workers} x {chosen.connections_per_worker} = {held}"),
        ("all instances", chosen.sum),
    ]
    for name, job in chosen.jobs.items():
        connections = sizing.counted(chosen.connections_of(job), "connection")
        rows.append(("job", f"{name}: {job}{databases} = {connections}"))
    return _table([*rows, *(("note", note) for note in chosen.notes)])


def _table(rows: list[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<14} {text}" for name, text in rows)


@pool.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@with_appcontext
def check(as_json: bool) -> None:
    """Ask the live server whether the plan fits.

    Exits with 1 when it does not, and with 2 when the server cannot be asked.
    """
    state = current_app.extensions["flask_pooling"]
    settings, url = state.settings, state.first.url
    if url.get_backend_name() != "postgresql":
        raise click.UsageError("the database is SQLite, which has no connection limit; there is nothing to check")
    chosen = _plan_of(settings)
    try:
        verdict = budget.judge(chosen, budget.ask(settings, state.first, state.name))
    except SQLAlchemyError as error:
        raise click.UsageError(f"the database cannot be asked: {budget.driver_message(error)}") from None
    as_dict = asdict(verdict) | {"holds": verdict.holds}
    click.echo(json.dumps(as_dict) if as_json else _judged(chosen, verdict))
    sys.exit(0 if verdict.holds else 1)


def _judged(chosen: sizing.Plan, verdict: budget.Verdict) -> str:
    server = verdict.server
    connected = "".join(f"{count} {kind}, " for kind, count in server.connected.items())
    rows = [
        ("server", f"max_connections {server.max_connections}, {server.kept} of them reserved by the server"),
        ("role limit", "none" if server.role_limit < 0 else str(server.role_limit)),
        ("database limit", "none" if server.database_limit < 0 else str(server.database_limit)),
        ("connected now", f"{connected}{server.connected_others} of others"),
        ("usable", f"{verdict.usable} after {chosen.reserved} reserved"),
        ("peak", f"{verdict.peak}: {chosen.sum}"),
        *(("problem", problem) for problem in verdict.problems),
        *(("warning", warning) for warning in verdict.warnings),
    ]
    return _table([*rows, ("verdict", verdict.words)])


@pool.command()
@click.option("--apply", is_flag=True, help="Run them as well.")
@click.option("--admin-url", envvar="DATABASE_ADMIN_URL", help="URL of a role that may run it. Default: DATABASE_URL.")
@with_appcontext
def limit(apply: bool, admin_url: str | None) -> None:
    """Print the ALTER ROLE with which the server itself holds the service to its plan.

    Behind PgBouncer, print also those that give the role its time limits in the service's databases. Transactions then
    need not send them.
    """
    state = current_app.extensions["flask_pooling"]
    settings, url = state.settings, state.first.url
    role = url.username
    if url.get_backend_name() != "postgresql" or not role:
        raise click.UsageError("DATABASE_URL has to name a role: postgresql://role@host/name")
    altered = f"ALTER ROLE {sql.Identifier(role).as_string()}"
    statements = [f"{altered} CONNECTION LIMIT {_plan_of(settings).role_limit}"]
    if settings.db_pooler != "none":
        server = url.set(database=None)
        ours = {each.url for each in state.db.engines.values() if each.url.set(database=None) == server}
        statements += [
            f"{altered} IN DATABASE {sql.Identifier(name).as_string()} SET {limit} = {milliseconds}"
            for name in sorted({each.database or role for each in ours})
            for limit, milliseconds in time_limits(settings).items()
        ]
    click.echo(";\n".join(statements) + ";" + (AFTERWARDS if statements[1:] else ""))
    if not apply:
        return
    try:
        url = database_url(admin_url) if admin_url else url
        if url.get_backend_name() != "postgresql":
            raise ValueError("the role is one of a Postgres server: postgresql://admin@host/name")
        with sa.create_engine(url, **engine_options(settings, url)).begin() as connection:
            if connection.scalar(sa.text("select rolsuper from pg_roles where rolname = :role"), {"role": role}):
                raise click.ClickException(f"{role} is a superuser, whom no limit holds; give the service its own role")
            for statement in statements:
                connection.exec_driver_sql(statement.replace("%", "%%"))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="DATABASE_ADMIN_URL") from None
    except SQLAlchemyError as error:
        who = f"DATABASE_ADMIN_URL has to name a superuser, or a role with CREATEROLE and ADMIN on {role}"
        raise click.ClickException(f"the limit cannot be set: {budget.driver_message(error)}\n{who}") from None


@pool.command("version")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show_version(as_json: bool) -> None:
    """Say which version of flask_pooling is used, and whether its files are those of the release.

    Exits with 1 when they are not.
    """
    changed = version.changed()
    how = "installed" if version.installed() == version.HERE.resolve() else "vendored"
    facts = {"version": version.__version__, "unmodified": not changed, "changed": changed, "how": how}
    said = f"changed: {', '.join(changed)}" if changed else "unmodified"
    text = f"flask_pooling {version.__version__}, {said} ({how} in {version.HERE})"
    click.echo(json.dumps(facts | {"folder": str(version.HERE)}) if as_json else text)
    sys.exit(1 if changed else 0)
