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

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, ValidationError
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict
from pydantic_settings import SettingsError as NoJson
from sqlalchemy.engine import URL

from flask_pooling import machine, sizing
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
BIND_SERVER = re.compile(r"([\w.-]+(?:\+[\w.-]+)*)=([1-9][0-9]{0,6})(?::([0-9]{1,5}))?", re.ASCII)
# The numbers of a plan, and the settings that they come from.
PLANNED_WITH = {
    "instances": "app_instances", "jobs": "app_jobs", "max_connections": "db_max_connections",
    "reserved": "db_reserved_connections", "binds": "db_binds", "bind_servers": "db_bind_servers",
    "pool_size": "db_pool_size", "max_overflow": "db_max_overflow", "pooler": "db_pooler", "poolers": "db_poolers",
    "workers": "web_concurrency", "threads": "web_threads", "worker_class": "web_worker_class",
    "worker_memory_mib": "web_worker_memory_mib",
}  # fmt: skip
# How similar two names are, by difflib. A name with one letter of twenty wrong or missing can be nothing else.
MISSPELT, LIKE = 0.95, 0.9

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
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(value.removeprefix("[").removesuffix("]")))
    if not re.fullmatch(r"[\w.-]+", value):
        raise ValueError("is not an address; the port is set by PORT")
    return value


Seconds = Annotated[float, Field(ge=0.1, le=86_400)]
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
        frozen=True, extra="ignore", arbitrary_types_allowed=True, env_file_encoding="utf-8-sig", env_ignore_empty=True
    )

    # A name that is almost one of these stops the start. In an app that takes the library in, it is a warning.
    strict: ClassVar[bool] = False

    _name: str = PrivateAttr("flask")

    app_job: str | None = Field(None, pattern="^[a-z][a-z0-9_-]*$")
    app_instances: int = Field(2, ge=1, le=262_143)
    app_jobs: Jobs = Field(default_factory=dict)
    port: int = Field(8000, ge=1, le=MAX_PORT - 1)  # the next one is the probes'

    db_max_connections: int = Field(100, ge=1, le=262_143)  # Postgres's own maximum
    db_reserved_connections: int = Field(sizing.DEFAULT_RESERVED, ge=0, le=100_000)
    db_binds: int = Field(0, ge=0, le=100)
    db_bind_servers: BindServers = Field(default_factory=dict)
    db_pool_size: int | None = Field(None, ge=1, le=1000)  # 0 would mean "without limit" to SQLAlchemy
    db_max_overflow: int = Field(0, ge=0, le=1000)
    db_connect_timeout: int = Field(3, ge=2, le=60)  # libpq takes whole seconds, and 1 as 2
    db_pool_timeout: Seconds = 5
    db_statement_timeout: Seconds = 15
    db_max_lifetime: Seconds = 1800
    db_hold_warning: float = Field(2, ge=0, le=86_400)  # 0: none
    db_pooler: Literal["none", "pgbouncer"] = "none"
    db_poolers: int = Field(1, ge=1, le=1000)
    db_budget_check: Literal["enforce", "warn", "off"] = "enforce"

    web_concurrency: int | None = Field(None, ge=1, le=1000)
    web_threads: int | None = Field(None, ge=1, le=1000)
    web_worker_class: Literal["gthread", "sync"] = "gthread"
    web_worker_memory_mib: int = Field(sizing.DEFAULT_WORKER_MEMORY_MIB, ge=1, le=100_000)
    web_timeout: int = Field(30, ge=1, le=3600)
    web_graceful_timeout: int = Field(30, ge=1, le=3600)
    web_trusted_proxies: int = Field(0, ge=0, le=10)
    web_host: Address = "127.0.0.1"
    web_probe_port: int | None = Field(None, ge=0, le=MAX_PORT)

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
        wrong: set[str] = set()
        try:
            settings = cls(**given)
        except NoJson as error:  # in a list or a model of the app's own; pydantic looks no further
            (field,) = re.findall('field "(.+?)"', str(error))
            raise SettingsError([*problems, f'{field.upper()}: is not JSON, such as ["one", "two"]']) from None
        except ValidationError as error:
            told = [found for found in error.errors() if not (numbers_only and _is_the_apps(found))]
            problems += [_problem(cls, found, environ) for found in told]
            # Values that depend on each other are checked with defaults in the place of the wrong ones.
            wrong = {str(found["loc"][0]) for found in error.errors() if found["loc"]}
            fields = cls.model_fields
            defaults = {name: fields[name].get_default(call_default_factory=True) for name in wrong & fields.keys()}
            try:
                settings = cls(**given | defaults)
            except ValidationError:  # one of them has no default
                raise SettingsError(problems or [_problem(cls, found, environ) for found in error.errors()]) from None
        settings._name = name
        if not numbers_only:
            problems += [said for said in settings.problems() if not any(name.upper() in said for name in wrong)]
        if problems:
            raise SettingsError(problems)
        return settings

    @classmethod
    def environment(cls) -> Mapping[str, str]:
        """Return the variables that are set. A class that reads more than the environment overrides this."""
        return os.environ

    def problems(self) -> Iterator[str]:
        """Name the values that are right one by one, but not together. A class that derives from this adds its own."""
        # Each wait must end before the one around it, which would give up on work that still runs.
        connect, wait, statement = self.db_connect_timeout, self.db_pool_timeout, self.db_statement_timeout
        if connect > wait:
            yield f"DB_CONNECT_TIMEOUT={connect:g} must be at most DB_POOL_TIMEOUT={wait:g}"
        if wait >= statement:
            yield f"DB_POOL_TIMEOUT={wait:g} must be less than DB_STATEMENT_TIMEOUT={statement:g}"
        for name, outer in ("WEB_TIMEOUT", self.web_timeout), ("WEB_GRACEFUL_TIMEOUT", self.web_graceful_timeout):
            if statement >= outer:
                yield f"DB_STATEMENT_TIMEOUT={statement:g} must be less than {name}={outer:g}"
        try:
            self.plan  # noqa: B018  # it is made, and kept
        except sizing.TooLittleMemoryError:
            pass  # gunicorn.conf.py asks for the plan, and a job in a small container needs none
        except sizing.PlanError as error:
            yield str(error)

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
            said = f"{dead}={_shown(names[dead])}: {why}"
            if str((options or {}).get(dead.removeprefix("SQLALCHEMY_").lower())) == str(names[dead]):
                log.warning("%s", said)
            else:
                yield said


def _misspelt(environ: Mapping[str, str], settings: type[Settings]) -> Iterator[str]:
    """Name each variable that is almost one of our settings.

    If the class is strict, a name that can be nothing else is a problem, if its value is a number. A less similar one
    is a warning, since other programs have settings, too.
    """
    known = [name.upper() for name in settings.model_fields]
    for name in sorted(environ.keys() - known):
        words = set(name.split("_"))
        longer = [each for each in known if "DB" in words and words < set(each.split("_"))]  # DB_POOL: DB_POOL_SIZE
        near = difflib.get_close_matches(name, known, n=1, cutoff=LIKE) or longer
        if not near:
            continue
        readable, said = ascii(name)[1:-1], f"no such setting; did you mean {near[0]}?"
        is_number = environ[name].isdecimal()  # and so no secret
        if settings.strict and is_number and difflib.get_close_matches(name, near, cutoff=MISSPELT):
            yield f"{readable}={environ[name]!r}: {said}"
        else:
            log.warning("%s: %s", readable, said)


def _is_the_apps(found: Any) -> bool:
    """Return whether the error is about a setting that an app has added."""
    return bool(found["loc"]) and found["loc"][0] not in Settings.model_fields


def _problem(settings: type[Settings], found: Any, environ: Mapping[str, str]) -> str:
    """Write `NAME='value': what is wrong`, or `NAME=***` for what may be a secret: a setting of the app's own that is
    no number and no choice."""
    reason = str(found["msg"]).removeprefix("Value error, ")
    if not found["loc"]:  # a validator of the whole model has said it
        return reason
    field, *parts = map(str, found["loc"])
    name, value = field.upper(), environ.get(field.upper())
    if found["type"] == "missing":
        return f"{name} is not set"
    kind = settings.model_fields[field].annotation if field in settings.model_fields else None
    is_harmless = not _is_the_apps(found) or (isinstance(kind, type) and issubclass(kind, int | float | StrEnum))
    shown = _shown(value) if is_harmless else "***"
    return f"{name}={shown}: {''.join(f'{part}: ' for part in parts)}{reason}"


def _shown(value: Any) -> str:
    """Hide what may be a database's URL: it lands in the wrong variable easily."""
    return "***" if "@" in str(value) else repr(value)
