"""The settings: strict, all problems at once, and never a secret in a message. tests/library has the rest of them."""

import secrets
from pathlib import Path

import pytest

from app.config import Environment, Settings
from flask_pooling import SettingsError

pytestmark = [pytest.mark.sqlite, pytest.mark.usefixtures("production")]  # no database in it: once is enough


def problems() -> tuple[str, ...]:
    with pytest.raises(SettingsError) as caught:
        Settings.load()
    return caught.value.problems


def test_production_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without APP_ENV the strict rules apply."""
    monkeypatch.delenv("APP_ENV")
    assert Settings.load().app_env is Environment.PRODUCTION


@pytest.mark.parametrize("environment", ["testing", "development"])
def test_outside_production_nothing_has_to_be_set(monkeypatch: pytest.MonkeyPatch, environment: str) -> None:
    """SQLite in a file, and a fixed secret."""
    monkeypatch.setenv("APP_ENV", environment)
    for name in ("DATABASE_URL", "SECRET_KEY"):
        monkeypatch.delenv(name)
    database = Settings.load().database
    assert database.get_backend_name() == "sqlite"
    assert database.database not in {None, "", ":memory:"}


def test_production_needs_a_secret_and_a_postgres(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are said at once."""
    for name in ("DATABASE_URL", "SECRET_KEY"):
        monkeypatch.delenv(name)
    secret, database = problems()
    assert secret.startswith("SECRET_KEY is not set")
    assert database.startswith("DATABASE_URL is not set")
    monkeypatch.setenv("SECRET_KEY", secrets.token_hex(32))
    monkeypatch.setenv("DATABASE_URL", "sqlite:///hunter2.db")
    assert problems() == ("DATABASE_URL=***: production needs Postgres, not sqlite",)


def test_testing_never_touches_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """A DATABASE_URL left over in the shell must not be emptied by a test."""
    monkeypatch.setenv("APP_ENV", "testing")
    assert "SQLite file" in problems()[0]


@pytest.mark.parametrize(
    "secret", ["", "short", "x" * 31, "a" * 64, "changeme" * 8, "my-super-Secret-key-that-is-long-enough"]
)
def test_a_bad_secret_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch, secret: str) -> None:
    """Short, or a placeholder that somebody copied. The command in the message makes one that is accepted."""
    monkeypatch.setenv("SECRET_KEY", secret)
    (problem,) = problems()
    assert problem.startswith("SECRET_KEY")
    assert "secrets.token_hex(32)" in problem
    assert not secret or secret not in problem
    monkeypatch.setenv("SECRET_KEY", secrets.token_hex(32))
    assert "hunter2" not in repr(Settings.load())


def test_all_problems_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not one for each attempt to start."""
    wrong = {
        "APP_ENV": "prod",
        "APP_INSTANCES": "many",
        "DB_POOLSIZE": "5",
        "SQLALCHEMY_POOL_SIZE": "20",
        "DB_STATEMENT_TIMEOUT": "60",
        "PORT": "http",
    }
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    found = problems()
    for name in wrong:
        assert any(problem.startswith(f"{name}=") for problem in found), name


def test_a_dotenv_counts_in_development_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And what is set in the environment comes before it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("WEB_THREADS=7\nWEB_TIMEOUT=50\n")
    monkeypatch.setenv("WEB_TIMEOUT", "40")
    assert Settings.load().web_threads is None
    monkeypatch.setenv("APP_ENV", "development")
    settings = Settings.load()
    assert (settings.web_threads, settings.web_timeout) == (7, 40)
