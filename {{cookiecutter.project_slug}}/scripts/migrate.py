"""What `make migrate` runs: write a migration for what changed in the models.

The models are compared with the database that the migrations make. That database is an empty Postgres of its own, since
Postgres is what production has: on SQLite, Alembic would write what SQLite alone understands.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from app import defaults
from scripts import postgres


def flask_db(url: str, *arguments: str) -> int:
    environ = {**os.environ, "APP_ENV": "development", "DATABASE_URL": url}
    return subprocess.run([sys.executable, "-m", "flask", "db", *arguments], env=environ, check=False).returncode


def main() -> int:
    message = sys.argv[1].strip() if len(sys.argv) > 1 else ""
    if not message:
        print('say what changed: make migrate m="add tags"', file=sys.stderr)
        return 2
    print("Comparing the models with the migrations, on a Postgres that is made for this: about 5 seconds", flush=True)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="migrate-") as folder,
            postgres.running(Path(folder) / "data", defaults.SERVICE_NAME, settings={"fsync": "off"}) as url,
        ):
            print("The database is ready: running the migrations, then comparing the models", flush=True)
            failed = flask_db(url, "upgrade") or flask_db(url, "migrate", "-m", message)
    except postgres.PostgresError as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    if not failed:
        print("Read it, then: make upgrade")
    return failed


if __name__ == "__main__":
    sys.exit(main())
