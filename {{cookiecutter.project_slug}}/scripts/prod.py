"""`make prod`: the app with production's settings on this machine.

On DATABASE_URL if that is set, else on a Postgres of its own under instance/, which is kept for the next time. The
secret is made up for this run. Ctrl-C stops gunicorn, and then Postgres.
"""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType

from app import defaults
from scripts import postgres

DATA = Path("instance") / "postgres"


@contextlib.contextmanager
def database() -> Iterator[str]:
    if os.environ.get("DATABASE_URL"):
        yield os.environ["DATABASE_URL"]
        return
    given = os.environ.get("DB_MAX_CONNECTIONS", str(defaults.MAX_CONNECTIONS))
    if not given.isdecimal():
        raise postgres.PostgresError(f"DB_MAX_CONNECTIONS={given!r}: is not a whole number")
    max_connections = int(given)
    print(f"Starting Postgres in {DATA}, max_connections={max_connections} (or set DATABASE_URL)", flush=True)
    with postgres.running(DATA, defaults.SERVICE_NAME, max_connections=max_connections, keep=True) as url:
        print(f"Postgres is at DATABASE_URL='{url}'", flush=True)
        yield url


def serve(environ: Mapping[str, str]) -> int:
    """Migrate, then run gunicorn until it ends, or until this is to end: SIGTERM, or a terminal that is closed."""
    quietly = [sys.executable, "-m", "scripts.quietly"]
    migrated = subprocess.run([*quietly, "flask", "db", "upgrade"], env=environ, check=False)
    if migrated.returncode:
        return migrated.returncode
    gunicorn = subprocess.Popen([*quietly, "gunicorn"], env=environ)

    def stop_it(number: int, frame: FrameType | None) -> None:
        gunicorn.terminate()

    signal.signal(signal.SIGTERM, stop_it)
    signal.signal(signal.SIGHUP, stop_it)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to gunicorn as well
    return gunicorn.wait()


def interrupt_politely() -> None:
    """Ctrl-C, SIGTERM and a terminal that is closed all end what was started: Postgres would go on by itself."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # scripts/quietly.py had set another
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGHUP, stop)


def stop(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def main() -> int:
    interrupt_politely()
    secret = os.environ.get("SECRET_KEY") or secrets.token_hex(32)
    try:
        with database() as url:
            return serve({**os.environ, "APP_ENV": "production", "DATABASE_URL": url, "SECRET_KEY": secret})
    except postgres.PostgresError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before gunicorn took over
        return 130


if __name__ == "__main__":
    sys.exit(main())
