"""A bind on another server counts against that server: DB_BIND_SERVERS, with two real ones."""

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from flask import Flask

from flask_pooling import SettingsError
from scripts import postgres
from tests.library.conftest import engine_of
from tests.serving import command, free_port, serving

REAL = 30  # connections of the second server, of which 17 are usable
WHAT_IF = ["--cpus", "2", "--memory-mib", "4096", "--max-connections", "100", "--instances", "2"]
APP = """
import os

import flask_pooling
from flask import Flask
from flask_sqlalchemy import SQLAlchemy

app, db = Flask("two"), SQLAlchemy()
app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"]
app.config["SQLALCHEMY_BINDS"] = {"reports": os.environ["REPORTS_URL"]}
flask_pooling.init_app(app, db)
"""
GUNICORN = """
from flask_pooling.gunicorn import configure

configure(globals(), "two:app")
"""


@pytest.fixture(scope="module")
def reports() -> Iterator[str]:
    """The URL of a database on a smaller server."""
    with (
        tempfile.TemporaryDirectory() as folder,
        postgres.running(Path(folder) / "data", "reports", max_connections=REAL, settings={"fsync": "off"}) as url,
    ):
        yield url


def run(app: Flask, *words: str) -> tuple[int, str]:
    result = app.test_cli_runner().invoke(args=["pool", *words])
    return result.exit_code, result.output


@pytest.mark.postgres
@pytest.mark.direct
def test_each_server_has_a_line(make_plain: Callable[..., Flask], own_postgres: str, reports: str) -> None:
    """`plan`, `check` and `limit` name each, and `check` asks each what it has, and who is connected there."""
    of_two = {"DB_BIND_SERVERS": f"reports={REAL}", "WEB_CONCURRENCY": 2, "WEB_THREADS": 4}
    app = make_plain(binds={"reports": reports}, DATABASE_URL=own_postgres, **of_two)
    words = [*WHAT_IF, "--bind-servers", f"reports={REAL}"]
    shown = run(app, "plan", *words)[1].splitlines()
    assert "all instances  2 instances x 2 workers x (4 + 0) = 16 of 87 connections" in shown[-3]
    assert shown[-2].startswith("on reports     2 instances x 2 workers x (4 + 0) = 16 of 17 connections (30 - 3 for")
    assert shown[-1].startswith("note           shrunk by the server of reports from 3 x 4: ")
    told = json.loads(run(app, "plan", "--json", *words)[1])
    assert told["bind_servers"] == {"reports": {"max_connections": 30, "reserved": 10}}
    assert (told["connections_peak"], told["connections_usable"]) == (16, 87)
    assert {name: told["servers"]["reports"][name] for name in ("connections_peak", "connections_usable")} == {
        "connections_peak": 16,
        "connections_usable": 17,
    }
    with engine_of(app, "reports").connect():
        code, said = run(app, "check")
    assert code == 0, said
    of_reports = said.partition("the server of reports: max_connections 30, 3 reserved by the server")[2]
    assert "1 web" in of_reports
    assert "peak           16: 2 instances" in of_reports
    told = json.loads(run(app, "check", "--json")[1])
    assert (told["server"]["max_connections"], told["holds"]) == (100, True)
    assert (told["servers"]["reports"]["server"]["max_connections"], told["servers"]["reports"]["usable"]) == (30, 17)
    first, other = run(app, "limit")[1].split("-- On the server of reports:\n")
    assert first == other == 'ALTER ROLE "app" CONNECTION LIMIT 21;\n'

    # One that is smaller than planned, and one that is away.
    app = make_plain(
        binds={"reports": reports},
        DATABASE_URL=own_postgres,
        **of_two | {"DB_BIND_SERVERS": "reports=100", "APP_INSTANCES": 3},
    )
    code, said = run(app, "check")
    assert code == 1
    assert "the server of reports: 3 instances x 2 workers x (4 + 0) = 24 > 17 (max_connections 30 - 3 kept" in said
    assert "or set DB_BIND_SERVERS=reports=30:10 to plan with it" in said
    assert json.loads(run(app, "check", "--json")[1])["holds"] is False
    away = {"reports": "postgresql://app:hunter2@127.0.0.1:1/reports"}
    code, said = run(make_plain(binds=away, DATABASE_URL=own_postgres, **of_two), "check")
    assert (code, "the server of reports: the database cannot be asked" in said, "hunter2" in said) == (2, True, False)


@pytest.mark.postgres
@pytest.mark.direct
@pytest.mark.usefixtures("environ")
def test_gunicorn_asks_each_server(own_postgres: str, reports: str, tmp_path: Path) -> None:
    """A plan that another server cannot hold stops the start, and a server that is away is a warning."""
    (tmp_path / "two.py").write_text(APP)
    (tmp_path / "gunicorn.conf.py").write_text(GUNICORN)
    where = "--chdir", tmp_path, "--config", tmp_path / "gunicorn.conf.py"
    numbers = {"DATABASE_URL": own_postgres, "REPORTS_URL": reports, "DB_BINDS": 0, "WEB_CONCURRENCY": 2}
    numbers |= {"WEB_THREADS": 4, "APP_INSTANCES": 2}
    refused = command(
        "gunicorn", *where, **numbers | {"APP_INSTANCES": 3}, DB_BIND_SERVERS="reports=90", PORT=free_port()
    )
    assert refused.returncode == 1
    assert "the plan does not fit the database:\nthe server of reports: 3 instances x 2 workers" in refused.stderr
    with serving(tmp_path / "log", *where, **numbers, DB_BIND_SERVERS=f"reports={REAL}") as server:
        assert "cannot be asked" not in server.log.read_text()
    numbers["REPORTS_URL"] = "postgresql://app@127.0.0.1:1/reports"
    with serving(tmp_path / "log", *where, **numbers, DB_BIND_SERVERS=f"reports={REAL}") as server:
        assert "cannot be compared with the database: the server of reports: " in server.log.read_text()


def test_what_is_named_has_to_be_there(make_plain: Callable[..., Flask], other_database: str) -> None:
    """A bind is counted by DB_BINDS, or on its own server. One that is not in SQLALCHEMY_BINDS is refused by name where
    connections are kept."""
    both = {"DB_BIND_SERVERS": "other+archive=60", "APP_JOBS": "worker=1x1", "DB_BINDS": 0}
    for more in ({}, {"job": "worker"}):
        with pytest.raises(SettingsError, match="DB_BIND_SERVERS: 'archive' is not in SQLALCHEMY_BINDS; leave it out"):
            make_plain(binds={"other": other_database}, **both, **more)
    assert make_plain(binds={"other": other_database}, web=False, **both)
    app = make_plain(binds={"other": other_database}, **both | {"DB_BIND_SERVERS": "other=60"})
    assert app.extensions["flask_pooling"].settings.plan.servers["other"].connections_usable == 46
