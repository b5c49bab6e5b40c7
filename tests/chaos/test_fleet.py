"""Fifty copies on one server: the sum holds, and where it cannot, the plan says when a pooler is needed, how large."""

import json
import secrets
import subprocess

import pytest

from chaos.harness import CLEAN, HERE, ROLE, Clusters, Project, Result, record

COPIES = 50
SECRET = secrets.token_hex(32)


def planned(project: Project, **env: object) -> "subprocess.CompletedProcess[str]":
    return project.run(
        "flask", "pool", "plan", "--json", "--cpus=2", "--memory-mib=2048", f"--instances={COPIES}",
        env={name: str(value) for name, value in env.items()},
    )  # fmt: skip


def test_fleet(baked: Project, server: Clusters, long: bool) -> None:
    """Each copy is one small process that holds all the connections its plan allows, as if every slot were busy."""
    connections = 700 if long else 150
    plan = json.loads(planned(baked, DB_MAX_CONNECTIONS=connections).stdout)
    result = Result(
        "50 copies on one server", f"max_connections={connections}, every connection of every copy open",
        "open = the sum <= usable; one more copy's migrations and psql still get in",
    )  # fmt: skip
    with server(connections) as postgres:
        holding = subprocess.Popen(
            [baked.venv / "bin" / "python", HERE / "service" / "fleet.py", str(COPIES),
             str(plan["connections_per_instance"])],
            cwd=baked.folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            env={**CLEAN, "PYTHONPATH": str(baked.folder), "APP_ENV": "production", "SECRET_KEY": SECRET,
                 "DATABASE_URL": postgres.url(), "DB_MAX_CONNECTIONS": str(connections), "APP_INSTANCES": str(COPIES),
                 "WEB_CONCURRENCY": str(plan["workers"]), "WEB_THREADS": str(plan["threads"])},
        )  # fmt: skip
        try:
            assert holding.stdout
            failed = int(holding.stdout.readline())
            peak = postgres.ask("select count(*) from pg_stat_activity where usename = %s", ROLE)[0][0]
            others = sum(
                baked.run("flask", "pool", "check", env={"DATABASE_URL": postgres.url(), "SECRET_KEY": SECRET,
                          "APP_INSTANCES": str(COPIES), "DB_MAX_CONNECTIONS": str(connections)}).returncode
                for _ in range(2)
            )  # fmt: skip
        finally:
            holding.communicate("stop", timeout=60)
    result.counted = {"plan": f"{COPIES} x {plan['workers']} x {plan['threads']}", "open": peak, "failed": failed,
                      "sum": plan["connections_peak"], "usable": plan["connections_usable"],
                      "others refused": others}  # fmt: skip
    result.expect(peak == plan["connections_peak"] <= plan["connections_usable"], f"{peak} open")
    result.expect(failed == 0, f"{failed} connections failed")
    result.expect(others == 0, "flask pool check did not get in, or said no")
    assert not record(result).missed


def test_too_many(baked: Project) -> None:
    """With the usual 100 connections fifty copies do not fit."""
    result = Result(
        "50 copies, max_connections=100", "arithmetic", "refused with the sum and the ways out; a pooler is sized"
    )
    refused = planned(baked, DB_MAX_CONNECTIONS=100)
    text = refused.stderr + refused.stdout
    pooled = planned(baked, DB_MAX_CONNECTIONS=100, DB_POOLER="pgbouncer")
    plan = json.loads(pooled.stdout) if pooled.returncode == 0 else {"notes": [""], "connections_peak": 0}
    notes = " ".join(plan["notes"])
    result.counted = {"said": text.strip().splitlines()[-1][:160], "with a pooler": notes}
    result.expect(refused.returncode != 0, "it was not refused")
    result.expect(
        all(word in text for word in ("= 100 > 87", "DB_MAX_CONNECTIONS=", "DB_POOLER=pgbouncer")), text[-300:]
    )
    result.expect(f"max_client_conn to at least {-(-plan['connections_peak'] * 12 // 10)}" in notes, notes)
    result.expect("default_pool_size" in notes, notes)
    assert not record(result).missed


@pytest.mark.long
def test_sabotage(baked: Project, server: Clusters) -> None:
    """The same fifty copies with Flask-SQLAlchemy's 5 + 10 for each worker."""
    result = Result("50 copies on one server", "max_connections=150, 5 + 10 each", "no connection fails")
    with server(150) as postgres:
        holding = subprocess.Popen(
            [baked.venv / "bin" / "python", HERE / "service" / "fleet.py", str(COPIES), "15"],
            cwd=baked.folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True,
            env={**CLEAN, "PYTHONPATH": str(baked.folder), "APP_ENV": "production", "SECRET_KEY": SECRET,
                 "DATABASE_URL": postgres.url(), "DB_MAX_CONNECTIONS": "2000", "APP_INSTANCES": str(COPIES)},
        )  # fmt: skip
        try:
            assert holding.stdout
            failed = int(holding.stdout.readline())
        finally:
            holding.communicate("stop", timeout=60)
    result.counted = {"failed": failed}
    result.expect(failed == 0, f"{failed} connections failed")
    assert record(result, sabotaged="the plan").missed
