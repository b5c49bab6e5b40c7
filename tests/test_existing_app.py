"""docs/existing-app.md, done to an app that this template has not made: it gets a plan, and keeps to it under load."""

import contextlib
import re
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from baking import ROOT
from serving import CLEAN, ask, free_port, postgres

DOCUMENT = (ROOT / "docs" / "existing-app.md").read_text()
SHOP = ROOT / "tests" / "inside" / "shop_app"
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
NUMBERS = {"APP_INSTANCES": "1", "DB_MAX_CONNECTIONS": "60", "WEB_CONCURRENCY": "2", "WEB_THREADS": "3"}
PEAK = 2 * 3


def edit(folder: Path, diff: str) -> None:
    """Do what a diff of the document says: lines that go have to be there."""
    header, *lines = diff.splitlines()
    path = folder / header.removeprefix("--- ")
    text, at = path.read_text().splitlines(), 0
    for line in lines:
        kind, rest = line[:1], line[1:]
        if kind == "+":
            text.insert(at, rest)
            at += 1
        else:
            assert rest in text[at:], f"{path.name} has no line {rest!r}"
            at = text.index(rest, at)
            if kind == "-":
                del text[at]
            else:
                at += 1
    path.write_text("\n".join(text) + "\n")


@pytest.fixture(scope="module")
def shop(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The foreign app, after all that the document says."""
    folder = shutil.copytree(SHOP, tmp_path_factory.mktemp("foreign") / "shop_app")
    (folder / ".." / "my_service").symlink_to(installed)
    copy = re.search(r"^\$ (cp .+)$", DOCUMENT, re.MULTILINE)
    assert copy
    subprocess.run(["sh", "-c", copy[1]], cwd=folder, check=True)
    settings, busy = (code for language, code in BLOCKS if language == "python")
    (folder / "shop" / "settings.py").write_text(settings)
    with (folder / "shop" / "__init__.py").open("a") as factory:
        factory.write(f"\n\n{busy}")
    for language, code in BLOCKS:
        if language == "diff":
            edit(folder, code)
    return folder


def environ(installed: Path, url: str, **more: str) -> dict[str, str]:
    path = f"{installed / '.venv' / 'bin'}:{CLEAN['PATH']}"
    return CLEAN | NUMBERS | {"PATH": path, "DATABASE_URL": url, "PYTHONDONTWRITEBYTECODE": "1"} | more


def say(command: str, folder: Path, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", command],
        cwd=folder,
        env=environ,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.fixture(scope="module")
def database(shop: Path, installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with postgres(installed, tmp_path_factory.mktemp("postgres") / "data", "shop") as url:
        filled = say("flask --app shop fill", shop, environ(installed, url))
        assert filled.returncode == 0, filled.stdout
        yield url


@contextlib.contextmanager
def served(shop: Path, settings: dict[str, str], command: str = "gunicorn", *, ready: int = 200) -> Iterator[str]:
    port = free_port()
    with (shop.parent / f"{port}.log").open("w+") as log:
        there = settings | {"PORT": str(port)}
        server = subprocess.Popen(["sh", "-c", f"exec {command}"], cwd=shop, env=there, stdout=log, stderr=log)
        try:
            address, give_up = f"http://127.0.0.1:{port}", time.monotonic() + 120
            while True:
                with contextlib.suppress(OSError):
                    if ask(address, "/readyz")[0] == ready:
                        break
                log.seek(0)
                assert server.poll() is None, log.read()
                assert time.monotonic() < give_up, log.read()
                time.sleep(0.1)
            yield address
        finally:
            server.terminate()
            server.wait(20)


def test_the_app_before(installed: Path, tmp_path: Path):
    """Without the document, the guide's keys do nothing, and nobody says so."""
    code = "from shop import create_app; a = create_app(); from shop.models import db\n"
    code += "with a.app_context(): print(db.engine.pool.size(), db.engine.pool._max_overflow)"
    settings = environ(installed, "sqlite:///shop.db") | {"PYTHONPATH": str(SHOP)}
    done = subprocess.run(
        ["python", "-c", code], cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=600, check=True
    )
    assert done.stdout.split() == ["5", "10"]


def test_the_dead_keys_are_named(shop: Path, installed: Path, database: str, tmp_path: Path):
    """An app that keeps them does not start, and hears of each of them at once."""
    folder = shutil.copytree(shop, tmp_path / "shop_app")
    shutil.copy(SHOP / "shop" / "config.py", folder / "shop" / "config.py")
    done = say("flask --app shop pool plan", folder, environ(installed, database))
    for key in ("SQLALCHEMY_POOL_SIZE=20", "SQLALCHEMY_MAX_OVERFLOW=0", "SQLALCHEMY_POOL_RECYCLE=3600"):
        assert re.search(rf"{key}: .*ignored this key since 3\.0", done.stdout), done.stdout


def test_plan_and_check(shop: Path, installed: Path, database: str):
    """The commands of the document show the plan, and that it fits."""
    settings = environ(installed, database)
    plan = say("flask --app shop pool plan", shop, settings)
    assert "1 instance x 2 workers x (3 + 0) = 6 of 47 connections" in plan.stdout
    assert say("flask --app shop pool check", shop, settings | {"DB_MAX_CONNECTIONS": "100"}).returncode == 0


def test_too_many_instances_are_refused(shop: Path, installed: Path, database: str):
    """The sum is shown, with what would help, and nothing is served."""
    port = str(free_port())
    done = say("gunicorn", shop, environ(installed, database, APP_INSTANCES="60", PORT=port))
    assert done.returncode != 0
    assert re.search(r"60 instances x \d+ connections .* > 47 usable", done.stdout), done.stdout
    assert "what would help" in done.stdout
    assert "Traceback" not in done.stdout


def test_under_load(shop: Path, installed: Path, database: str):
    """More clients than the plan has connections: all are served, the peak is the plan's, and no two processes share a
    connection of the server."""
    counted, over = [], []
    with (
        served(shop, environ(installed, database)) as address,
        psycopg.connect(database, autocommit=True) as connection,
        ThreadPoolExecutor(25) as clients,
    ):

        def count() -> None:
            while not over:
                (held,) = connection.execute(
                    "select count(*) from pg_stat_activity where application_name = 'shop'"
                ).fetchone()
                counted.append(held)
                time.sleep(0.02)

        counting = clients.submit(count)
        answers = list(clients.map(lambda _: ask(address, "/slow/0.05"), range(120)))
        over.append(True)
        counting.result()
        assert Counter(status for status, _ in answers) == {200: 120}
        assert 0 < max(counted) <= PEAK
        workers = {}
        for _, answer in answers:
            workers.setdefault(answer["connection"], set()).add(answer["worker"])
        assert len(workers) > 2
        assert all(len(processes) == 1 for processes in workers.values())
        bought = [ask(address, "/products/1/orders", "POST", customer=f"Customer {number}") for number in range(5)]
        assert [status for status, _ in bought] == [201] * 5


def test_a_statement_that_takes_too_long_is_a_503(shop: Path, installed: Path, database: str):
    """A read may be sent again; and it was the limit of the plan's settings that ended it."""
    limits = {"DB_CONNECT_TIMEOUT": "2", "DB_POOL_TIMEOUT": "2", "DB_STATEMENT_TIMEOUT": "2.5"}
    with served(shop, environ(installed, database, **limits)) as address:
        assert ask(address, "/slow/6") == (503, "The database is busy.")
        assert ask(address, "/slow/0")[0] == 200


def test_in_development(shop: Path, installed: Path, database: str):
    """`flask run` serves there, as the document says, and in production only gunicorn.conf.py does."""
    command = re.search(r"^\$ APP_ENV=development (flask .* run)$", DOCUMENT, re.MULTILINE)[1]
    settings = environ(installed, database)
    with served(shop, settings | {"APP_ENV": "development"}, f"{command} --port $PORT") as address:
        assert ask(address, "/slow/0")[0] == 200
    with served(shop, settings, f"{command} --port $PORT", ready=503) as address:
        assert ask(address, "/slow/0")[0] == 503
