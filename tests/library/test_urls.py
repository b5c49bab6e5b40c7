"""DATABASE_URL: every shape that works somewhere works here, and what cannot work is refused without being shown."""

from typing import Any
from urllib.parse import quote

import pytest
from psycopg.conninfo import conninfo_to_dict

from flask_pooling import SettingsError, urls
from flask_pooling.engine import engine_options
from tests.library.plain import Settings

pytestmark = [pytest.mark.sqlite, pytest.mark.usefixtures("production")]  # nobody connects: once is enough

SECRET = "hunter2"


def load(monkeypatch: pytest.MonkeyPatch, url: str = "postgresql://u@h/d", **environ: str) -> Settings:
    for name, value in {"DATABASE_URL": url, **environ}.items():
        monkeypatch.setenv(name, value)
    return Settings.load()


def arguments(settings: Settings, process: str = "cli") -> dict[str, Any]:
    """Return psycopg's arguments: the URL's and ours."""
    url = settings.database_url
    _, from_url = url.get_dialect()().create_connect_args(url)
    return {**from_url, **engine_options(settings, url, process=process)["connect_args"]}


def refusal(monkeypatch: pytest.MonkeyPatch, url: str = "postgresql://u@h/d", **environ: str) -> str:
    with pytest.raises(SettingsError) as caught:
        load(monkeypatch, url, **environ)
    return str(caught.value)


# --- shapes that work ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "means"),
    [
        ("postgres://u:p@h/d", {"user": "u", "password": "p", "host": "h", "dbname": "d"}),
        ("postgresql://u:p@h:6543/d", {"host": "h", "port": 6543}),
        ("postgresql+psycopg://u:p@h/d", {"host": "h"}),
        ("postgresql://u@[::1]:5433/d", {"host": "::1", "port": 5433}),
        ("postgresql://u@[2001:db8::7]/d", {"host": "2001:db8::7"}),
        ("postgresql://u:p@/d?host=/cloudsql/project:region:instance", {"host": "/cloudsql/project:region:instance"}),
        ("postgresql://u:p@%2Fcloudsql%2Fone/d?host=/cloudsql/one", {"host": "/cloudsql/one"}),
        ("postgresql://u@%2Ftmp%2Fsock:5433/d", {"host": "/tmp/sock", "port": "5433"}),
        ("postgres://u:p@%2fvar%2Frun/d?sslmode=disable", {"host": "/var/run", "sslmode": "disable"}),
        ("postgresql://u@/d?host=one:1&host=two:2", {"host": "one,two", "port": "1,2"}),
        ("postgresql://u@/d?host=one,two&port=1,2", {"host": "one,two", "port": "1,2"}),
        ("postgresql://u@h/d?sslmode=require&channel_binding=require", {"channel_binding": "require"}),
        ("postgresql://u@h/d?sslmode=verify-full&sslrootcert=system", {"sslrootcert": "system"}),
        ("postgresql://u@h/d?sslmode=require&sslnegotiation=direct", {"sslnegotiation": "direct"}),
        ("postgresql://u@h/d?gssencmode=require", {"gssencmode": "require"}),
        ("postgresql://u@h/d?passfile=/run/secrets/pgpass", {"passfile": "/run/secrets/pgpass"}),
        ("postgresql://user@server:p@h/d", {"user": "user@server", "password": "p"}),
        ("postgresql://h/d?user=me%40tenant&password=p%40ss", {"user": "me@tenant", "password": "p@ss"}),
        ("postgresql://", {}),
        ("postgresql:///d", {"dbname": "d"}),
    ],
)
def test_it_means_what_libpq_would_make_of_it(
    monkeypatch: pytest.MonkeyPatch, url: str, means: dict[str, object]
) -> None:
    """As hosting providers and cloud databases hand it out."""
    assert arguments(load(monkeypatch, url)).items() >= means.items()


@pytest.mark.parametrize("password", ["a#b", "a%b", "a/b", "a:b", "a?b", "a&b=c", "a b", "p%41", "ü", "#%/:?&="])
def test_a_password_may_have_any_character(monkeypatch: pytest.MonkeyPatch, password: str) -> None:
    """Percent-encoded; and most of them as they are, since nothing but an @ ends a password."""
    encoded = load(monkeypatch, f"postgresql://u:{quote(password, safe='')}@h/d").database_url
    assert (encoded.password, encoded.host, encoded.database) == (password, "h", "d")
    if password != "p%41":  # which is a way to write pA
        plain = load(monkeypatch, f"postgresql://u:{password}@h/d").database_url
        assert (plain.password, plain.host, plain.database) == (password, "h", "d")


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "password",
    ["hunter2@hunter2", "x@hunter2/hunter2", "x@hunter2?hunter2=1", "x@y?hunter2", "@hunter2", "hunter2@1:2"],
)
def test_a_password_with_an_at_sign_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, password: str) -> None:
    """Its end would be taken for the host, and be in the log with each attempt to connect."""
    said = refusal(monkeypatch, f"postgresql://u:{password}@h/d")
    assert "DATABASE_URL=***: " in said
    assert SECRET not in said
    assert load(monkeypatch, f"postgresql://u:{quote(password, safe='')}@h/d").database_url.password == password


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("mysql://u:hunter2@h/d", "mysql:// is not supported; use postgresql://"),
        ("postgresql+psycopg2://u:hunter2@h/d", "postgresql+psycopg2:// is not supported"),
        ("postgresql+asyncpg://u:hunter2@h/d", "postgresql+asyncpg:// is not supported"),
        ("jdbc:postgresql://h/d?user=u&password=hunter2", urls.EXPECTED),
        ("hunter2", urls.EXPECTED),
        ("postgresql://u:hunter2@h:port/d", urls.EXPECTED),
        ("postgresql://u:hunter2@h/d?hunter2", urls.EXPECTED),
        ("postgresql://u:hunter2@h/d?host=one:1&host=two:2&port=3", urls.EXPECTED),
        ("postgresql://us/er:hunter2@h/d", "has an @ after the host has begun"),
        ("postgresql://h/d?user=u&password=a&hunter2=b", "a parameter is not known to libpq"),
        ("postgresql://u:hunter2@h/d?sslmode=require&sslmode=disable", "sslmode is given twice"),
        ("postgresql://u:hunter2@h\n/d", urls.EXPECTED),
        ('"postgresql://u:hunter2@h/d"', urls.EXPECTED),
        ("sqlite://u:hunter2@h/d", urls.EXPECTED),
        ("sqlite://", "an in-memory SQLite"),
        ("sqlite:///:memory:", "an in-memory SQLite"),
        ("sqlite:///file:x?mode=memory&uri=true", "an in-memory SQLite"),
    ],
)
def test_what_can_never_connect_is_refused(monkeypatch: pytest.MonkeyPatch, url: str, says: str) -> None:
    """Without a word of it, since any part may be a password."""
    said = refusal(monkeypatch, url)
    assert f"DATABASE_URL=***: {says}" in said
    assert SECRET not in said


@pytest.mark.parametrize(
    ("parameter", "remedy"),
    [
        ("pgbouncer=true", "set DB_POOLER=pgbouncer"),  # Prisma
        ("prepareThreshold=0", "set DB_POOLER=pgbouncer"),  # JDBC
        ("statement_cache_size=0", "set DB_POOLER=pgbouncer"),  # asyncpg
        ("default_query_exec_mode=exec", "set DB_POOLER=pgbouncer"),  # pgx
        ("schema=public", "leave it out"),
        ("connection_limit=5", "leave it out"),
        ("pool_size=5", "leave it out"),  # SQLAlchemy
        ("statement_timeout=5000", "leave it out"),  # node-postgres
    ],
)
def test_a_parameter_of_another_client_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, parameter: str, remedy: str
) -> None:
    """libpq fails at each attempt to connect."""
    said = refusal(monkeypatch, f"postgresql://u@h/d?{parameter}")
    assert f"{parameter.partition('=')[0]} is not known to libpq; {remedy}" in said


# --- what the owner says counts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "environ", "counts"),
    [
        ("connect_timeout=4", {}, {"connect_timeout": "4"}),
        ("", {"PGCONNECT_TIMEOUT": "4"}, {"connect_timeout": "4"}),
        ("connect_timeout=4", {"PGCONNECT_TIMEOUT": "5"}, {"connect_timeout": "4"}),
        ("", {"PGCONNECT_TIMEOUT": "60", "DB_CONNECT_TIMEOUT": "4"}, {"connect_timeout": 4}),
        ("connect_timeout=4", {"DB_CONNECT_TIMEOUT": "4"}, {"connect_timeout": "4"}),
        ("", {}, {"connect_timeout": 3, "application_name": "plain/cli", "keepalives": 1}),
        ("application_name=mine", {}, {"application_name": "mine/cli"}),
        ("", {"PGAPPNAME": "mine"}, {"application_name": "mine/cli"}),
        ("tcp_user_timeout=9000", {}, {"tcp_user_timeout": "9000"}),
        ("keepalives=0&keepalives_idle=60", {}, {"keepalives": "0", "keepalives_idle": "60", "keepalives_count": 3}),
        ("target_session_attrs=any", {}, {"target_session_attrs": "any"}),
        ("", {"PGTARGETSESSIONATTRS": "any"}, {"target_session_attrs": "any"}),
        ("", {}, {"target_session_attrs": "primary"}),
        ("host=one&host=two", {}, {"target_session_attrs": "read-write"}),
        ("host=one,two", {}, {"target_session_attrs": "read-write"}),
    ],
)
def test_the_owners_word_counts(
    monkeypatch: pytest.MonkeyPatch, query: str, environ: dict[str, str], counts: dict[str, object]
) -> None:
    """The URL's before that of libpq's environment, and both before ours."""
    assert arguments(load(monkeypatch, f"postgresql://u@h/d?{query}", **environ)).items() >= counts.items()


@pytest.mark.parametrize(
    ("query", "environ", "options"),
    [
        ("options=-csearch_path%3Dx", {}, "-csearch_path=x"),
        ("", {"PGOPTIONS": "-c search_path=x"}, "-c search_path=x"),
        ("", {"PGOPTIONS": "-c client_connection_check_interval=0"}, "-c client_connection_check_interval=0"),
        ("", {"PGOPTIONS": "-c statement_timeout=1h"}, "-c statement_timeout=1h"),  # of a shell, a migration
    ],
)
def test_options_come_after_ours(
    monkeypatch: pytest.MonkeyPatch, query: str, environ: dict[str, str], options: str
) -> None:
    """libpq drops PGOPTIONS when it is given options as an argument. To Postgres the last word counts."""
    found = arguments(load(monkeypatch, f"postgresql://u@h/d?{query}", **environ))["options"]
    assert found.startswith("-c client_connection_check_interval=1000 -c tcp_user_timeout=4000 ")
    assert found.endswith(f"-c tcp_keepalives_count=3 {options}")


def test_a_service_file_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """PGSERVICE names an entry with the host, and more."""
    (tmp_path / "services").write_text("[ours]\nhost=db.invalid\nconnect_timeout=4\napplication_name=mine\n")
    found = arguments(load(monkeypatch, PGSERVICE="ours", PGSERVICEFILE=str(tmp_path / "services")))
    assert (found["connect_timeout"], found["application_name"]) == ("4", "mine/cli")


def test_nothing_is_said_twice_to_libpq(monkeypatch: pytest.MonkeyPatch) -> None:
    """psycopg makes a connection string of it all that libpq parses."""
    found = arguments(load(monkeypatch, "postgresql://u:p@h/d?options=-cx.y%3D1&connect_timeout=4"), "web")
    assert conninfo_to_dict(**found)["connect_timeout"] == "4"
    assert "-c statement_timeout=15000" in found["options"]


def test_the_budget_check_knows_our_connections_by_any_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Postgres keeps 63 characters of a name."""
    name = arguments(load(monkeypatch, "postgresql://u@h/d?application_name=" + "x" * 70))
    assert len(name["application_name"]) == 63
