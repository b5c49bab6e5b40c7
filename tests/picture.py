"""docs/pool-page.png, from a real run: a service as `make prod` runs it, under load, and its page in a real browser.

python tests/picture.py PROJECT, where PROJECT is a baked project after `make install` and `make load`
"""

import random
import sys
import time
from pathlib import Path

import chromium
from serving import free_port, postgres, run, served
from test_monitoring import LEAST, VIEWS, Trouble, clients

PICTURE = Path(__file__).parent.parent / "docs" / "pool-page.png"
SECONDS = 65
MOST_CLIENTS = 16


def main(project: Path) -> None:
    folder = project.parent / "picture"
    folder.mkdir(exist_ok=True)
    (folder / "troubled.py").write_text(VIEWS)
    port, chance = free_port(), random.Random(7)  # noqa: S311  # how busy it is from moment to moment
    with postgres(project, folder / "data", "pictured") as url, chromium.opened() as page:
        environ = LEAST | {"DATABASE_URL": url, "PYTHONPATH": str(folder), "WEB_TIMEOUT": "30"}
        environ |= {"WEB_CONCURRENCY": "3", "WEB_THREADS": "4", "WEB_GRACEFUL_TIMEOUT": "30"}
        assert run("APP_ENV=production .venv/bin/python -m flask db upgrade", project, **environ).returncode == 0
        with served("exec .venv/bin/python -m gunicorn troubled:app", project, port, **environ):
            page.open(f"http://127.0.0.1:{port + 1}/pool", 1120, 800)
            until = time.monotonic() + SECONDS
            with clients(Trouble(set(), "/api/notes", clients=3), port):
                while time.monotonic() < until:
                    many = chance.randint(2, MOST_CLIENTS)
                    with clients(Trouble(set(), "/open", clients=many), port):
                        page.wait_for(
                            f"performance.now() > {page.ask('performance.now()') + 1000 * chance.uniform(2, 7)}"
                        )
                with clients(Trouble(set(), "/open", clients=6), port):
                    time.sleep(3)
                    page.ask("1")
                    page.picture(PICTURE)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
