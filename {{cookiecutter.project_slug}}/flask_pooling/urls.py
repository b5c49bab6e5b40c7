"""The database's URL: a check that libpq can use it, and the parameters in it or in libpq's environment (`PG*`).

A URL that cannot work is refused at the start. No message shows a part of it: a password that was not percent-encoded
ends up in the host, in the name of the database or in a parameter.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from psycopg.pq import Conninfo
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

EXPECTED = "is not a database URL; expected postgresql://user:password@host/name"
# As SQLAlchemy reads a URL: the password ends at the first @.
PARTS = re.compile(r"[\w+]+://([^:/]*(:[^@]*)?@)?(?P<place>[^?]*)(\?(?P<query>.*))?")
HOSTS_WITH_PORTS = re.compile(r"[^:/,]+:[0-9]+(,[^:/,]+:[0-9]+)+")
# Other clients' parameters for PgBouncer.
OF_A_POOLER = re.compile("pgbouncer|prepare|statement_?cache|query_?exec", re.IGNORECASE)
LIMITS = re.compile(r"(?:statement|lock|idle_in_transaction_session)_timeout")
SHORTEST_CONNECT = 2  # libpq takes 1 as 2, and 0 as for ever
LONGEST_NAME = 40  # the name of a job follows it, and Postgres keeps 63 characters


def database_url(value: Any) -> Any:
    """Read a database URL, and make its driver explicit.

    :raises ValueError: says what is wrong with it, without showing any of it.
    """
    if not isinstance(value, str):
        return value
    parts = PARTS.fullmatch(value)
    if not parts or not value.isprintable() or any("=" not in part for part in (parts["query"] or "=").split("&")):
        raise ValueError(EXPECTED)
    if not value.startswith("sqlite") and "@" in parts["place"] + (parts["query"] or "" if parts[2] else ""):
        raise ValueError("has an @ after the host has begun; in a password write %40 for it, and %2F for a /")
    try:
        url = make_url(value)
        if url.drivername in {"postgres", "postgresql", "postgresql+psycopg"}:
            url = url.set(drivername="postgresql+psycopg")
        elif url.drivername != "sqlite":
            instead = "sqlite" if url.drivername.startswith("sqlite") else "postgresql"
            raise ValueError(f"{url.drivername}:// is not supported; use {instead}://")
        if (url.host or "").upper().startswith("%2F") and "host" not in url.query:  # a socket's folder, as libpq has it
            socket = {"host": unquote(str(url.host))} | ({"port": str(url.port)} if url.port else {})
            url = url.set(host=None, port=None).update_query_dict(socket)
        hosts = url.query.get("host", "")
        if isinstance(hosts, str) and HOSTS_WITH_PORTS.fullmatch(hosts):  # as SQLAlchemy wants them: host=, host=
            url = url.update_query_dict({"host": hosts.split(",")})
        arguments = url.get_dialect()().create_connect_args(url)  # or the engine would find a port that is no number
    except (ArgumentError, ValueError) as error:
        raise ValueError(str(error) if "is not supported" in str(error) else EXPECTED) from None
    if url.drivername != "sqlite":
        if problems := [*_not_for_libpq(arguments[1], hide="password" in url.query)]:
            raise ValueError("; ".join(problems))
        return url
    if url.database in {None, "", ":memory:"} or "mode=memory" in value or not arguments:
        raise ValueError("an in-memory SQLite is one connection for everybody; use a file: sqlite:///file.db")
    return url


def _not_for_libpq(arguments: Mapping[str, Any], *, hide: bool) -> Iterator[str]:
    """Name the parameters with which every connection would fail. libpq checks their values when it connects."""
    known = {option.keyword.decode(): option for option in Conninfo.get_defaults()}
    for option in known.values():
        if option.envvar and not os.environ.get(name := option.envvar.decode(), "").isprintable():
            yield f"{name} contains a line break or another invisible character"
    for name in arguments.keys() - (known.keys() - {"service"}):
        remedy = "set DB_POOLER=pgbouncer in its place" if OF_A_POOLER.search(name) else "leave it out"
        yield f"{'a parameter' if hide else name} is not known to libpq; {remedy}"
    for name, value in arguments.items():
        if not isinstance(value, str | int):
            yield f"{name if name in known else 'a parameter'} is given twice"


def said(url: URL) -> dict[str, str]:
    """Return libpq's parameters: from the URL, or else from the environment or the service that PGSERVICE names."""
    options = [option for option in Conninfo.get_defaults() if option.val]
    given = [
        option for option in options if option.val != option.compiled or (option.envvar or b"").decode() in os.environ
    ]
    in_environment = {option.keyword.decode(): (option.val or b"").decode() for option in given}
    return in_environment | {name: value for name, value in url.query.items() if isinstance(value, str)}


def problems(url: URL, setting: str, *, connect: int | None, wait: float) -> Iterator[str]:
    """Name the parameters that break the order of the time limits, or the name that `flask pool check` looks for.

    :param connect: DB_CONNECT_TIMEOUT, if it is set.
    """
    told = said(url)
    seconds = told.get("connect_timeout", "")
    where = setting if "connect_timeout" in url.query else "PGCONNECT_TIMEOUT or PGSERVICE"
    if seconds and (connect is None or where == setting):
        if not seconds.isdecimal() or not SHORTEST_CONNECT <= int(seconds) <= wait:
            limits = f"from {SHORTEST_CONNECT} to DB_POOL_TIMEOUT={wait:g}"
            yield f"connect_timeout in {where}: must be {limits}; set DB_CONNECT_TIMEOUT instead"
        elif connect not in {None, int(seconds)}:
            yield f"connect_timeout in {setting}: DB_CONNECT_TIMEOUT={connect} is another value; leave one of them out"
    if not re.fullmatch(f"[ -~]{{0,{LONGEST_NAME}}}", told.get("application_name", "")):
        yield f"application_name in {setting} or PGAPPNAME: must be at most {LONGEST_NAME} ASCII characters"
    yield from limits_in_options(url.query.get("options", ""), setting)


def limits_in_options(options: object, where: str) -> Iterator[str]:
    """Name the time limits that web workers get from DB_STATEMENT_TIMEOUT."""
    for limit in LIMITS.findall(str(options).replace("-", "_")):
        yield f"{limit} in {where}: set DB_STATEMENT_TIMEOUT instead; web workers get theirs from it"
