"""Several kinds of process: each has its share, and the server is told of the most that all of them may have."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from flask import Flask
from psycopg import sql

from flask_pooling import SettingsError, machine, plan, run
from tests.library.conftest import engine_of, load, superuser
from tests.library.plain import NAME, db
from tests.library.test_run import messages

JOBS = "worker=2x4,beat=1x1"
# Of two instances that have one worker with two threads each: 4 for the web, 9 for jobs, and half of 10 reserved.
SMALL = {"WEB_CONCURRENCY": 1, "WEB_THREADS": 2, "APP_INSTANCES": 2}
LIMIT = 4 + 9 + 5

on_postgres = pytest.mark.postgres


def connected(url: str) -> dict[str, int]:
    with superuser(url) as connection:
        rows = connection.execute("select application_name from pg_stat_activity where usename = 'app'").fetchall()
    return {name: rows.count((name,)) for (name,) in rows}


@contextmanager
def open_connections(url: str, kind: str, count: int) -> Iterator[None]:
    with ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(psycopg.connect(url, application_name=f"{NAME}/{kind}" if kind else NAME))
        yield


# --- the process -----------------------------------------------------------------------------------------------------


@on_postgres
@pytest.mark.direct
@pytest.mark.parametrize(("job", "connections"), [("worker", 4), ("beat", 1)])
def test_a_job_has_its_share(make_plain: Callable[..., Flask], job: str, connections: int) -> None:
    """A pool of that size, under its own name, without the limits of a web worker."""
    engine = engine_of(make_plain(job=job, APP_JOBS=JOBS))
    assert isinstance(engine.pool, sa.QueuePool)
    assert (engine.pool.size(), engine.pool._max_overflow) == (connections, 0)
    with engine.connect() as connection:
        for name, value in (("application_name", f"{NAME}/{job}"), ("statement_timeout", "0"), ("lock_timeout", "0")):
            assert connection.scalar(sa.text(f"show {name}")) == value


def test_an_unknown_job_is_refused(make_plain: Callable[..., Flask], make_app: Callable[..., Flask]) -> None:
    """The code or APP_JOB may name it: either way, nobody would have counted its pool."""
    for make in (make_plain, make_app):
        with pytest.raises(SettingsError, match=r"'wroker'.* APP_JOBS"):
            make(job="wroker")


@pytest.mark.parametrize("jobs", ["worker", "worker=2", "worker=0x4", "worker=2x0", "web=1x1", "a=1x1,a=1x1"])
def test_jobs_that_cannot_be_read_are_refused(make_plain: Callable[..., Flask], jobs: str) -> None:
    with pytest.raises(SettingsError, match="APP_JOBS"):
        make_plain(APP_JOBS=jobs)


@on_postgres
@pytest.mark.direct
def test_each_child_of_a_fork_is_a_process_of_its_own(make_plain: Callable[..., Flask], own_postgres: str) -> None:
    """A parent that forks four children, each with a connection, is counted as worker=5x1: a child never uses its
    parent's connection, and none has more than its share."""
    engine = engine_of(make_plain(job="worker", APP_JOBS="worker=5x1", DATABASE_URL=own_postgres))
    with engine.connect() as connection:
        parents = connection.scalar(sa.text("select pg_backend_pid()"))
    ready, done = os.pipe(), os.pipe()
    children = []
    for _ in range(4):
        if (child := os.fork()) == 0:
            with engine.connect() as connection:
                fresh = connection.scalar(sa.text("select pg_backend_pid()")) != parents
                os.write(ready[1], b"y" if fresh else b"n")
                os.read(done[0], 1)
            os._exit(0)
        children.append(child)
    assert b"".join(os.read(ready[0], 1) for _ in children) == b"yyyy"
    assert connected(own_postgres)[f"{NAME}/worker"] == 5
    os.write(done[1], b"....")
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    with engine.connect() as connection:
        assert connection.scalar(sa.text("select pg_backend_pid()")) == parents


# --- the plan --------------------------------------------------------------------------------------------------------


def test_the_plan_has_a_row_for_each_kind(make_plain: Callable[..., Flask]) -> None:
    """And all of them are in the sum."""
    runner = make_plain().test_cli_runner()
    text = runner.invoke(args=["pool", "plan"], env={"APP_JOBS": JOBS}).output
    assert "worker: 2 x 4 = 8 connections" in text
    assert "beat: 1 x 1 = 1 connection\n" in text
    assert "of 78 connections (100 - 3 for superusers - 10 reserved - 9 for jobs)" in text
    shown = json.loads(runner.invoke(args=["pool", "plan", "--json", "--jobs", "cron=3x2"]).output)
    assert shown["jobs"] == {"cron": {"copies": 3, "connections": 2}}
    assert shown["connections_usable"] == 81


def test_pgbouncers_sizes(make_plain: Callable[..., Flask]) -> None:
    """All clients of the service may connect to it, jobs too; it may connect to the server as often as is usable."""
    environ = {"APP_JOBS": JOBS} | {name: str(value) for name, value in SMALL.items()}
    result = make_plain().test_cli_runner().invoke(args=["pool", "plan", "--for-pgbouncer"], env=environ)
    assert result.output == "max_client_conn = 23\nmax_db_connections = 87\ndefault_pool_size = 20\n"
    with_binds = replace(plan(cpus=2, memory_mib=4096, max_connections=100, instances=2), binds=5)
    assert with_binds.pooler_sizes["max_db_connections"] == 14  # of each of six databases
    assert with_binds.pooler_sizes["default_pool_size"] == 14


def test_a_job_has_a_pool_for_each_database(make_plain: Callable[..., Flask]) -> None:
    """Each has the job's share, and the plan counts them all."""
    environ = {"APP_JOBS": "worker=2x4", "DB_BINDS": "1"}
    text = make_plain().test_cli_runner().invoke(args=["pool", "plan"], env=environ).output
    assert "worker: 2 x 4 x 2 databases = 16 connections" in text
    assert "- 16 for jobs)" in text


def test_little_memory_is_enough_for_what_serves_no_requests(
    make_plain: Callable[..., Flask], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job or a migration in a small container. The web service does not start there, and says so in one line."""
    monkeypatch.setattr(machine, "memory_mib", lambda: 128)
    for more in ({"web": False}, {"job": "worker", "APP_JOBS": "worker=1x1"}):
        app = make_plain(**more)
    told = app.test_cli_runner().invoke(args=["pool", "plan"])
    assert (told.exit_code, told.output.count("\n")) == (1, 1)
    with pytest.raises(SystemExit, match=r"^128 MiB x 0.8 - 64 for the master holds fewer than 1 worker of 150 MiB"):
        load(monkeypatch)


# --- the server ------------------------------------------------------------------------------------------------------


@on_postgres
@pytest.mark.direct
def test_check_counts_each_kind(make_plain: Callable[..., Flask], own_postgres: str) -> None:
    """One more of a kind than the plan has is a warning that names the kind, though the server has connections left."""
    runner = make_plain(web=False, APP_JOBS=JOBS, DATABASE_URL=own_postgres).test_cli_runner()
    with open_connections(own_postgres, "beat", 1), open_connections(own_postgres, "worker", 8):
        result = runner.invoke(args=["pool", "check"])
        assert result.exit_code == 0, result.output
        assert "8 worker, 1 beat" in result.output
        with open_connections(own_postgres, "beat", 1):
            result = runner.invoke(args=["pool", "check"])
    assert result.exit_code == 1
    assert "connections of kind beat: 2 are open, and the plan has 1: more processes run than beat=1x1" in result.output


@pytest.fixture
def role(own_postgres: str) -> Iterator[str]:
    """The URL of a role whose name has to be quoted."""
    name = 'odd "role" %s'
    with superuser(own_postgres) as connection:
        connection.execute(sql.SQL("create role {} login").format(sql.Identifier(name)))
        yield own_postgres.replace("//app@", "//odd%20%22role%22%20%25s@")
        connection.execute(sql.SQL("drop role {}").format(sql.Identifier(name)))


def limit_of(url: str, role: str = 'odd "role" %s') -> Any:
    with superuser(url) as connection:
        return connection.execute("select rolconnlimit from pg_roles where rolname = %s", [role]).fetchone()


@on_postgres
@pytest.mark.direct
def test_the_limit_of_the_role(make_plain: Callable[..., Flask], own_postgres: str, role: str) -> None:
    """It is printed as SQL, and set by somebody who may set it. Then the server refuses what goes beyond it."""
    runner = make_plain(web=False, APP_JOBS=JOBS, DATABASE_URL=role, **SMALL).test_cli_runner()
    printed = runner.invoke(args=["pool", "limit"])
    assert printed.output == f'ALTER ROLE "odd ""role"" %s" CONNECTION LIMIT {LIMIT};\n'
    assert limit_of(own_postgres) == (-1,)

    refused = runner.invoke(args=["pool", "limit", "--apply"])
    assert refused.exit_code == 1
    assert "permission denied" in refused.output
    assert "DATABASE_ADMIN_URL has to name a role that may set the limit of odd" in refused.output

    admin = own_postgres.replace("//app@", "//postgres@")
    applied = runner.invoke(args=["pool", "limit", "--apply"], env={"DATABASE_ADMIN_URL": admin})
    assert applied.exit_code == 0, applied.output
    assert limit_of(own_postgres) == (LIMIT,)
    with ExitStack() as stack:
        for _ in range(LIMIT):
            stack.enter_context(psycopg.connect(role))
        with pytest.raises(psycopg.OperationalError, match="too many connections for role"):
            psycopg.connect(role)


@on_postgres
@pytest.mark.direct
def test_behind_pgbouncer_the_role_has_the_time_limits(
    make_plain: Callable[..., Flask], own_postgres: str, through_pgbouncer: str, tmp_path: Path
) -> None:
    """`run` is one round trip then and a session's read is three, as without it. A job lifts them for itself."""
    admin, console = own_postgres.replace("//app@", "//postgres@"), through_pgbouncer.rpartition("/")[0] + "/pgbouncer"
    show, statement = sa.text("show statement_timeout"), sa.text("select 1")
    pooled = {"DATABASE_URL": through_pgbouncer, "DB_POOLER": "pgbouncer", "DB_STATEMENT_TIMEOUT": 7}

    def sent_by(app: Flask) -> tuple[int, int]:
        """Return what `run` sends, and what a session's read sends."""
        with app.app_context():
            run(statement)  # the first one opens a connection
            with messages(engine_of(app), tmp_path / "run") as by_run:
                run(statement)
            with messages(engine_of(app), tmp_path / "session") as by_session:
                db.session.scalar(statement)
                db.session.rollback()
        return len(by_run), len(by_session)

    def limits_of(app: Flask) -> tuple[str, str]:
        with app.app_context():
            limits = run(show)[0][0], db.session.scalar(show)
            db.session.rollback()
        return limits

    def reconnect() -> None:
        with psycopg.connect(console, autocommit=True) as connection:
            connection.pgconn.exec_(b"RECONNECT")

    jobs = {"APP_JOBS": "worker=1x2", "job": "worker"}
    assert sent_by(before := make_plain(**pooled)) == (4, 4)
    assert limits_of(before) == ("7s", "7s")
    assert sent_by(make_plain(**pooled, **jobs)) == (1, 3)

    runner = make_plain(web=False, **pooled).test_cli_runner()
    applied = runner.invoke(args=["pool", "limit", "--apply"], env={"DATABASE_ADMIN_URL": admin})
    assert 'ALTER ROLE "app" IN DATABASE "test" SET statement_timeout = 7000;\n' in applied.output
    assert "RECONNECT" in applied.output
    try:
        reconnect()
        assert sent_by(after := make_plain(**pooled)) == (1, 3)
        assert limits_of(after) == ("7s", "7s")
        assert limits_of(make_plain(**pooled, **jobs)) == ("0", "0")
        assert limits_of(make_plain(web=False, **pooled)) == ("0", "0")
        # The service asks for other limits than the role has.
        other = make_plain(**pooled | {"DB_STATEMENT_TIMEOUT": 9})
        assert (sent_by(other), limits_of(other)) == ((4, 4), ("9s", "9s"))
    finally:
        with superuser(own_postgres) as connection:
            connection.execute("alter role app connection limit -1")
            for line in applied.output.splitlines():  # as it says itself
                if " SET " in line and line.startswith("ALTER"):
                    connection.execute(line.replace(" SET ", " RESET ").partition(" =")[0])
    reconnect()
    assert sent_by(again := make_plain(**pooled)) == (4, 4)
    assert limits_of(again) == ("7s", "7s")


@on_postgres
@pytest.mark.direct
def test_a_superuser_cannot_be_limited(make_plain: Callable[..., Flask], own_postgres: str) -> None:
    """The server would take the limit, and ignore it."""
    url = own_postgres.replace("//app@", "//postgres@")
    result = make_plain(web=False, DATABASE_URL=url).test_cli_runner().invoke(args=["pool", "limit", "--apply"])
    assert result.exit_code == 1
    assert "postgres is a superuser, whom no limit holds" in result.output
    assert limit_of(own_postgres, "postgres") == (-1,)


@pytest.mark.sqlite
def test_sqlite_has_no_roles(make_plain: Callable[..., Flask]) -> None:
    result = make_plain(web=False).test_cli_runner().invoke(args=["pool", "limit"])
    assert result.exit_code == 2
    assert "each URL of a database has to name a role" in result.output
