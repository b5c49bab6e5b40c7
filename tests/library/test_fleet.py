"""`flask pool fleet` and `python -m flask_pooling fleet`: the sum of all services, as a gate."""

import json
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner
from flask import Flask

from flask_pooling.fleet import fleet
from tests.serving import command

# What was on one server in public: seven services, 120 connections of 100, and three hours of outage.
SEVEN = {"api": 4, "web": 4, "admin": 2, "mail": 2, "search": 2, "billing": 1, "reports": 1}  # instances


def seven(pool_size: int, *more: str) -> str:
    server = "[servers.main]\nmax_connections = 100\n"
    services = [
        f'[services.{name}]\nserver = "main"\ninstances = {n}\npool_size = {pool_size if n > 1 else pool_size // 2}'
        for name, n in SEVEN.items()
    ]
    return "\n".join([server, *services, *more])


def run(tmp_path: Path, text: str, *words: str, **environ: str) -> tuple[int, str]:
    (tmp_path / "services.toml").write_text(text)
    result = CliRunner().invoke(fleet, [str(tmp_path / "services.toml"), *words], env=environ)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


ONE = """
[servers.main]
max_connections = 100
[servers.replica]
max_connections = 50
reserved = 5
[services.web]
server = ["main", "replica"]
instances = 4
workers = 3
pool_size = 3
jobs = { worker = "2x3" }
"""


@pytest.mark.sqlite
class TestFile:
    def test_the_public_case(self, tmp_path: Path) -> None:
        """112 and 8 of 100 do not fit, and it is said what would help; with smaller pools 72 do."""
        code, text = run(tmp_path, seven(8, ""))
        assert code == 1
        assert "120 > 87 usable (100 - 3 for superusers - 10 reserved); what would help: " in text
        assert "servers.main.max_connections=133 or " in text
        code, text = run(
            tmp_path, seven(4, "max_overflow = 2", "[services.cron]", 'server = "main"', "instances = 5\npool_size = 2")
        )
        assert (code, "72 of 87 connections" in text) == (0, True), text

    @pytest.mark.parametrize(
        ("text", "code", "shown"),
        [
            (ONE, 0, "main: 42 of 87 connections"),
            (ONE, 0, "replica: 42 of 42 connections\n  web: 4 instances x 3 workers x (3 + 0) + 2 x 3 of worker = 42"),
            (ONE.replace("= 50", "= 49"), 1, "replica: 42 > 41 usable (49 - 3 for superusers - 5 reserved)"),
            (
                ONE.replace("= 50", "= 49"),
                1,
                "or services.web.instances=3 or services.web.pool_size=2 or servers.replica",
            ),
            (
                ONE.replace("= 50", '= 12\npooler = "pgbouncer"\npoolers = 2'),
                0,
                "42 clients of 2 x pgbouncer, max_db_con",
            ),
            (
                ONE.replace("= 50", '= 9\npooler = "pgbouncer"\npoolers = 2'),
                1,
                "help: servers.replica.max_connections=10",
            ),
        ],
    )
    def test_each_server_has_a_sum(self, tmp_path: Path, text: str, code: int, shown: str) -> None:
        """A replica is a server of its own, and a service on two of them holds a pool to each."""
        assert run(tmp_path, text)[0] == code
        assert shown in run(tmp_path, text)[1]

    def test_what_would_help_helps(self, tmp_path: Path) -> None:
        """Each of them, when it is followed."""
        _, text = run(tmp_path, ONE.replace("= 50", "= 20"))
        for way in text.partition("help: ")[2].split(" or "):
            place, _, value = way.strip().rpartition("=")
            table, _, key = place.rpartition(".")
            lines = [line for line in ONE.replace("= 50", "= 20").split(f"[{table}]\n")[1].splitlines() if line]
            own = "\n".join(line for line in lines[: next((n for n, line in enumerate(lines) if line[0] == "["), 99)])
            changed = "\n".join(
                [*(line for line in own.splitlines() if not line.startswith(f"{key} ")), f"{key} = {value}"]
            )
            assert run(tmp_path, ONE.replace("= 50", "= 20").replace(own, changed))[0] == 0, way

    def test_all_that_is_wrong_is_named_at_once(self, tmp_path: Path) -> None:
        """And the exit is 2."""
        wrong = ONE.replace("workers = 3", "worker = 3").replace("= 50", '= "50"').replace("2x3", "2 x 3")
        code, text = run(tmp_path, wrong + "max_overflow = -1\n[services.other]\nserver = 'main'\ninstances = 1\n")
        assert code == 2
        for said in (
            "services.web.worker: Extra inputs are not permitted",
            "servers.replica.max_connections: Input should be a valid integer",
            "services.web.jobs: Value error, each job is name=COPIESxCONNECTIONS, for example worker=2x4",
            "services.web.max_overflow: Input should be greater than or equal to 0",
            "services.other.pool_size: Field required",
        ):
            assert said in text
        code, text = run(tmp_path, ONE.replace('"replica"]', '"replicas"]'))
        assert (code, "services.web.server: 'replicas' is not one of the servers" in text) == (2, True)
        assert run(tmp_path, "[servers")[0] == 2
        assert CliRunner().invoke(fleet, [str(tmp_path / "none.toml")]).exit_code == 2

    def test_json(self, tmp_path: Path) -> None:
        """For tools."""
        told = json.loads(run(tmp_path, ONE, "--json")[1])
        assert told["servers"]["replica"] == {"usable": 42, "connections": 42, "services": {"web": 42}}
        assert (told["holds"], told["problems"]) == (True, [])

    def test_it_needs_no_app(self, tmp_path: Path, plain: Flask) -> None:
        """As a module, with no settings at all; and as a command of the app."""
        (tmp_path / "services.toml").write_text(ONE)
        none: dict[str, Any] = {"DATABASE_URL": "", "APP_INSTANCES": "x"}
        done = command(Path(sys.executable).name, "-m", "flask_pooling", "fleet", tmp_path / "services.toml", **none)
        assert (done.returncode, "42 of 87 connections" in done.stdout) == (0, True), done.stderr
        result = plain.test_cli_runner().invoke(args=["pool", "fleet", str(tmp_path / "services.toml")])
        assert result.output == done.stdout


@pytest.mark.postgres
@pytest.mark.direct
def test_the_live_server_is_compared(tmp_path: Path, own_postgres: str) -> None:
    """By application_name. The URL comes from the variable that the file names."""
    text = ONE.partition("[servers.replica]")[0] + 'url_env = "MAIN_URL"\n[services.web]\nserver = "main"\n'
    text += "instances = 1\npool_size = 2\n"
    admin = own_postgres.replace("//app@", "//postgres@")
    code, said = run(tmp_path, text, "--check")
    assert (code, "servers.main.url_env='MAIN_URL': has to name a variable with the URL" in said) == (2, True)
    assert run(tmp_path, text, "--check", MAIN_URL=admin)[0] == 0
    held = [psycopg.connect(admin, application_name="web") for _ in range(2)]
    assert run(tmp_path, text, "--check", MAIN_URL=admin)[0] == 0
    held.append(psycopg.connect(admin, application_name="web"))
    code, said = run(tmp_path, text.replace("= 100", "= 90"), "--check", MAIN_URL=admin)
    for connection in held:
        connection.close()
    assert code == 1
    assert "main: 3 connections of 'web', and the file has 2" in said
    assert "main: max_connections is 100 there, and 90 in the file" in said
    away = "postgresql://app:hunter2@127.0.0.1:1/x"
    code, said = run(tmp_path, text, "--check", MAIN_URL=away)
    assert (code, "main cannot be asked" in said, "hunter2" in said) == (2, True, False)
