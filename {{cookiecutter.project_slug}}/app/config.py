"""The pool of each environment, and the settings: the environment variables that the service reads.

The library has those of the pools and of gunicorn. Only `flask pool limit` reads `DATABASE_ADMIN_URL`, which is not a
setting. README.md explains each setting. A setting of your own is one line in `Settings`, and one in `.env.example`.
"""

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from dotenv import dotenv_values
from pydantic import AfterValidator, BeforeValidator, Field, SecretStr
from pydantic_settings import NoDecode, PydanticBaseSettingsSource, SettingsConfigDict
from sqlalchemy.engine import URL

import flask_pooling
from app import defaults
from flask_pooling import DatabaseUrl, NullPool, Pools, QueuePool, SettingsError

# environment    a web worker   a shell, a cron job, a migration
POOLS: dict[str, Pools] = {
    "testing": (NullPool, NullPool),  # a SQLite file
    "development": (QueuePool, QueuePool),  # a SQLite file, or Postgres
    "production": (QueuePool, NullPool),  # Postgres, whose connections the plan counts
}
# A job of APP_JOBS has a QueuePool of its share everywhere but in tests.


class Environment(StrEnum):
    TESTING = "testing"
    DEVELOPMENT = "development"
    PRODUCTION = "production"


def _words(value: Any) -> Any:
    """Split `a,b`."""
    return [word.strip() for word in value.split(",") if word.strip()] if isinstance(value, str) else value


def _host(value: str) -> str:
    if not re.fullmatch(r"\.?[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", value):
        raise ValueError("is not a host name, such as notes.example.org, or .example.org with all below it")
    return value.lower()


Host = Annotated[str, AfterValidator(_host)]


class Settings(flask_pooling.Settings):
    """The service's settings. `DB_*`, `WEB_*`, `APP_INSTANCES`, `APP_JOBS` and `PORT` are in the library."""

    model_config = SettingsConfigDict(env_file=".env")

    service_name: ClassVar[str] = defaults.SERVICE_NAME
    strict: ClassVar[bool] = True

    app_env: Environment = Environment.PRODUCTION
    secret_key: SecretStr | None = None
    secret_key_fallbacks: Annotated[tuple[SecretStr, ...], NoDecode, BeforeValidator(_words)] = ()
    database_url: DatabaseUrl | None = None
    app_instances: int = Field(defaults.INSTANCES, ge=1, le=262_143)
    db_max_connections: int = Field(defaults.MAX_CONNECTIONS, ge=1, le=262_143)
    web_trusted_hosts: Annotated[tuple[Host, ...], NoDecode, BeforeValidator(_words)] = ()
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(str.upper)] = "INFO"

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        if self.app_env not in POOLS:
            yield f"APP_ENV={self.app_env}: has no row in POOLS of app/config.py; add one"
        if "APP_ENV" in _dotenv():
            yield "APP_ENV in .env: it is read from the environment alone, where `make` sets it; take it out of .env"
        yield from _secret_problems(self)
        yield from _database_problems(self)

    @classmethod
    def settings_customise_sources(
        cls, settings_cls: Any, init_settings: Any, env_settings: Any, dotenv_settings: Any, file_secret_settings: Any
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read `.env` as well in development. The environment comes first."""
        return (init_settings, env_settings, dotenv_settings) if _in_development() else (init_settings, env_settings)

    @classmethod
    def environment(cls) -> Mapping[str, str]:
        return {**_dotenv(), **os.environ} if _in_development() else os.environ

    @property
    def database(self) -> URL:
        """DATABASE_URL. Without it, a SQLite file: in instance/ for development, in the temporary folder for tests."""
        if self.database_url is not None:
            return self.database_url
        file = f"{defaults.SERVICE_NAME}.db"
        if self.app_env is Environment.TESTING:
            file = str(Path(tempfile.gettempdir()) / f"{defaults.SERVICE_NAME}-testing-{os.getpid()}.db")
        return URL.create("sqlite", database=file)

    @property
    def probe_port(self) -> int:
        """The port of the probes. Outside production there is none, unless WEB_PROBE_PORT is set."""
        return super().probe_port if self.in_production else self.web_probe_port or 0

    @property
    def in_production(self) -> bool:
        """True in production, and in an environment of your own: it has production's rules, too."""
        return self.app_env not in {Environment.TESTING, Environment.DEVELOPMENT}


def for_flask(settings: Settings) -> Mapping[str, Any]:
    """Return Flask's configuration."""
    secret = settings.secret_key
    return {
        "SECRET_KEY": secret.get_secret_value() if secret else "not-for-production",
        "SECRET_KEY_FALLBACKS": [old.get_secret_value() for old in settings.secret_key_fallbacks],
        "TRUSTED_HOSTS": list(settings.web_trusted_hosts) or None,
        "SESSION_COOKIE_SECURE": settings.in_production,
        "SESSION_COOKIE_SAMESITE": "Lax",
        "REMEMBER_COOKIE_SECURE": settings.in_production,  # Flask-Login's
        "REMEMBER_COOKIE_SAMESITE": "Lax",
        "MAX_CONTENT_LENGTH": 1024 * 1024,
        "SQLALCHEMY_DATABASE_URI": settings.database.render_as_string(hide_password=False),
    }


def _in_development() -> bool:
    """Read APP_ENV from the environment alone: `.env` cannot choose the environment in which it is read."""
    return os.environ.get("APP_ENV") == Environment.DEVELOPMENT


def _dotenv() -> dict[str, str]:
    try:
        values = dotenv_values(".env", encoding="utf-8-sig")  # an editor may have put a byte order mark at the start
    except UnicodeDecodeError as error:
        raise SettingsError([f".env: is not UTF-8 at byte {error.start}; save it as UTF-8"]) from None
    return {name: value for name, value in values.items() if value is not None}


PLACEHOLDERS = ("change", "secret", "password", "placeholder", "example", "default", "your-", "your_")
MIN_SECRET_LENGTH = 32
MIN_SECRET_CHARACTERS = 8  # different ones, which "aaaa..." does not have


def _secret_problems(settings: Settings) -> Iterator[str]:
    if not settings.in_production:
        return
    how = "; make one with: python -c 'import secrets; print(secrets.token_hex(32))'"
    secret = settings.secret_key.get_secret_value() if settings.secret_key else ""
    if not secret:
        yield f"SECRET_KEY is not set{how}"
    elif len(secret) < MIN_SECRET_LENGTH:
        yield f"SECRET_KEY=***: {len(secret)} characters, at least {MIN_SECRET_LENGTH} are needed{how}"
    elif len(set(secret)) < MIN_SECRET_CHARACTERS or any(word in secret.lower() for word in PLACEHOLDERS):
        yield f"SECRET_KEY=***: looks like a placeholder{how}"


def _database_problems(settings: Settings) -> Iterator[str]:
    server = settings.database_url.get_backend_name() if settings.database_url else ""
    if settings.in_production and not server:
        yield "DATABASE_URL is not set; production needs postgresql://user:password@host/name"
    elif settings.in_production and server != "postgresql":
        yield f"DATABASE_URL=***: production needs Postgres, not {server}"
    elif settings.app_env is Environment.TESTING and server not in {"", "sqlite"}:
        yield "DATABASE_URL=***: testing uses a SQLite file; tests on Postgres run with production's settings"
