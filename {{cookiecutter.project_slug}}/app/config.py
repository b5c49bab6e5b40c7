"""The settings: every environment variable, parsed strictly, into one frozen object.

| name | default | meaning |
|---|---|---|
| `APP_ENV` | production | testing, development, production |
| `APP_INSTANCES` | baked | copies alive at once, deploy overlap included |
| `DATABASE_URL` | SQLite outside production | `postgresql://...` (or `postgres://`), `sqlite:///file` |
| `SECRET_KEY` | fixed outside production | at least 32 characters, random |
| `DB_MAX_CONNECTIONS` | baked | the server's `max_connections` |
| `DB_RESERVED_CONNECTIONS` | 10 | kept for migrations, cron, psql, monitoring and other apps |
| `DB_POOL_SIZE` | the plan | connections that each worker keeps |
| `DB_MAX_OVERFLOW` | 0 | connections that each worker may open on top |
| `DB_POOL_TIMEOUT` | 5 | seconds a request waits for a connection |
| `DB_CONNECT_TIMEOUT` | 3 | seconds to open a connection |
| `DB_STATEMENT_TIMEOUT` | 15 | seconds one statement of a web worker may run |
| `DB_MAX_LIFETIME` | 1800 | seconds a connection lives, jittered per connection |
| `DB_POOLER` | none | `none` or `pgbouncer` (transaction mode) |
| `DB_BUDGET_CHECK` | enforce | `enforce`, `warn` or `off`: ask the live server when gunicorn starts |
| `WEB_CONCURRENCY` | the plan | workers of one instance |
| `WEB_THREADS` | the plan | threads of one worker |
| `WEB_WORKER_CLASS` | gthread | `gthread` or `sync` |
| `WEB_TIMEOUT` | 30 | seconds before a silent worker is killed |
| `WEB_GRACEFUL_TIMEOUT` | 30 | seconds a stopping worker may take to finish |
| `WEB_WORKER_MEMORY_MIB` | 150 | memory that one worker is planned with, MiB |
| `WEB_TRUSTED_PROXIES` | 0 | how many proxies in front of the app set X-Forwarded-* |
| `WEB_HOST` | 127.0.0.1 | the address gunicorn listens on; 0.0.0.0 in a container |
| `PORT` | 8000 | the port gunicorn listens on |
| `WEB_PROBE_PORT` | `PORT` + 1 in production, else 0 | a listener for `/livez`, `/readyz`, `/metrics` alone; 0: none |

What does not belong here: arithmetic (sizing.py), the machine (machine.py), engine options (pools.py).
"""

import contextlib
import dataclasses
import difflib
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from marshmallow import EXCLUDE, Schema, ValidationError, fields, validate
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from app import defaults, machine, sizing


class Environment(StrEnum):
    TESTING = "testing"
    DEVELOPMENT = "development"
    PRODUCTION = "production"


class SettingsError(ValueError):
    """One or more settings cannot be used; `problems` names each with its value, and never shows a secret."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = tuple(problems)
        lines = "".join(f"\n  - {problem}" for problem in problems)
        super().__init__(f"{len(problems)} problem(s) in the settings:{lines}")


# Flask-SQLAlchemy has ignored these since 3.0, and guides still set them.
DEAD_KEYS = {
    "SQLALCHEMY_POOL_SIZE": "DB_POOL_SIZE",
    "SQLALCHEMY_MAX_OVERFLOW": "DB_MAX_OVERFLOW",
    "SQLALCHEMY_POOL_TIMEOUT": "DB_POOL_TIMEOUT",
    "SQLALCHEMY_POOL_RECYCLE": "DB_MAX_LIFETIME",
}
SECRET_NAMES = {"SECRET_KEY", "DATABASE_URL"}
PLACEHOLDERS = ("change", "secret", "password", "placeholder", "example", "default", "your-", "your_")
MIN_SECRET_LENGTH = 32
MIN_SECRET_CHARACTERS = 8  # different ones: "aaaa..." is long, too
HOSTS_WITH_PORTS = re.compile(r"[^:/,]+:[0-9]+(,[^:/,]+:[0-9]+)+")
MAX_BODY_BYTES = 1024 * 1024
MAX_PORT = 65_535


class Whole(fields.Integer):
    """Digits only: int() would also take " 5", "+5" and "1_000"."""

    def __init__(self, default: int | None, at_least: int = 1, at_most: int = 100_000) -> None:
        bounds = validate.Range(at_least, at_most, error=f"must be from {at_least} to {at_most}")
        super().__init__(load_default=default, validate=bounds, error_messages={"invalid": "is not a whole number"})

    def _validated(self, value: Any) -> int:
        if not re.fullmatch("[0-9]{1,18}", value):
            raise self.make_error("invalid")
        return super()._validated(value)


class Seconds(fields.Float):
    """A plain decimal number: float() would also take "1e3", "nan" and "inf"."""

    def __init__(self, default: float) -> None:
        bounds = validate.Range(0.1, 86_400, error="must be from 0.1 to 86400 seconds")
        super().__init__(load_default=default, validate=bounds, error_messages={"invalid": "is no number of seconds"})

    def _validated(self, value: Any) -> float:
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value):
            raise self.make_error("invalid")
        return super()._validated(value)


def one_of(default: str, *others: str) -> fields.String:
    choices = (default, *others)
    return fields.String(
        load_default=default, validate=validate.OneOf(choices, error=f"must be one of {', '.join(choices)}")
    )


class DatabaseUrl(fields.Field[URL]):
    """A URL of a database that this app can use, with the driver made explicit."""

    def _deserialize(self, value: Any, attr: str | None, data: Mapping[str, Any] | None, **kwargs: Any) -> URL:
        try:
            url = make_url(value)
            if url.drivername in {"postgres", "postgresql", "postgresql+psycopg"}:
                url = url.set(drivername="postgresql+psycopg")
            elif url.drivername != "sqlite":
                raise ValidationError(f"{url.drivername}:// is not supported; use postgresql://")
            hosts = url.query.get("host", "")
            if isinstance(hosts, str) and HOSTS_WITH_PORTS.fullmatch(hosts):  # as SQLAlchemy wants them: host=, host=
                url = url.update_query_dict({"host": hosts.split(",")})
            url.get_dialect()().create_connect_args(url)  # or a port that is no number would be found by the engine
        except (ArgumentError, ValueError):
            raise ValidationError("is not a database URL; expected postgresql://user:password@host/name") from None
        if url.drivername != "sqlite":
            return url
        if url.database in {None, "", ":memory:"} or "mode=memory" in value:
            raise ValidationError("an in-memory SQLite is one connection for everybody; use a file: sqlite:///file.db")
        return url


class EnvSchema(Schema):
    """The table above, as a schema: names, types, defaults and bounds."""

    APP_ENV = one_of("production", "development", "testing")
    APP_INSTANCES = Whole(defaults.INSTANCES)
    DATABASE_URL = DatabaseUrl(load_default=None)
    SECRET_KEY = fields.String(load_default=None)
    DB_MAX_CONNECTIONS = Whole(defaults.MAX_CONNECTIONS, at_most=262_143)  # Postgres's own maximum
    DB_RESERVED_CONNECTIONS = Whole(sizing.DEFAULT_RESERVED, at_least=0)
    DB_POOL_SIZE = Whole(None, at_most=1000)  # 0 would mean "without limit" to SQLAlchemy
    DB_MAX_OVERFLOW = Whole(0, at_least=0, at_most=1000)
    DB_POOL_TIMEOUT = Seconds(5)
    DB_CONNECT_TIMEOUT = Whole(3, at_least=2, at_most=60)  # libpq takes whole seconds, and 1 as 2
    DB_STATEMENT_TIMEOUT = Seconds(15)
    DB_MAX_LIFETIME = Seconds(1800)
    DB_POOLER = one_of("none", "pgbouncer")
    DB_BUDGET_CHECK = one_of("enforce", "warn", "off")
    WEB_CONCURRENCY = Whole(None, at_most=1000)
    WEB_THREADS = Whole(None, at_most=1000)
    WEB_WORKER_CLASS = one_of("gthread", "sync")
    WEB_TIMEOUT = Whole(30, at_most=3600)
    WEB_GRACEFUL_TIMEOUT = Whole(30, at_most=3600)
    WEB_WORKER_MEMORY_MIB = Whole(sizing.DEFAULT_WORKER_MEMORY_MIB)
    WEB_TRUSTED_PROXIES = Whole(0, at_least=0, at_most=10)
    WEB_HOST = fields.String(
        load_default="127.0.0.1", validate=validate.Regexp(r"[\w.:\[\]-]+\Z", error="is no address")
    )
    PORT = Whole(8000, at_most=MAX_PORT)
    WEB_PROBE_PORT = Whole(None, at_least=0, at_most=MAX_PORT)


NAMES = frozenset(EnvSchema._declared_fields)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the process runs with: the variables under their own names, and what follows from them together."""

    environment: Environment
    plan: sizing.Plan
    database_url: URL
    secret_key: str = field(repr=False)
    db_pool_timeout: float
    db_connect_timeout: int
    db_statement_timeout: float
    db_max_lifetime: float
    db_budget_check: str
    web_timeout: int
    web_graceful_timeout: int
    web_trusted_proxies: int
    web_host: str
    web_probe_port: int
    port: int

    @property
    def on_postgres(self) -> bool:
        return self.database_url.get_backend_name() == "postgresql"

    @property
    def lock_timeout(self) -> float:
        """Seconds, between the wait for the pool and the end of the statement: who waits for a lock is told so."""
        return (self.db_pool_timeout + self.db_statement_timeout) / 2

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> "Settings":
        """Build the settings from a mapping like `os.environ`.

        :raises SettingsError: with all problems at once.
        """
        values, problems = _parse(environ)
        problems += dead_key_problems(environ) + _near_misses(environ)
        for check in (_secret_problems, _database_problems, _port_problems, _broken_ladder, _plan_problems):
            with contextlib.suppress(KeyError):  # what it looks at did not parse, which is a problem already
                problems += check(values)
        if problems:
            raise SettingsError(problems)
        values["ENVIRONMENT"] = environment = Environment(values["APP_ENV"])
        values["PLAN"] = plan_for(values)
        values["DATABASE_URL"] = values["DATABASE_URL"] or _default_database(environment)
        values["SECRET_KEY"] = values["SECRET_KEY"] or "not-for-production"
        values["WEB_PROBE_PORT"] = _probe_port(values)
        return cls(**{each.name: values[each.name.upper()] for each in dataclasses.fields(cls)})


def plan_from_env(environ: Mapping[str, str], **what_if: Any) -> sizing.Plan:
    """The plan alone, for `flask pool plan`: it needs no secret and no database, and takes other numbers on trial.

    :raises SettingsError: a number does not parse.
    :raises sizing.PlanError: the numbers do not fit together.
    """
    values, problems = _parse(environ)
    problems = [problem for problem in problems if problem.partition("=")[0] not in SECRET_NAMES]
    problems += dead_key_problems(environ) + _near_misses(environ)
    if problems:
        raise SettingsError(problems)
    return plan_for(values, **what_if)


def plan_for(values: Mapping[str, Any], **what_if: Any) -> sizing.Plan:
    """Ask the arithmetic, with this machine's size and the settings, or with other numbers for a what-if."""
    numbers = {
        "cpus": machine.cpus(),
        "memory_mib": machine.memory_mib(),
        "max_connections": values["DB_MAX_CONNECTIONS"],
        "instances": values["APP_INSTANCES"],
        "reserved": values["DB_RESERVED_CONNECTIONS"],
        "worker_class": values["WEB_WORKER_CLASS"],
        "worker_memory_mib": values["WEB_WORKER_MEMORY_MIB"],
        "workers": values["WEB_CONCURRENCY"],
        "threads": values["WEB_THREADS"],
        "pool_size": values["DB_POOL_SIZE"],
        "max_overflow": values["DB_MAX_OVERFLOW"],
        "pooler": values["DB_POOLER"],
    }
    return sizing.plan(**(numbers | {name: value for name, value in what_if.items() if value is not None}))


def dead_key_problems(names: Mapping[str, Any]) -> list[str]:
    """The keys that Flask-SQLAlchemy ignores, wherever they were set, and what to set instead."""
    why = "Flask-SQLAlchemy has ignored this key since 3.0"
    return [
        f"{dead}={_shown(dead, names[dead])}: {why}; set {living} in the environment"
        for dead, living in DEAD_KEYS.items()
        if dead in names
    ]


def _broken_ladder(values: Mapping[str, Any]) -> list[str]:
    """Each wait must end before the one around it does, or the outer one gives up on work that still goes on."""
    ladder = [
        ("DB_CONNECT_TIMEOUT", "<=", "DB_POOL_TIMEOUT"),
        ("DB_POOL_TIMEOUT", "<", "DB_STATEMENT_TIMEOUT"),
        ("DB_STATEMENT_TIMEOUT", "<", "WEB_TIMEOUT"),
        ("DB_STATEMENT_TIMEOUT", "<", "WEB_GRACEFUL_TIMEOUT"),
    ]
    return [
        f"{inner}={values[inner]:g} must be {'at most' if sign == '<=' else 'less than'} {outer}={values[outer]:g}"
        for inner, sign, outer in ladder
        if {inner, outer} <= values.keys()
        and (values[inner] > values[outer] or (sign == "<" and values[inner] == values[outer]))
    ]


def _parse(environ: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    given = {name: environ[name] for name in NAMES if name in environ}
    try:
        return EnvSchema().load(given, unknown=EXCLUDE), []
    except ValidationError as error:
        return dict(error.valid_data or {}), [
            f"{name}={_shown(name, given[name])}: {'; '.join(reasons)}"
            for name, reasons in sorted(error.messages_dict.items())
        ]


def _plan_problems(values: Mapping[str, Any]) -> list[str]:
    try:
        plan_for(values)
    except sizing.PlanError as error:
        return [str(error)]
    return []


def _near_misses(environ: Mapping[str, str]) -> list[str]:
    """Misspelt names; others pass, since Kubernetes injects DB_PORT, WEB_SERVICE_HOST and the like."""
    problems = []
    for name in sorted(environ):
        if name.startswith(("APP_", "DB_", "WEB_")) and name not in NAMES:
            near = difflib.get_close_matches(name, NAMES, n=1, cutoff=0.85)
            if near:
                problems.append(f"{name}={_shown(name, environ[name])}: no such setting; did you mean {near[0]}?")
    return problems


def _shown(name: str, value: Any) -> str:
    """The value as given, unless it may hold a secret: a database's URL lands in the wrong variable easily."""
    return "***" if name in SECRET_NAMES or "SECRET" in name or "@" in str(value) else repr(value)


def _secret_problems(values: Mapping[str, Any]) -> list[str]:
    if values["APP_ENV"] != Environment.PRODUCTION:
        return []
    secret = values["SECRET_KEY"]
    how = "; make one with: python -c 'import secrets; print(secrets.token_hex(32))'"
    if secret is None:
        return [f"SECRET_KEY is not set{how}"]
    if len(secret) < MIN_SECRET_LENGTH:
        return [f"SECRET_KEY=***: {len(secret)} characters, at least {MIN_SECRET_LENGTH} are needed{how}"]
    if len(set(secret)) < MIN_SECRET_CHARACTERS or any(word in secret.lower() for word in PLACEHOLDERS):
        return [f"SECRET_KEY=***: looks like a placeholder{how}"]
    return []


def _database_problems(values: Mapping[str, Any]) -> list[str]:
    url, environment = values["DATABASE_URL"], values["APP_ENV"]
    if environment == Environment.PRODUCTION:
        if url is None:
            return ["DATABASE_URL is not set; production needs postgresql://user:password@host/name"]
        if url.get_backend_name() != "postgresql":
            return [f"DATABASE_URL=***: production needs Postgres, not {url.get_backend_name()}"]
    if environment == Environment.TESTING and url is not None and url.get_backend_name() != "sqlite":
        return ["DATABASE_URL=***: testing uses a SQLite file; tests on Postgres run with production's settings"]
    return []


def _probe_port(values: Mapping[str, Any]) -> int:
    if values["WEB_PROBE_PORT"] is None:
        return values["PORT"] + 1 if values["APP_ENV"] == Environment.PRODUCTION else 0
    return int(values["WEB_PROBE_PORT"])


def _port_problems(values: Mapping[str, Any]) -> list[str]:
    port = _probe_port(values)
    if port == values["PORT"]:
        return [f"WEB_PROBE_PORT={port}: must be another port than PORT"]
    return [f"PORT={MAX_PORT}: leaves no port after it for the probes; set WEB_PROBE_PORT"] if port > MAX_PORT else []


def _default_database(environment: Environment) -> URL:
    """A SQLite file: in instance/ for development (Flask-SQLAlchemy resolves it), in the temporary folder for tests."""
    file = f"{defaults.SERVICE_NAME}.db"
    if environment == Environment.TESTING:
        file = os.path.join(tempfile.gettempdir(), f"{defaults.SERVICE_NAME}-testing-{os.getpid()}.db")
    return URL.create("sqlite", database=file)
