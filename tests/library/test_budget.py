"""The plan against a server: what the server says of itself, and what follows."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from flask import Flask
from sqlalchemy.engine import make_url

from flask_pooling import budget
from flask_pooling.budget import Server
from flask_pooling.sizing import Job, plan
from tests.library.conftest import engine_of, start, superuser
from tests.library.plain import NAME
from tests.serving import call, command, free_port, serving, wait_until

PLAN = plan(cpus=2, memory_mib=4096, max_connections=100, instances=2)  # 24 of 87
SERVER = Server(
    max_connections=100,
    kept=3,
    role_limit=-1,
    database_limit=-1,
    obeys=True,
    connected={},
    connected_others=0,
    connected_role=0,
    connected_database=0,
)


@pytest.mark.sqlite  # no database in it: once is enough
@pytest.mark.parametrize(
    ("facts", "usable", "problem"),
    [
        ({}, 87, None),
        ({"max_connections": 37}, 24, None),
        ({"max_connections": 36}, 23, "24 > 23 .max_connections 36"),
        ({"max_connections": 40, "kept": 8}, 22, "24 > 22 .max_connections"),
        ({"kept": 80}, 10, "24 > 10 .max_connections"),
        ({"role_limit": 24}, 24, None),
        ({"role_limit": 23}, 23, "24 > 23 .the role's connection limit"),
        ({"database_limit": 5}, 5, "24 > 5 .the database's connection limit"),
        ({"role_limit": 0}, 0, "24 > 0 .the role's"),
        ({"max_connections": 10}, -3, "24 > -3"),
    ],
)
def test_the_tightest_limit_decides(facts: dict[str, Any], usable: int, problem: str | None) -> None:
    """max_connections less what is kept, the role's limit, the database's limit."""
    verdict = budget.judge(PLAN, replace(SERVER, **facts))
    assert verdict.usable == usable
    assert verdict.holds is (problem is None)
    if problem:
        (told,) = verdict.problems
        assert re.search(problem, told), told


@pytest.mark.sqlite
def test_jobs_are_a_part_of_what_has_to_fit() -> None:
    """With the web workers, and each kind alone."""
    with_jobs = plan(
        cpus=2, memory_mib=4096, max_connections=100, instances=2, jobs={"worker": Job(2, 4), "beat": Job(1, 1)}
    )
    assert budget.judge(with_jobs, SERVER).holds
    assert "+ 9 for jobs = 33 > 32" in budget.judge(with_jobs, replace(SERVER, role_limit=32)).problems[0]
    (told,) = budget.judge(with_jobs, replace(SERVER, connected={"web": 24, "worker": 9, "beat": 1})).warnings
    assert "connections of kind worker: 9" in told
    assert "worker=2x4 in APP_JOBS" in told


def connected(*, elsewhere: int = 0, others: int = 0, **ours: int) -> dict[str, Any]:
    """Connect: ours by kind, the same role in another database, and other roles in the same."""
    return {
        "connected": ours,
        "connected_others": elsewhere + others,
        "connected_role": sum(ours.values()) + elsewhere,
        "connected_database": sum(ours.values()) + others,
    }


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("facts", "warning", "refused"),
    [
        (connected(web=12), None, None),
        # A connection that is left of a dead host; a deploy's overlap that nobody has planned; both and a job.
        (connected(web=13), "13 are open, and the plan has 12 beside the instance that starts", None),
        (connected(web=24), "more processes run than APP_INSTANCES=2 says", None),
        (connected(web=85), "85 are open", None),
        (connected(web=86), None, "86 connections of 97 are open .max_connections 100 - 3 .*this instance may open 12"),
        (connected(web=12, worker=9, cli=3), None, None),
        # Other clients leave too little, or enough.
        (connected(others=73), None, None),
        (connected(others=74), "others have 74 connections open", None),
        (connected(others=85), "others have 85 connections open", None),
        (connected(others=86), None, "86 connections of 97"),
        # The role's limit counts what it has in every database.
        (connected(web=13) | {"role_limit": 29}, "13 are open", None),
        (connected(web=17) | {"role_limit": 29}, "17 are open", None),
        (connected(web=18) | {"role_limit": 29}, None, "18 connections of 29 are open .the role's .* may open 12"),
        (connected(web=12, elsewhere=6) | {"role_limit": 29}, None, "18 connections of 29 are open .the role's"),
        (connected(web=12, others=6) | {"role_limit": 29}, None, None),
        # The database's counts every role.
        (connected(web=12, elsewhere=6) | {"database_limit": 29}, None, None),
        (connected(web=12, others=6) | {"database_limit": 29}, None, "18 connections of 29 are open .the database's"),
    ],
)
def test_a_start_is_refused_only_where_it_cannot_fit(
    facts: dict[str, Any], warning: str | None, refused: str | None
) -> None:
    """Open connections and those that start are compared with each limit. One instance too many, with room, is told."""
    verdict = budget.judge(PLAN, replace(SERVER, **facts), starting=True)
    assert bool(verdict.problems) is bool(refused), verdict.problems
    if refused:
        assert re.search(refused, verdict.problems[0]), verdict.problems
    elif warning:
        assert re.search(warning, verdict.warnings[0]), verdict.warnings
    else:
        assert verdict.holds


@pytest.mark.sqlite
def test_a_rest_of_a_dead_host_does_not_stop_the_only_instance() -> None:
    """APP_INSTANCES=1, one connection left, and 59 free. `flask pool check` tells of an instance too many."""
    alone = plan(cpus=2, memory_mib=4096, max_connections=73, instances=1)
    for left in 1, 12, 58:
        server = replace(SERVER, max_connections=73, **connected(web=left))
        assert not budget.judge(alone, server, starting=True).problems
        assert budget.judge(alone, server).holds is (left <= 12)


@pytest.mark.sqlite
def test_a_limit_of_a_database_is_for_its_own_pools() -> None:
    """With SQLALCHEMY_BINDS half of the connections go to the other one."""
    two = plan(cpus=2, memory_mib=4096, max_connections=100, instances=2, binds=1)  # 24 to each
    assert budget.judge(two, replace(SERVER, database_limit=24)).holds
    assert "48 > 46" in budget.judge(two, replace(SERVER, database_limit=23)).problems[0]
    half = replace(SERVER, database_limit=24, **connected(web=24) | {"connected_database": 12})
    assert budget.judge(two, half, starting=True).holds
    assert budget.judge(two, replace(half, connected_database=13), starting=True).problems


@pytest.mark.sqlite
def test_others_that_are_connected_are_a_warning_not_a_proof() -> None:
    """They may be gone in a minute; but just now the plan does not fit."""
    assert budget.judge(PLAN, replace(SERVER, connected_others=73)).holds
    verdict = budget.judge(PLAN, replace(SERVER, connected_others=74))
    assert not verdict.problems
    (warning,) = verdict.warnings
    assert "others have 74 connections open, more than the 10 reserved: 24 + 74 > 97; close some" in warning


@pytest.mark.sqlite
def test_behind_a_pooler_the_servers_limits_are_the_poolers() -> None:
    """Its clients are ours to count, its server connections are not."""
    pooled = plan(cpus=2, memory_mib=4096, max_connections=100, instances=500, pooler="pgbouncer")
    assert budget.judge(pooled, SERVER).holds
    assert budget.judge(pooled, replace(SERVER, max_connections=10)).problems
    assert budget.judge(pooled, replace(SERVER, connected={"web": 90}, connected_role=90), starting=True).holds
    verdict = budget.judge(pooled, replace(SERVER, role_limit=50))
    assert not verdict.problems
    assert "may open 87 connections, and 50 are usable; set DB_MAX_CONNECTIONS=63" in verdict.warnings[0]


@pytest.mark.postgres
@pytest.mark.direct
def test_the_live_server_is_asked(make_plain: Callable[..., Flask], postgres_url: str) -> None:
    """An ordinary role may read all that is needed, and sees who else is connected, by kind. Another environment on
    the same server has the same names: it has another role or another database."""
    web, job = make_plain(), make_plain(job="worker", APP_JOBS="worker=1x2")
    url = make_url(postgres_url).set(drivername="postgresql+psycopg")
    settings = job.extensions["flask_pooling"].settings
    elsewhere = url.set(drivername="postgresql", database="postgres").render_as_string(hide_password=False)
    another = [
        psycopg.connect(elsewhere, application_name=NAME),
        psycopg.connect(elsewhere, user="postgres", application_name=NAME),
    ]
    with superuser(postgres_url) as admin, engine_of(web).connect(), engine_of(job).connect():
        admin.execute("alter role app connection limit 50")
        try:
            asked = budget.ask(settings.plan, sa.create_engine(url, poolclass=sa.NullPool), NAME)
        finally:
            admin.execute("alter role app connection limit -1")
            for connection in another:
                connection.close()
    assert (asked.max_connections, asked.kept, asked.role_limit) == (100, 3, 50)
    assert (asked.connected["web"], asked.connected["worker"]) == (1, 1)
    assert asked.connected_others >= len(another)
    assert asked.connected_role == 2 + 1  # two here, and one in another database
    assert asked.connected_database == 2 + 1  # two here, and the superuser


@pytest.mark.postgres
@pytest.mark.direct
def test_a_plan_that_the_server_cannot_hold_stops_the_start(environ: dict[str, str]) -> None:
    """Planned for a server of 1000 connections, found one of 100. No traceback."""
    done = command("gunicorn", DB_MAX_CONNECTIONS=1000, APP_INSTANCES=50, PORT=free_port())
    assert done.returncode == 1
    assert "the plan does not fit the database" in done.stderr
    assert "> 87 (max_connections 100" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.postgres
@pytest.mark.direct
@pytest.mark.usefixtures("environ")
@pytest.mark.parametrize(("planned_with", "expected"), [(1000, "ERROR.*the plan does not fit.*> 87"), (100, "fits")])
def test_a_database_that_is_away_at_the_start_is_asked_later(
    own_postgres: str, tmp_path: Path, planned_with: int, expected: str
) -> None:
    """The service starts and warns. When the database is back, a plan that does not fit it is an error in the log."""
    sockets = make_url(own_postgres).query["host"]
    url = own_postgres.replace(str(sockets), str(tmp_path / "later"))
    numbers = {"DB_MAX_CONNECTIONS": planned_with, "APP_INSTANCES": planned_with // 20, "DATABASE_URL": url}
    with serving(tmp_path / "log", **numbers) as server:
        assert "the plan cannot be compared with the database" in server.log.read_text()
        (tmp_path / "later").symlink_to(str(sockets))
        wait_until(lambda: "the database is back" in server.log.read_text())
        (line,) = [line for line in server.log.read_text().splitlines() if "is back" in line]
        assert re.search(expected, line), line
        assert call(server.port, "GET", "/readyz")[0] == 200


@pytest.mark.postgres
@pytest.mark.direct
@pytest.mark.usefixtures("environ")
def test_a_full_server_stops_the_start(own_postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no connection left even to ask."""
    url = make_url(own_postgres).set(drivername="postgresql").render_as_string(hide_password=False)
    held: list[psycopg.Connection[Any]] = []
    try:
        with pytest.raises(psycopg.OperationalError):
            while True:
                held.append(psycopg.connect(url, application_name=f"not-{NAME}"))
        with pytest.raises(SystemExit, match="no connection left"):
            start(monkeypatch, DATABASE_URL=own_postgres, PORT=free_port())
    finally:
        for connection in held:
            connection.close()


@pytest.mark.postgres
@pytest.mark.parametrize(
    ("query", "environ", "says"),
    [
        ("?sslmode=no-verify", {}, "invalid sslmode value"),
        ("?target_session_attrs=master", {}, "invalid target_session_attrs value"),
        ("?channel_binding=yes", {}, "invalid channel_binding value"),
        ("?keepalives_idle=soon", {}, "invalid integer value"),
        ("", {"PGSSLMODE": "no-verify"}, "invalid sslmode value"),
        ("", {"PGPORT": "abc"}, "invalid integer value"),
        ("", {"PGSERVICE": "nowhere", "PGSERVICEFILE": "/dev/null"}, "definition of service"),
    ],
)
@pytest.mark.usefixtures("production")
def test_a_url_that_libpq_cannot_use_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, query: str, environ: dict[str, str], says: str
) -> None:
    """With libpq's own reason. A server that is not there yet is only a warning."""
    url = f"postgresql://somebody@127.0.0.1/x{query}"
    with pytest.raises(SystemExit, match=f"no connection to the database can be made: .*{says}"):
        start(monkeypatch, DATABASE_URL=url, PORT=free_port(), **environ)


@pytest.mark.postgres
@pytest.mark.direct
@pytest.mark.usefixtures("environ")
def test_a_pooler_that_takes_no_options_is_named(
    make_plain: Callable[..., Flask], through_pgbouncer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that refuses them stops the start, one that drops them is a warning, and the remedy of both works. What RDS
    Proxy says leads to it, too."""
    more = {"DATABASE_URL": through_pgbouncer, "WEB_PROBE_PORT": 0, "PORT": free_port()}
    with pytest.raises(SystemExit, match=r"unsupported startup parameter.*set DB_POOLER=pgbouncer"):
        start(monkeypatch, **more)
    with psycopg.connect(through_pgbouncer.rpartition("/")[0] + "/pgbouncer", autocommit=True) as console:
        console.execute("set ignore_startup_parameters = 'options'")
    for pooler, status in {"none": 1, "pgbouncer": 0}.items():
        done = make_plain(web=False, DB_POOLER=pooler, **more).test_cli_runner().invoke(args=["pool", "check"])
        assert done.exit_code == status, done.output
        assert ("set DB_POOLER=pgbouncer" in done.output) is (pooler == "none")
    start(monkeypatch, **more, DB_POOLER="pgbouncer")
    refused = psycopg.OperationalError("RDS Proxy currently doesn\u2019t support command-line options.")
    assert "DB_POOLER=pgbouncer" in budget.driver_message(sa.exc.OperationalError(None, None, refused))
