"""`flask pool plan` and `flask pool check`: the arithmetic, and the arithmetic against the live server."""

import json
import os
from dataclasses import asdict
from typing import Any

import click
from flask import current_app
from flask.cli import with_appcontext
from sqlalchemy.exc import OperationalError

from app import budget, sizing
from app.config import Settings, SettingsError, plan_from_env

POSITIVE = click.IntRange(min=1)


@click.group()
def pool() -> None:
    """Workers, threads and database connections: how many, and why."""


@pool.command()
@click.option("--cpus", type=click.FloatRange(min=0, min_open=True, max=4096), help="Instead of this machine's.")
@click.option("--memory-mib", type=POSITIVE, help="Instead of this machine's, in MiB.")
@click.option("--max-connections", type=POSITIVE, help="Instead of DB_MAX_CONNECTIONS.")
@click.option("--instances", type=POSITIVE, help="Instead of APP_INSTANCES.")
@click.option("--threads", type=POSITIVE, help="Instead of WEB_THREADS.")
@click.option("--worker-class", type=click.Choice(["gthread", "sync"]), help="Instead of WEB_WORKER_CLASS.")
@click.option("--pooler", type=click.Choice(["none", "pgbouncer"]), help="Instead of DB_POOLER.")
@click.option("--json", "as_json", is_flag=True, help="For a machine to read.")
def plan(as_json: bool, **what_if: Any) -> None:
    """Show the plan for this machine and these settings, or for other numbers.

    Exits with 1 when the numbers do not fit together.
    """
    try:
        fleet = plan_from_env(os.environ, **what_if)
    except (SettingsError, sizing.PlanError) as error:
        raise click.ClickException(str(error)) from None
    if as_json:
        click.echo(json.dumps(plan_as_dict(fleet)))
        return
    click.echo(describe(fleet))


def plan_as_dict(fleet: sizing.Plan) -> dict[str, Any]:
    names = ("cpus", "memory_mib", "workers", "threads", "pool_size", "max_overflow")
    connections = ("connections_per_instance", "connections_peak", "connections_usable")
    return {name: getattr(fleet, name) for name in (*names, *connections)} | {"notes": list(fleet.notes)}


def describe(fleet: sizing.Plan) -> str:
    """The plan for a person: every number with the sum that it came from."""
    by_cpus = sizing.workers_for_cpus(fleet.cpus, fleet.worker_class)
    by_memory = sizing.workers_for_memory(fleet.memory_mib, fleet.worker_memory_mib)
    bounds = (
        f"{by_cpus} by cpus, {by_memory} by memory ({fleet.worker_memory_mib} MiB each), {sizing.MAX_WORKERS} by cap"
    )
    rows = [
        ("machine", f"{fleet.cpus:g} cpus, {fleet.memory_mib} MiB"),
        ("workers", f"{fleet.workers} {fleet.worker_class}: at most {bounds}"),
        ("threads", f"{fleet.threads} a worker: {fleet.workers} x {fleet.threads} = {fleet.slots} requests at once"),
        ("pool", f"{fleet.pool_size} + {fleet.max_overflow} overflow a worker"),
        (
            "one instance",
            f"{fleet.workers} x {fleet.connections_per_worker} = {fleet.connections_per_instance} connections",
        ),
        ("all instances", fleet.sum),
        *(("note", note) for note in fleet.notes),
    ]
    return "\n".join(f"{name:<14} {text}" for name, text in rows)


@pool.command()
@click.option("--json", "as_json", is_flag=True, help="For a machine to read.")
@with_appcontext
def check(as_json: bool) -> None:
    """Ask the live server whether the plan fits.

    Exits with 1 when it does not, and with 2 when the server cannot be asked.
    """
    settings: Settings = current_app.extensions["settings"]
    if not settings.on_postgres:
        raise click.UsageError("DATABASE_URL is SQLite, which has no connection limit; there is nothing to check.")
    try:
        verdict = budget.judge(settings.plan, budget.ask(settings))
    except OperationalError as error:
        raise click.UsageError(f"the database cannot be asked: {str(error.orig).strip()}") from None
    if as_json:
        click.echo(json.dumps(asdict(verdict) | {"holds": verdict.holds}))
    else:
        click.echo(describe_verdict(settings.plan, verdict))
    if not verdict.holds:
        raise SystemExit(1)


def describe_verdict(fleet: sizing.Plan, verdict: budget.Verdict) -> str:
    server = verdict.server
    rows = [
        ("server", f"max_connections {server.max_connections}, {server.max_connections - server.slots} of them kept"),
        ("role limit", "none" if server.role_limit < 0 else str(server.role_limit)),
        ("database limit", "none" if server.database_limit < 0 else str(server.database_limit)),
        ("connected now", f"{server.connected_ours} of ours, {server.connected_others} of others"),
        ("usable", f"{verdict.usable} after {fleet.reserved} reserved"),
        ("peak", f"{verdict.peak}: {fleet.sum}"),
        *(("problem", problem) for problem in verdict.problems),
        *(("warning", warning) for warning in verdict.warnings),
        ("verdict", "the plan fits" if verdict.holds else "the plan does not fit"),
    ]
    return "\n".join(f"{name:<14} {text}" for name, text in rows)
