"""The promise against a server: what it says of itself, and what follows."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url

from app import budget
from app.budget import Server
from app.config import Settings
from app.sizing import plan

PLAN = plan(cpus=2, memory_mib=4096, max_connections=100, instances=2)  # 24 of 87
SERVER = Server(
    max_connections=100,
    superuser_reserved=3,
    role_reserved=0,
    role_limit=-1,
    database_limit=-1,
    connected_ours=0,
    connected_others=0,
)


@pytest.mark.parametrize(
    ("facts", "usable", "problem"),
    [
        ({}, 87, None),
        ({"max_connections": 37}, 24, None),
        ({"max_connections": 36}, 23, "24 > 23 .max_connections 36"),
        ({"max_connections": 40, "role_reserved": 5}, 22, "24 > 22 .max_connections"),
        ({"superuser_reserved": 80}, 10, "24 > 10 .max_connections"),
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


def test_others_that_are_connected_are_a_warning_not_a_proof() -> None:
    """They may be gone in a minute; but just now the promise does not hold."""
    assert budget.judge(PLAN, replace(SERVER, connected_others=73)).holds
    verdict = budget.judge(PLAN, replace(SERVER, connected_others=74))
    assert not verdict.problems
    assert verdict.warnings == ("74 connections of others are open, more than the 10 reserved: 24 + 74 > 97",)


def test_behind_a_pooler_the_servers_limits_are_the_poolers() -> None:
    """Its clients are ours to count, its server connections are not."""
    pooled = plan(cpus=2, memory_mib=4096, max_connections=100, instances=500, pooler="pgbouncer")
    assert budget.judge(pooled, SERVER).holds
    assert budget.judge(pooled, replace(SERVER, max_connections=10)).problems


@contextmanager
def limit(url: str, statement: str, undo: str) -> Iterator[None]:
    engine = sa.create_engine(
        make_url(url).set(drivername="postgresql+psycopg", username="postgres"),
        poolclass=sa.NullPool,
        isolation_level="AUTOCOMMIT",
    )
    with engine.connect() as connection:
        connection.execute(sa.text(statement))
        try:
            yield
        finally:
            connection.execute(sa.text(undo))


@pytest.mark.postgres
@pytest.mark.direct
def test_the_live_server_is_asked(environ: dict[str, str], postgres_url: str) -> None:
    """An ordinary role may read all that is needed, and sees who else is connected."""
    settings = Settings.from_env(environ | {"DB_MAX_CONNECTIONS": "100", "APP_INSTANCES": "2"})
    server = budget.ask(settings)
    assert (server.max_connections, server.superuser_reserved, server.role_limit) == (100, 3, -1)
    with limit(postgres_url, "alter role app connection limit 7", "alter role app connection limit -1"):
        asked = budget.ask(settings)
    assert asked.role_limit == 7
    assert asked.connected_others >= 1
    assert "the role's connection limit" in budget.judge(settings.plan, asked).problems[0]
