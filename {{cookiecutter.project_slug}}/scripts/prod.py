"""`make prod`: the app with production's settings on this machine.

It uses DATABASE_URL if that is set, else a Postgres of its own under instance/, which is kept for the next time. The
secret is made for this run. Ctrl-C, SIGTERM and a closed terminal stop gunicorn, and then Postgres.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

DATA = Path("instance") / "postgres"


def stop(number: int, frame: FrameType | None) -> None:
    sys.exit(0 if number == signal.SIGINT else 128 + number)


@contextlib.contextmanager
def database() -> Iterator[str]:
    from app import defaults  # noqa: PLC0415  # here, so that Ctrl-C is handled while it loads
    from scripts import postgres  # noqa: PLC0415

    if url := os.environ.get("DATABASE_URL"):
        yield url
        return
    given = os.environ.get("DB_MAX_CONNECTIONS") or str(defaults.MAX_CONNECTIONS)
    if not given.isdecimal():
        sys.exit(f"DB_MAX_CONNECTIONS={given!r}: is not a whole number")
    print(f"Starting Postgres in {DATA}, max_connections={given} (set DATABASE_URL to use another)", flush=True)
    try:
        with postgres.running(DATA, defaults.SERVICE_NAME, max_connections=int(given), keep=True) as url:
            print(f"Postgres is at DATABASE_URL='{url}'", flush=True)
            yield url
    except postgres.PostgresError as error:
        sys.exit(str(error))


def run(*command: str) -> int:
    """Run a command to its end. Whatever ends this script ends the command first."""
    # In a group of its own: Ctrl-C reaches this script alone, which then sends SIGTERM to the command.
    process = subprocess.Popen([sys.executable, "-m", *command], process_group=0)
    try:
        return process.wait()
    finally:
        process.terminate()
        process.wait()


def main() -> int:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    with database() as url:
        os.environ |= {"APP_ENV": "production", "DATABASE_URL": url}
        os.environ["SECRET_KEY"] = os.environ.get("SECRET_KEY") or secrets.token_hex(32)
        if not os.environ.get("WEB_CONCURRENCY"):
            os.environ.pop("WEB_CONCURRENCY", None)  # gunicorn fails on an empty one
        return run("flask", "db", "upgrade") or run("gunicorn")


if __name__ == "__main__":
    sys.exit(main())
