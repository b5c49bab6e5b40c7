"""Connections that grow with the instances: many small processes, one or two real PgBouncers, one real Postgres.

Each instance is a process with the service's own engine. It holds all the connections that its plan allows, and keeps
sending statements through them, as if every slot were busy.
"""

import contextlib
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg

from tests.bench.project import DATABASE, HERE, MAX_CONNECTIONS, Project, free_port

FLEETS = [(10, 0), (50, 1), (50, 2), (200, 1), (200, 2), (1000, 1), (1000, 2)]
MACHINE = {"cpus": 1, "memory-mib": 1024}  # of one instance
LARGEST = 200  # instances that are started; a larger fleet is arithmetic
SECONDS = 5
START_SECONDS = 120


def planned(project: Project, instances: int, poolers: int) -> dict[str, Any]:
    """Return what `flask pool plan` says of a fleet."""
    pooler = {"DB_POOLER": "pgbouncer", "DB_POOLERS": str(poolers)} if poolers else {}
    options = [f"--{name}={value}" for name, value in {"instances": instances, **MACHINE}.items()]
    environ = pooler | {"DB_MAX_CONNECTIONS": str(MAX_CONNECTIONS)}
    plan = json.loads(project.run("flask", "pool", "plan", "--json", *options, **environ))
    sizes = project.run("flask", "pool", "plan", "--for-pgbouncer", *options, **environ) if poolers else ""
    return plan | {"sizes": sizes, "environ": environ | {"APP_INSTANCES": str(instances)}}


@contextlib.contextmanager
def pgbouncers(project: Project, count: int, sizes: str) -> Iterator[list[int]]:
    """Run them with the sizes of the plan; yield their ports."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="growth-")))
        folder.chmod(0o777)
        ports = [free_port() for _ in range(count)]
        for port in ports:
            settings = folder / f"{port}.ini"
            settings.write_text(
                f"[databases]\n* = host=127.0.0.1 port={project.port} user=app\n[pgbouncer]\n"
                f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
                f"auth_type = any\nadmin_users = app\npool_mode = transaction\nlogfile = {folder}/{port}.log\n{sizes}"
            )
            program = shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"
            command = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups", program, "-q", settings]
            process = subprocess.Popen(command, start_new_session=True)
            stack.callback(process.wait)
            stack.callback(process.send_signal, signal.SIGTERM)
            wait_for_port(port)
        yield ports


def wait_for_port(port: int) -> None:
    give_up = time.monotonic() + START_SECONDS
    while True:
        try:
            psycopg.connect(f"postgresql://app@127.0.0.1:{port}/{DATABASE}", prepare_threshold=None).close()
        except psycopg.OperationalError:
            if time.monotonic() > give_up:
                raise
            time.sleep(0.05)
        else:
            return


def measured(project: Project, instances: int, plan: dict[str, Any], ports: list[int]) -> dict[str, Any]:
    """Start so many instances, and count what is open at the server and at the poolers."""
    command = [HERE / "inside" / "growth.py", str(instances), str(plan["connections_per_instance"])]
    urls = [f"postgresql://app@127.0.0.1:{port}/{DATABASE}" for port in ports or [project.port]]
    fleet = subprocess.Popen(
        [sys.executable, *command, *urls],
        cwd=project.folder,
        env=project.environ(PYTHONPATH=str(project.folder), **plan["environ"]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    peak, over = [0], threading.Event()

    def watch() -> None:
        while not over.wait(0.05):
            peak[0] = max(peak[0], project.held("app"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        assert fleet.stdout
        failed = int(fleet.stdout.readline())
        time.sleep(SECONDS)
        clients = sum(map(clients_of, ports))
    finally:
        answers = fleet.communicate("stop", timeout=START_SECONDS)[0]
        over.set()
        watcher.join()
    return {"failed": failed, "server": peak[0], "clients": clients, "statements": int(answers)}


def clients_of(port: int) -> int:
    """The clients that a PgBouncer counts."""
    with psycopg.connect(f"postgresql://app@127.0.0.1:{port}/pgbouncer", autocommit=True) as console:
        return sum(1 for row in console.execute("show clients").fetchall() if DATABASE in row)


def grow(project: Project, fleets: list[tuple[int, int]]) -> list[dict[str, Any]]:
    rows = []
    for instances, poolers in fleets:
        plan = planned(project, instances, poolers)
        row = {
            "instances": instances,
            "poolers": poolers,
            "clients_planned": plan["connections_peak"],
            "usable": plan["connections_usable"],
            "sum": plan["sum"],
        }
        if instances <= LARGEST:
            with pgbouncers(project, poolers, plan["sizes"]) as ports:
                row |= measured(project, instances, plan, ports)
        rows.append(row)
    return rows
