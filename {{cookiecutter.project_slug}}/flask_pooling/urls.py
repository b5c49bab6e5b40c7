"""The database's URL: whether libpq can use it, and what its owner says in it, or in libpq's own environment (`PG*`).

A URL that no connection can be made with is refused at the start. No message shows a value of it: a password that was
not percent-encoded ends up in the host, in the name of the database or in a parameter.
"""

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from psycopg.conninfo import make_conninfo
from psycopg.pq import Conninfo, PGconn
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

EXPECTED = "is not a database URL; expected postgresql://user:password@host/name"
# As SQLAlchemy reads it: a password ends at the first @.
PARTS = re.compile(r"[\w+]+://([^:/]*(:[^@]*)?@)?(?P<place>[^?]*)(\?(?P<query>.*))?")
HOSTS_WITH_PORTS = re.compile(r"[^:/,]+:[0-9]+(,[^:/,]+:[0-9]+)+")
# Parameters of other clients, in lower case and without - and _, and what says the same here.
INSTEAD = {
    "set options=-csearch_path%3Dname": "schema schemas currentschema searchpath",
    "set DB_POOLER=pgbouncer": "pgbouncer preparethreshold preparedstatements statementcachesize"
    " preparedstatementcachesize preparedstatementcachequeries statementcachecapacity defaultqueryexecmode",
    "set DB_POOL_SIZE": "connectionlimit poolsize maxpoolsize minpoolsize poolmaxconns maximumpoolsize maxconns",
    "set DB_MAX_OVERFLOW": "maxoverflow",
    "set DB_POOL_TIMEOUT": "pooltimeout",
    "set DB_MAX_LIFETIME": "poolrecycle poolmaxconnlifetime maxlifetime connmaxage connectionlifetime",
    "set DB_CONNECT_TIMEOUT": "timeout connecttimeout connectiontimeout logintimeout",
    "set DB_STATEMENT_TIMEOUT": "statementtimeout commandtimeout querytimeout sockettimeout",
    "set sslmode to require, verify-ca or verify-full": "ssl usessl tls sslmode sslaccept sslfactory",
    "set application_name": "applicationname",
    "set client_encoding": "encoding charset",
    "set PGSERVICE in the environment": "service",
    "use `flask_pooling.run`": "autocommit isolationlevel",
}
REMEDIES = {name: remedy for remedy, names in INSTEAD.items() for name in names.split()}
# How libpq names the parameter whose value it does not know.
WRONG_VALUE = re.compile(r'.*for connection option "(\w+)"|invalid (port) number|invalid "?(\w+)"? value', re.DOTALL)
WHOLE = {"connect_timeout", "tcp_user_timeout", "keepalives"} | {
    f"keepalives_{name}" for name in ("idle", "interval", "count")
}
LIMITS = re.compile(r"(?:statement|lock|idle_in_transaction_session)_timeout")
SHORTEST_CONNECT = 2  # to libpq 1 is 2, and 0 is for ever
LONGEST_NAME = 40  # a job's is put behind it, and Postgres keeps 63 characters


def database_url(value: Any) -> Any:
    """A URL of a database that can be used here, with the driver made explicit.

    :raises ValueError: what is wrong with it, without showing any of it.
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
    """What would make every attempt to connect fail. libpq checks it, by an attempt to connect to a server that does
    not exist."""
    known = {option.keyword.decode(): option for option in Conninfo.get_defaults()}
    for option in known.values():
        if option.envvar and not os.environ.get(name := option.envvar.decode(), "").isprintable():
            yield f"{name} has a line break, or another character that cannot be seen, in it"
    for name in arguments.keys() - (known.keys() - {"service"}):
        remedy = REMEDIES.get(re.sub("[-_]", "", name.lower()))
        yield f"{'a parameter' if hide and not remedy else name} is not known to libpq; {remedy or 'leave it out'}"
    for name, value in arguments.items():
        if not isinstance(value, str | int):
            yield f"{name if name in known else 'a parameter'} is given twice"
        elif name in WHOLE and not re.fullmatch("[0-9]{1,9}", str(value)):
            yield f"{name} is not a whole number"
    if arguments.keys() <= known.keys():
        told = {name: option.val.decode() for name, option in known.items() if option.val} | dict(arguments)
        nowhere = {"host": re.sub("[^,]+", "/-", str(told.get("host", ""))) or "/-", "hostaddr": "", "password": "-"}
        attempt = PGconn.connect_start(make_conninfo(**told | nowhere).encode())
        said = attempt.get_error_message()
        found = WRONG_VALUE.search(said)
        attempt.finish()
        if found:
            name = next(filter(None, found.groups()))
            elsewhere = name not in arguments and name in known and known[name].envvar
            where = f"{elsewhere.decode()} in the environment" if elsewhere else name
            yield f"{where} has a value that libpq does not know; {REMEDIES.get(name, 'see its manual')}"
        elif "definition of service" in said:
            yield "PGSERVICE names a service that libpq does not find"
        elif said and "socket" not in said:
            yield "libpq cannot use these parameters together"


def said(url: URL) -> dict[str, str]:
    """What the owner says to libpq: in the URL, or else in the environment or in the service that PGSERVICE names."""
    options = [option for option in Conninfo.get_defaults() if option.val]
    given = [
        option for option in options if option.val != option.compiled or (option.envvar or b"").decode() in os.environ
    ]
    in_environment = {option.keyword.decode(): (option.val or b"").decode() for option in given}
    return in_environment | {name: value for name, value in url.query.items() if isinstance(value, str)}


def problems(url: URL, setting: str, *, connect: int | None, wait: float) -> Iterator[str]:
    """What breaks the order of the time limits, or the name by which `flask pool check` counts our connections.

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
            yield f"connect_timeout in {setting}: DB_CONNECT_TIMEOUT={connect} says otherwise; leave one of them out"
    if not re.fullmatch(f"[ -~]{{0,{LONGEST_NAME}}}", told.get("application_name", "")):
        yield f"application_name in {setting} or PGAPPNAME: must be at most {LONGEST_NAME} ASCII characters"
    yield from limits_in_options(url.query.get("options", ""), setting)


def limits_in_options(options: object, where: str) -> Iterator[str]:
    """The time limits that web workers get from DB_STATEMENT_TIMEOUT."""
    for limit in LIMITS.findall(str(options).replace("-", "_")):
        yield f"{limit} in {where}: set DB_STATEMENT_TIMEOUT instead; web workers get theirs from it"
