"""PgBouncer in transaction mode, with fewer server connections than the service has clients."""

import threading
from collections import Counter
from collections.abc import Callable

import psycopg
import pytest

from chaos.harness import Copy, Load, Postgres, Project, Request, Result, missing, pgbouncer, record

SERVER_CONNECTIONS = 4


@pytest.fixture(autouse=True)
def tools() -> None:
    assert not missing("pgbouncer"), missing("pgbouncer")


def everything(number: int) -> Request:
    """Send only writes for a while, in turns: psycopg counts towards a prepared statement until there is a rollback."""
    if number // 300 % 2 == 0:
        return "POST", "/api/notes", b'{"title": "pooled"}'
    return [
        ("GET", f"/chaos/echo/{number}", b""),
        ("GET", "/api/notes?limit=3", b""),
        ("POST", "/api/notes", b'{"title": "pooled"}'),
        ("GET", f"/chaos/echo/{number}", b""),
        ("POST", "/chaos/settings", b""),
    ][number % 5]  # type: ignore[return-value]


def pooled(project: Project, postgres: Postgres, requests: int) -> Result:
    result = Result(
        "PgBouncer in transaction mode", f"{requests} requests, 24 clients, {SERVER_CONNECTIONS} server connections",
        "no error; no setting of one client seen by another",
    )  # fmt: skip
    leaked: Counter[str] = Counter()
    over = threading.Event()

    def neighbour(url: str) -> None:
        """Run another client of the same pooler, which sets nothing and must see nothing set."""
        with psycopg.connect(url, autocommit=True, prepare_threshold=None) as connection:
            while not over.wait(0.01):
                for name in ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout"):
                    row = connection.execute(f"show {name}").fetchone()
                    assert row
                    leaked[f"{name}={row[0]}"] += 1

    with pgbouncer(postgres, server_connections=SERVER_CONNECTIONS) as url:
        with Copy(project, url, DB_POOLER="pgbouncer", APP_INSTANCES=2) as copy:
            watch = threading.Thread(target=neighbour, args=(url,), daemon=True)
            watch.start()
            load = Load(copy.port, everything, clients=24, requests=requests).run()
            over.set()
            watch.join(5)
            prepared = copy.text().count("prepared statement")
        most = len(postgres.backends())
    foreign = sum(
        a.json["number"] != int(a.path.rsplit("/", 1)[1]) for a in load.answers if a.status == 200 and "echo" in a.path
    )
    own = Counter(a.json["statement_timeout"] for a in load.answers if a.status == 200 and "settings" in a.path)
    seen = {name: count for name, count in leaked.items() if not name.endswith("=0")}
    result.counted = {"answers": dict(load.kinds()), "prepared statement errors": prepared, "foreign rows": foreign,
                      "leaked settings": seen, "statement_timeout of ours": dict(own),
                      "server connections": most}  # fmt: skip
    result.expect(set(load.kinds()) <= {"200", "201"}, f"answers {dict(load.kinds())}")
    result.expect(prepared == 0, f"{prepared} prepared statement errors")
    result.expect(foreign == 0, f"{foreign} foreign rows")
    result.expect(not seen, f"seen by another client: {seen}")
    result.expect(set(own) == {"15000"}, f"our own statement_timeout: {dict(own)}")
    return result


def test_pgbouncer(baked: Project, postgres: Postgres, long: bool) -> None:
    assert not record(pooled(baked, postgres, 100_000 if long else 1500)).missed


@pytest.mark.long
def test_generated_suite(baked: Project, postgres: Postgres) -> None:
    """The project's own suite, behind the pooler from its first migration on. What it leaves out are the tests of
    connections to the server itself, such as how many there are: it says how many tests these were."""
    result = Result("PgBouncer in transaction mode", "the generated project's own suite", "passes through it")
    postgres.ask("create database test owner app")
    with pgbouncer(postgres, server_connections=SERVER_CONNECTIONS) as url:
        env = {"TEST_DATABASE_URL": url.replace("/service", "/test"), "TEST_DB_POOLER": "pgbouncer"}
        done = baked.run("pytest", "--database", "postgres", "--no-header", env=env, timeout=600)
    result.counted = {"pytest": done.stdout.strip().splitlines()[-1]}
    failed = "; ".join(line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR")))
    result.expect(done.returncode == 0, failed[-3000:])
    assert not record(result).missed


@pytest.mark.parametrize("name", ["prepare_threshold=None", "SET LOCAL"])
@pytest.mark.long
def test_sabotage(name: str, sabotaged: Callable[[str], Project], postgres: Postgres) -> None:
    assert record(pooled(sabotaged(name), postgres, 1500), sabotaged=name).missed
