"""Servers, sockets and platforms as people have them, each with the real thing."""

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import sqlalchemy as sa
from flask import Flask
from psycopg import sql
from sqlalchemy.engine import make_url

from scripts import postgres
from tests import serving as run
from tests.library.conftest import engine_of, superuser
from tests.library.plain import db
from tests.serving import free_port, serving

pytestmark = [pytest.mark.postgres, pytest.mark.direct]
MakePlain = Callable[..., Flask]
PID = sa.text("select pg_backend_pid()")


@pytest.fixture(autouse=True)
def on_our_own(environ: dict[str, str], own_postgres: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """These change the server, so it is never one that somebody named in TEST_DATABASE_URL."""
    monkeypatch.setenv("DATABASE_URL", own_postgres)


# --- a database that takes no writes ---------------------------------------------------------------------------------


@contextlib.contextmanager
def takes_no_writes(url: str) -> Iterator[None]:
    """Refuse writes, as providers do when the disk is full."""
    name = make_url(url).database
    with superuser(url) as admin:
        admin.execute(f'alter database "{name}" set default_transaction_read_only = on'.encode())
        try:
            yield
        finally:
            admin.execute(f'alter database "{name}" reset default_transaction_read_only'.encode())


def test_a_database_that_takes_no_writes_is_read(plain: Flask, own_postgres: str) -> None:
    """A write is 503 with the reason; once writes are taken again they succeed, on the same server process."""
    client = plain.test_client()
    assert client.post("/items", data="before").status_code == 201
    with takes_no_writes(own_postgres):
        engine_of(plain).dispose()
        for _ in range(2):
            assert client.get("/readyz").status_code == 200
            with plain.app_context(), pytest.raises(sa.exc.InternalError, match="read-only") as caught:
                db.session.execute(sa.text("insert into items (name) values ('x')"))
            assert caught.value.connection_invalidated
            assert client.get("/items").json == ["before"]
        assert plain.test_cli_runner().invoke(args=["pool", "check"]).exit_code == 0
    with pytest.raises(sa.exc.InternalError):  # on the connection that is left from before
        client.post("/items", data="after")
    assert client.post("/items", data="after").status_code == 201


def test_a_write_there_does_not_disturb_readers(make_plain: MakePlain, own_postgres: str) -> None:
    """Only the connection of the write is replaced."""
    engine = engine_of(make_plain())
    with takes_no_writes(own_postgres):
        with engine.connect() as reader, engine.connect() as writer:
            pids = reader.scalar(PID), writer.scalar(PID)
            with pytest.raises(sa.exc.InternalError):
                writer.execute(sa.text("create table x ()"))
        with engine.connect() as one, engine.connect() as two:
            assert len({one.scalar(PID), two.scalar(PID)} & set(pids)) == 1


def test_a_server_that_takes_writes_is_preferred(make_plain: MakePlain, own_postgres: str, tmp_path: Path) -> None:
    """Whatever the order of the hosts. This is the second way in which an old primary is left."""
    with postgres.running(tmp_path / "data", "test", settings={"fsync": "off"}) as other, takes_no_writes(own_postgres):
        hosts = [str(make_url(url).query["host"]) for url in (own_postgres, other)]
        for both in (hosts, hosts[::-1]):
            url = f"postgresql://app@/test?host={','.join(both)}"
            with engine_of(make_plain(DATABASE_URL=url)).connect() as connection:
                assert connection.scalar(sa.text("show transaction_read_only")) == "off"


def test_an_app_that_reads_only_by_its_own_wish_keeps_its_connection(make_plain: MakePlain) -> None:
    """A write in its read-only transaction is its own mistake: neither a disconnect nor a 503."""
    engine = engine_of(make_plain())
    with engine.connect().execution_options(postgresql_readonly=True) as connection:
        before = connection.scalar(PID)
        with pytest.raises(sa.exc.InternalError, match="read-only") as caught:
            connection.execute(sa.text("create table x ()"))
        assert not caught.value.connection_invalidated
    with engine.connect() as connection:
        assert connection.scalar(PID) == before


def test_passwords_may_be_fetched_for_each_connection(make_plain: MakePlain) -> None:
    """As SQLAlchemy's manual does it, with a listener for do_connect."""
    app, asked = make_plain(), []
    sa.event.listen(engine_of(app), "do_connect", lambda dialect, record, args, parameters: asked.append(parameters))
    with engine_of(app).connect() as connection:
        assert connection.scalar(sa.select(1)) == 1
    assert [parameters["target_session_attrs"] for parameters in asked] == ["primary"]


# --- who is who ------------------------------------------------------------------------------------------------------


def test_a_name_of_the_owners_is_counted_as_ours(make_plain: MakePlain, own_postgres: str) -> None:
    """And is what the server's list shows."""
    url = make_url(own_postgres).update_query_dict({"application_name": "mine"})
    named = url.render_as_string(hide_password=False)
    app = make_plain(DATABASE_URL=named)
    with engine_of(app).connect() as connection:
        assert connection.scalar(sa.text("show application_name")) == "mine"
        done = app.test_cli_runner().invoke(args=["pool", "check"])
    assert "connected now  1 web" in done.output


def test_a_socket_in_the_place_of_the_host(make_plain: MakePlain, own_postgres: str) -> None:
    """Both of libpq's spellings lead to the server, with a port and without."""
    url = make_url(own_postgres)
    folder, port = quote(str(url.query["host"]), safe=""), url.query.get("port", "5432")
    assert "%2F" in folder
    for place in (f"{folder}:{port}/test", f"/test?host={folder}&port={port}"):
        with engine_of(make_plain(DATABASE_URL=f"postgresql://app@{place}")).connect() as connection:
            assert connection.scalar(sa.text("select inet_server_addr()")) is None


def test_options_of_the_owner_reach_the_server(make_plain: MakePlain, own_postgres: str) -> None:
    """From libpq's environment, and from the URL, beside ours."""
    in_url = make_url(own_postgres).update_query_dict({"options": "-csearch_path=elsewhere"})
    for more in ({"PGOPTIONS": "-c search_path=elsewhere"}, {"DATABASE_URL": in_url.render_as_string()}):
        with engine_of(make_plain(**more)).connect() as connection:
            assert connection.scalar(sa.text("show search_path")) == "elsewhere"
            assert connection.scalar(sa.text("show statement_timeout")) == "15s"


@pytest.mark.parametrize(
    "url",
    ["postgresql://app@/nowhere?host={}", "postgresql://nobody@/test?host={}", "postgresql://app@/test?host=/x,/y"],
)
def test_a_database_that_cannot_be_asked_is_one_line(make_plain: MakePlain, own_postgres: str, url: str) -> None:
    """Not a traceback, whatever it is, and not a list either."""
    app = make_plain(DATABASE_URL=url.format(make_url(own_postgres).query["host"]), web=False)
    done = app.test_cli_runner().invoke(args=["pool", "check"])
    assert done.exit_code == 2
    assert len(done.stderr.strip().splitlines()) == 4, done.stderr  # click's usage, and an empty line
    assert "Error: the database cannot be asked: " in done.stderr.splitlines()[-1]


def test_a_password_may_be_rotated_in_its_file(make_plain: MakePlain, own_postgres: str, tmp_path: Path) -> None:
    """libpq reads the file for each connection; a role with a # % / : @ in its password works like any other."""
    passwords, file = ["a#b%c/d:e@f", "rotated"], tmp_path / "pgpass"
    with postgres.running(tmp_path / "data", "test", settings={"fsync": "off"}) as url:
        hba = tmp_path / "data" / "pg_hba.conf"
        hba.write_text("local all postgres trust\nlocal all all scram-sha-256\n")
        with superuser(url) as admin:
            admin.execute("select pg_reload_conf()")
            engine = engine_of(make_plain(DATABASE_URL=url, PGPASSFILE=file))
            for password in passwords:
                admin.execute(sql.SQL("alter role app password {}").format(password))
                escaped = password.replace(":", r"\:")
                file.write_text(f"*:*:*:*:{escaped}\n")
                file.chmod(0o600)
                with pytest.MonkeyPatch.context() as patch:
                    patch.setenv("PGPASSFILE", str(file))
                    engine.dispose()
                    with engine.connect() as connection:
                        assert connection.scalar(sa.select(1)) == 1
            in_url = make_url(url).set(password=passwords[1]).render_as_string(hide_password=False)
            with engine_of(make_plain(DATABASE_URL=in_url)).connect() as connection:
                assert connection.scalar(sa.select(1)) == 1


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kolkata", "America/New_York"])
def test_a_time_is_the_same_in_every_zone(make_plain: MakePlain, monkeypatch: pytest.MonkeyPatch, zone: str) -> None:
    """Of the server's session: it comes back as the same moment."""
    monkeypatch.setenv("PGTZ", zone)
    with engine_of(make_plain()).connect() as connection:
        assert connection.scalar(sa.text("show timezone")) == zone
        moment: Any = connection.scalar(sa.text("select timestamptz '2026-01-01T12:00:00Z'"))
    assert moment.timestamp() == 1767268800


def test_a_thread_may_listen_to_the_database(plain: Flask) -> None:
    """On a connection of its own, while others are used."""
    heard: list[str] = []
    ready = threading.Event()

    def listen() -> None:
        with engine_of(plain).connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("listen news")
            ready.set()
            driver: Any = connection.connection.driver_connection
            heard.extend(notice.payload for notice in driver.notifies(timeout=20, stop_after=1))
            connection.exec_driver_sql("unlisten news")

    thread = threading.Thread(target=listen)
    thread.start()
    assert ready.wait(20)
    with engine_of(plain).begin() as connection:
        connection.exec_driver_sql("notify news, 'arrived'")
    thread.join()
    assert heard == ["arrived"]


# --- listeners -------------------------------------------------------------------------------------------------------


def status(family: int, address: Any) -> bytes:
    with contextlib.closing(socket.socket(family)) as connection:
        connection.settimeout(10)
        connection.connect(address)
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        return connection.makefile("rb").readline().split()[1]


def answers_on_ipv6(port: int) -> bool:
    with contextlib.suppress(OSError):
        return status(socket.AF_INET6, ("::1", port)) == b"200"
    return False


def test_ipv6(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On both ports. `::` is every address, those of IPv4, too."""
    port = free_port()
    monkeypatch.setattr(run, "answers", lambda port: answers_on_ipv6(port + 1))
    with serving(tmp_path / "log", PORT=port, WEB_HOST="::"):
        for each in (port, port + 1):
            assert status(socket.AF_INET6, ("::1", each)) == b"200"
            assert status(socket.AF_INET, ("127.0.0.1", each)) == b"200"
