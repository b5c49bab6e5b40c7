"""The settings of this package: `DB_*`, `WEB_*`, `APP_INSTANCES`, `APP_JOBS` and `PORT`, read from the environment.

An app's own settings class derives from :class:`Settings` and adds its own, one line each. A field holds the limits of
its value; :meth:`Settings.problems` checks how values depend on each other.
"""

import contextlib
import difflib
import ipaddress
import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from enum import StrEnum
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    field_validator,
)
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from pydantic_settings import SettingsError as NoJson
from sqlalchemy.engine import URL

from flask_pooling import machine, sizing, urls
from flask_pooling.urls import database_url

# Flask-SQLAlchemy has ignored these since 3.0, and guides still set them.
DEAD_KEYS = {
    "SQLALCHEMY_POOL_SIZE": "DB_POOL_SIZE",
    "SQLALCHEMY_MAX_OVERFLOW": "DB_MAX_OVERFLOW",
    "SQLALCHEMY_POOL_TIMEOUT": "DB_POOL_TIMEOUT",
    "SQLALCHEMY_POOL_RECYCLE": "DB_MAX_LIFETIME",
}
MAX_PORT = 65_535
JOB = re.compile(r"([a-z][a-z0-9_-]{0,30})=([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
BIND_SERVER = re.compile(r"([\w.-]+(?:\+[\w.-]+)*)=([1-9][0-9]{0,5})(?::([0-9]{1,5}))?", re.ASCII)
# The numbers of a plan, and the settings that they come from.
PLANNED_WITH = {"max_connections": "db_max_connections", "instances": "app_instances", "jobs": "app_jobs"}
PLANNED_WITH |= {name: f"db_{name}" for name in ("pool_size", "max_overflow", "pooler", "poolers", "binds")}
PLANNED_WITH |= {name: f"web_{name}" for name in ("threads", "worker_class", "worker_memory_mib")}
PLANNED_WITH |= {"reserved": "db_reserved_connections", "workers": "web_concurrency", "bind_servers": "db_bind_servers"}
SECRET = re.compile("SECRET|PASS|PWD|TOKEN|KEY|URL|DSN|CRED|AUTH|PRIVATE|CERT|SALT")
# Kubernetes gives every container the address of every service: WEB_PROD_PORT=tcp://10.0.0.1:80.
INJECTED = re.compile(r"(tcp|udp|sctp)://")
PREFIXES = ("APP_", "DB_", "WEB_")
# How similar two names must be, by difflib. Above the first, about a letter of ten is wrong or missing, and the name is
# refused. Above the second it is a warning.
MISSPELT, LIKE = 0.93, 0.85
OFTEN_INJECTED = ("_PORT", "_HOST", "_ID", "_NAME")  # so these need a closer match to be warned of

log = logging.getLogger(__name__)


class SettingsError(RuntimeError):
    """One or more settings cannot be used; `problems` names each with its value, and never shows a secret.

    gunicorn prints a RuntimeError without its traceback.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        lines = "".join(f"\n  - {problem}" for problem in self.problems)
        count = len(self.problems)
        super().__init__(f"{count} problem{'' if count == 1 else 's'} in the settings:{lines}")


# --- types of values -------------------------------------------------------------------------------------------------


def _digits(value: Any) -> Any:
    """Take digits alone. int() would also take " 5", "+5" and "1_000"."""
    if isinstance(value, str) and not re.fullmatch("[0-9]{1,18}", value):
        raise ValueError("is not a whole number")
    return value


def _decimal(value: Any) -> Any:
    """Take a decimal number alone. float() would also take "1e3", "nan" and "inf"."""
    if isinstance(value, str) and not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", value):
        raise ValueError("is not a number of seconds")
    return value


def _jobs(value: Any) -> Any:
    """Read `worker=2x4,scheduler=1x1`: two workers with four connections each, and one scheduler with one."""
    if not isinstance(value, str):
        return value
    jobs: dict[str, sizing.Job] = {}
    for part in value.split(",") if value else ():
        match = JOB.fullmatch(part.strip())
        if not match:
            raise ValueError("each job is name=COPIESxCONNECTIONS, for example worker=2x4,scheduler=1x1")
        name, copies, connections = match.groups()
        if name in jobs or name in {"web", "cli"}:
            raise ValueError(f"{name} is {'given twice' if name in jobs else 'a reserved name; choose another'}")
        jobs[name] = sizing.Job(int(copies), int(connections))
    return jobs


def _bind_servers(value: Any) -> Any:
    """Read `reports=100,audit+archive=200:5`: the server of one bind, and that of two, where 5 are for others."""
    if not isinstance(value, str):
        return value
    matches = [BIND_SERVER.fullmatch(part.strip()) for part in value.split(",")] if value else []
    if not all(matches):
        example = "for example reports=100,audit+archive=200:5"
        raise ValueError(f"each server is BIND=MAX_CONNECTIONS or BIND+BIND=MAX_CONNECTIONS:RESERVED, {example}")
    found = [match.groups(default=sizing.DEFAULT_RESERVED) for match in matches if match]
    binds = [bind for name, *_ in found for bind in str(name).split("+")]
    if twice := {bind for bind in binds if binds.count(bind) > 1}:
        raise ValueError(f"{', '.join(sorted(twice))} is given twice")
    return {name: sizing.BindServer(int(most), int(reserved)) for name, most, reserved in found}


def _address(value: str) -> str:
    """Take an address or a host name. An IPv6 address may have brackets: `::` and `[::]`."""
    address = value[1:-1] if value[:1] == "[" and value[-1:] == "]" else value
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(address))
    if not re.fullmatch(r"[\w.-]+", value):
        raise ValueError("is not an address; the port is set by PORT")
    return value


def _has_something_around_it(value: str) -> bool:
    """Return whether a file, a form or `docker run --env-file` has left a line break, quotes or a byte order mark. A
    text of several lines, such as a key, may end in a line break."""
    first, last = value[:1], value[-1:]
    if "\n" in value.strip():
        return False
    quoted = len(value) > 1 and first == last and first in "'\"`"
    return quoted or value != value.strip() or not (first + last).isprintable()


def _not_injected(value: Any) -> Any:
    """Ignore an address: Kubernetes sets WEB_PROBE_PORT for a Service that is called web-probe."""
    return None if isinstance(value, str) and INJECTED.match(value) else value


Whole = Annotated[int, BeforeValidator(_digits)]
Seconds = Annotated[float, BeforeValidator(_decimal), Field(ge=0.1, le=86_400)]
Jobs = Annotated[Mapping[str, sizing.Job], NoDecode, BeforeValidator(_jobs)]
BindServers = Annotated[Mapping[str, sizing.BindServer], NoDecode, BeforeValidator(_bind_servers)]
DatabaseUrl = Annotated[URL, NoDecode, BeforeValidator(database_url)]
Address = Annotated[str, AfterValidator(_address)]


# --- the settings ----------------------------------------------------------------------------------------------------


class Settings(BaseSettings):
    """The settings of the plan, the pools and gunicorn. README.md has the meaning and the unit of each.

    An empty variable counts as not set.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="ignore",
        arbitrary_types_allowed=True,
        env_file_encoding="utf-8-sig",
        env_ignore_empty=True,
    )

    # A name that is almost one of these stops the start. In an app that takes the library in, it is a warning.
    strict: ClassVar[bool] = False

    _name: str = PrivateAttr("flask")

    app_job: str | None = Field(None, pattern="^[a-z][a-z0-9_-]*$")
    app_instances: Whole = Field(2, ge=1, le=262_143)
    app_jobs: Jobs = Field(default_factory=dict)
    port: Whole = Field(8000, ge=1, le=MAX_PORT)

    db_max_connections: Whole = Field(100, ge=1, le=262_143)  # Postgres's own maximum
    db_reserved_connections: Whole = Field(sizing.DEFAULT_RESERVED, ge=0, le=100_000)
    db_binds: Whole = Field(0, ge=0, le=100)
    db_bind_servers: BindServers = Field(default_factory=dict)
    db_pool_size: Whole | None = Field(None, ge=1, le=1000)  # 0 would mean "without limit" to SQLAlchemy
    db_max_overflow: Whole = Field(0, ge=0, le=1000)
    db_connect_timeout: Whole = Field(3, ge=2, le=60)  # libpq takes whole seconds, and 1 as 2
    db_pool_timeout: Seconds = 5
    db_statement_timeout: Seconds = 15
    db_max_lifetime: Seconds = 1800
    db_hold_warning: Annotated[float, BeforeValidator(_decimal), Field(ge=0, le=86_400)] = 2  # 0: none
    db_pooler: Literal["none", "pgbouncer"] = "none"
    db_poolers: Whole = Field(1, ge=1, le=1000)
    db_budget_check: Literal["enforce", "warn", "off"] = "enforce"

    web_concurrency: Whole | None = Field(None, ge=1, le=1000)
    web_threads: Whole | None = Field(None, ge=1, le=1000)
    web_worker_class: Literal["gthread", "sync"] = "gthread"
    web_worker_memory_mib: Whole = Field(sizing.DEFAULT_WORKER_MEMORY_MIB, ge=1, le=100_000)
    web_timeout: Whole = Field(30, ge=1, le=3600)
    web_graceful_timeout: Whole = Field(30, ge=1, le=3600)
    web_trusted_proxies: Whole = Field(0, ge=0, le=10)
    web_host: Address = "127.0.0.1"
    web_probe_port: Annotated[Whole | None, BeforeValidator(_not_injected)] = Field(None, ge=0, le=MAX_PORT)

    @classmethod
    def load(cls, *, name: str = "flask", numbers_only: bool = False, **given: Any) -> Self:
        """Read the environment.

        :param name: the service's name, unless the class has one.
        :param given: settings that come before the environment's.
        :param numbers_only: for `flask pool plan`, which needs no secret and no database, and answers itself whether
            the numbers fit together.
        :raises SettingsError: with all problems at once.
        """
        environ = {variable.upper(): value for variable, value in cls.environment().items() if value}
        problems = [*(dead_keys(environ) if cls.strict else ()), *_misspelt(environ, cls)]
        wrong: dict[str, Any] = {}
        try:
            settings = cls(**given)
        except NoJson as error:  # in a list or a model of the app's own
            raise SettingsError([*problems, str(error)]) from None
        except ValidationError as error:
            # An error of a validator for the whole model belongs to no field.
            problems += [_reason(found) for found in error.errors() if not found["loc"]]
            wrong = {str(found["loc"][0]): found for found in error.errors() if found["loc"]}
            told = [field for field in wrong if field in Settings.model_fields or not numbers_only]
            problems += [_problem(cls, field, environ, wrong[field]) for field in told]
            # Values that depend on each other are checked with defaults in the place of the wrong ones.
            defaults = {
                field: cls.model_fields[field].get_default(call_default_factory=True)
                for field in wrong.keys() & cls.model_fields.keys()
            }
            try:
                settings = cls(**given | defaults)
            except ValidationError:  # one of them has no default
                problems = problems or [_problem(cls, field, environ, wrong[field]) for field in wrong]
                raise SettingsError(problems) from None
        settings._name = name
        if not numbers_only:
            said = [field.upper() for field in wrong]
            problems += [found for found in settings.problems() if not any(field in found for field in said)]
        if problems:
            raise SettingsError(problems)
        return settings

    @classmethod
    def takes(cls, variable: str, value: str) -> bool:
        """Return whether a setting would take this value. APP_INSTANCE=i-0abc is another program's."""
        field = cls.model_fields[variable.lower()].rebuild_annotation()
        try:
            TypeAdapter(field, config={"arbitrary_types_allowed": True}).validate_python(value)
        except ValidationError:
            return False
        return True

    @classmethod
    def environment(cls) -> Mapping[str, str]:
        """Return the variables that are set. A class that reads more than the environment overrides this."""
        return os.environ

    @field_validator("*", mode="before")
    @classmethod
    def _bare(cls, value: Any) -> Any:
        if isinstance(value, str) and _has_something_around_it(value):
            raise ValueError("begins or ends with whitespace, a quote or an invisible character; remove it")
        return value

    def problems(self) -> Iterator[str]:
        """Name the values that are right one by one, but not together. A class that derives from this adds its own."""
        yield from self._broken_ladder()
        if self.probe_port == self.port:
            yield f"WEB_PROBE_PORT={self.probe_port}: must be another port than PORT"
        if self.probe_port > MAX_PORT:
            yield f"PORT={self.port}: leaves no port after it for the probes; set WEB_PROBE_PORT"
        connect = self.db_connect_timeout if "db_connect_timeout" in self.model_fields_set else None
        for name in type(self).model_fields:
            if isinstance(url := getattr(self, name), URL) and url.get_backend_name() == "postgresql":
                yield from urls.problems(url, name.upper(), connect=connect, wait=self.db_pool_timeout)
        try:
            self.plan  # noqa: B018  # it is made, and kept
        except sizing.TooLittleMemoryError:
            pass  # gunicorn.conf.py asks for the plan, and a job in a small container needs none
        except sizing.PlanError as error:
            yield str(error)

    def _broken_ladder(self) -> Iterator[str]:
        """Name the waits that do not end before the one around them, which would give up on work that still runs."""
        connect, wait, statement = self.db_connect_timeout, self.db_pool_timeout, self.db_statement_timeout
        if connect > wait:
            yield f"DB_CONNECT_TIMEOUT={connect:g} must be at most DB_POOL_TIMEOUT={wait:g}"
        if wait >= statement:
            yield f"DB_POOL_TIMEOUT={wait:g} must be less than DB_STATEMENT_TIMEOUT={statement:g}"
        for name, outer in ("WEB_TIMEOUT", self.web_timeout), ("WEB_GRACEFUL_TIMEOUT", self.web_graceful_timeout):
            if statement >= outer:
                yield f"DB_STATEMENT_TIMEOUT={statement:g} must be less than {name}={outer:g}"

    @cached_property
    def plan(self) -> sizing.Plan:
        """The plan for this machine and these settings. :raises sizing.PlanError: there is none."""
        return self.plan_if()

    def plan_if(self, **what_if: Any) -> sizing.Plan:
        """Make the plan with other numbers, where they are not None, in place of these."""
        numbers = {number: getattr(self, setting) for number, setting in PLANNED_WITH.items()}
        numbers |= {"cpus": machine.cpus(), "memory_mib": machine.memory_mib()}
        return sizing.plan(**(numbers | {name: value for name, value in what_if.items() if value is not None}))

    @property
    def bind(self) -> str:
        """The address as gunicorn takes it: an IPv6 address has brackets."""
        return f"[{self.web_host}]:{self.port}" if ":" in self.web_host else f"{self.web_host}:{self.port}"

    @property
    def probe_port(self) -> int:
        """The port of the probes and the metrics. 0 means that there is none."""
        return self.port + 1 if self.web_probe_port is None else self.web_probe_port

    @property
    def service_name(self) -> str:
        """The service's name, which its connections and its folder of metrics have."""
        return self._name

    @property
    def in_production(self) -> bool:
        """True in production, where metrics are on the probe port alone."""
        return os.environ.get("APP_ENV", "production") not in {"development", "testing"}

    @property
    def refuses_strangers(self) -> bool:
        """True if a server that gunicorn.conf.py has not started answers each request with 503. An app that takes the
        library in does so only if its environment names production."""
        return self.in_production and (self.strict or "APP_ENV" in os.environ)

    @property
    def lock_timeout(self) -> float:
        """Seconds, halfway between DB_POOL_TIMEOUT and DB_STATEMENT_TIMEOUT, so that the error names the lock."""
        return (self.db_pool_timeout + self.db_statement_timeout) / 2


# --- messages about wrong values -------------------------------------------------------------------------------------


def dead_keys(names: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> Iterator[str]:
    """Name the keys that Flask-SQLAlchemy ignores, and what to set instead.

    :param options: the engine's. A key that the app passes on to them has an effect, so it is a warning.
    """
    for dead, living in DEAD_KEYS.items():
        if dead in names:
            why = f"Flask-SQLAlchemy has ignored this key since 3.0; set {living} in the environment"
            said = f"{_named(dead, names[dead])}: {why}"
            if str((options or {}).get(dead.removeprefix("SQLALCHEMY_").lower())) == str(names[dead]):
                log.warning("%s", said)
            else:
                yield said


def _misspelt(given: Mapping[str, str], settings: type[Settings]) -> Iterator[str]:
    """Name each variable that is almost one of our settings. Others pass: Kubernetes injects DB_PORT and the like.

    If the class is strict, a name that can be nothing else is a problem. A less similar one is a warning.
    """
    known = [name.upper() for name in settings.model_fields]
    for name, value in sorted(given.items()):
        readable = name.strip("\ufeff \t\r")  # an editor may leave a byte order mark at the start of a file
        if name in known or not readable.startswith(PREFIXES) or INJECTED.match(value):
            continue
        near = _nearest(readable, known)
        if near is None:
            continue
        said = f"{_named(ascii(name)[1:-1], value, hide=_hides(settings, near.lower()))}: no such setting;"
        said += f" did you mean {near}?"
        if settings.strict and _alike(readable, near) >= MISSPELT and settings.takes(near, value):
            yield said
        else:
            log.warning("%s", said)


def _nearest(name: str, known: list[str]) -> str | None:
    """Return the setting that a name may stand for: DB_POOL for DB_POOL_SIZE, WEB_TREADS for WEB_THREADS."""
    injected = name.endswith(OFTEN_INJECTED)
    words, of_its_kind = set(name.split("_")), [each for each in known if each[:3] == name[:3]]
    longer = [each for each in of_its_kind if words < set(each.split("_")) and "DB" in words and not injected]
    near = max(of_its_kind, key=lambda each: _alike(name, each), default="")
    alike = _alike(name, near)
    return longer[0] if longer and alike < MISSPELT else near if alike >= (MISSPELT if injected else LIKE) else None


def _alike(one: str, other: str) -> float:
    """Rate how similar two names are, from 0 to 1. Underscores and an S at the end make no difference."""
    bare = [re.sub("[_-]|S$", "", each) for each in (one, other)]
    return difflib.SequenceMatcher(a=bare[0], b=bare[1]).ratio()


def _hides(settings: type[Settings], field: str) -> bool:
    """Return whether a value is hidden: that of a setting of the app's own, unless it is a number or a choice."""
    kind = settings.model_fields[field].annotation if field in settings.model_fields else None
    is_shown = isinstance(kind, type) and issubclass(kind, int | float | StrEnum)
    return field not in Settings.model_fields and not is_shown


def _problem(settings: type[Settings], field: str, given: Mapping[str, str], found: Any) -> str:
    if found["type"] == "missing":
        return f"{field.upper()} is not set"
    hide = _hides(settings, field)
    of_it = "".join(f" {part}:" for part in found["loc"][1:] if hide)  # which of its fields
    return f"{_named(field, given.get(field.upper()), hide=hide)}:{of_it} {_reason(found)}"


def _named(name: str, value: Any, *, hide: bool = False) -> str:
    """Write `NAME='value'`, or `NAME=***` for what may be a secret, such as a URL in the wrong variable."""
    name = name.upper()
    hide = hide or (bool(SECRET.search(name)) and name not in DEAD_KEYS)
    return f"{name}=***" if hide or "@" in str(value) else f"{name}={value!r}"


def _reason(found: Any) -> str:
    text = str(found["msg"])
    ours = text.removeprefix("Value error, ")  # which may begin with a name
    return ours if ours != text else text[:1].lower() + text[1:]
