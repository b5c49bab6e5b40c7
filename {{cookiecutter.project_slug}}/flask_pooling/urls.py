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
# Other clients' parameters for PgBouncer.
OF_A_POOLER = re.compile("pgbouncer|prepare|statement_?cache|query_?exec", re.IGNORECASE)


def database_url(value: Any) -> Any:
    """Read a database URL, and make its driver explicit.

    :raises ValueError: says what is wrong with it, without showing any of it.
    """
    if not isinstance(value, str):
        return value
    value = value.strip()  # a mounted secret ends in a line break
    parts = PARTS.fullmatch(value)
    if not parts or not value.isprintable() or any("=" not in part for part in (parts["query"] or "=").split("&")):
        raise ValueError(EXPECTED)
    if not value.startswith("sqlite") and "@" in parts["place"] + (parts["query"] or "" if parts[2] else ""):
        raise ValueError("has an @ after the host has begun; in a password write %40 for it, and %2F for a /")
    try:
        url = make_url(value)
    except (ArgumentError, ValueError):
        raise ValueError(EXPECTED) from None
    if url.drivername in {"postgres", "postgresql", "postgresql+psycopg"}:
        url = url.set(drivername="postgresql+psycopg")
    elif url.drivername != "sqlite":
        instead = "sqlite" if url.drivername.startswith("sqlite") else "postgresql"
        raise ValueError(f"{url.drivername}:// is not supported; use {instead}://")
    if (url.host or "").upper().startswith("%2F") and "host" not in url.query:  # a socket's folder, as libpq has it
        socket = {"host": unquote(str(url.host))} | ({"port": str(url.port)} if url.port else {})
        url = url.set(host=None, port=None).update_query_dict(socket)
    try:
        places, arguments = url.get_dialect()().create_connect_args(url)
    except ArgumentError:  # as many ports as hosts are needed
        raise ValueError(EXPECTED) from None
    if url.drivername == "sqlite":
        if url.database in {None, "", ":memory:"} or "mode=memory" in value or not places:
            raise ValueError("an in-memory SQLite is one connection for everybody; use a file: sqlite:///file.db")
        return url
    if problems := [*_not_for_libpq(arguments, hide="password" in url.query)]:
        raise ValueError("; ".join(problems))
    return url


def _not_for_libpq(arguments: Mapping[str, Any], *, hide: bool) -> Iterator[str]:
    """Name the parameters with which every connection would fail. libpq checks their values when it connects."""
    known = {option.keyword.decode() for option in Conninfo.get_defaults()}
    for name, value in arguments.items():
        if name not in known:
            remedy = "set DB_POOLER=pgbouncer in its place" if OF_A_POOLER.search(name) else "leave it out"
            yield f"{'a parameter' if hide else name} is not known to libpq; {remedy}"
        elif not isinstance(value, str | int):
            yield f"{name} is given twice"


def said(url: URL) -> dict[str, str]:
    """Return libpq's parameters: from the URL, or else from the environment or the service that PGSERVICE names."""
    options = [option for option in Conninfo.get_defaults() if option.val]
    given = [
        option for option in options if option.val != option.compiled or (option.envvar or b"").decode() in os.environ
    ]
    in_environment = {option.keyword.decode(): (option.val or b"").decode() for option in given}
    return in_environment | {name: value for name, value in url.query.items() if isinstance(value, str)}
