"""One cell: a workload, by so many clients, on one server that is running."""

import json
import shutil
import subprocess
import threading
import time
from typing import Any

from tests.bench.project import HERE, ROWS, Project
from tests.bench.servers import Server

WORKLOADS = {
    "read": "GET one note",
    "page": "GET a page of 20",
    "write": "POST a note",
    "slow": "GET a query of 50 ms",
    "mixed": "nine of read, then one of slow",
    "waits": "half of read, half of slow",
    "largest": "GET a page of the most and longest notes that there can be",
}
WRITES = {"write"}
SAMPLE_SECONDS = 0.25


def wrk() -> str:
    found = shutil.which("wrk")
    if not found:
        raise SystemExit("wrk is not installed: apt-get install wrk")
    return found


def drive(server: Server, workload: str, clients: int, seconds: float) -> dict[str, Any]:
    """Load from wrk, and what it saw."""
    size = f"-t1 -c{clients} -d{max(1, round(seconds))}s --timeout 10s".split()
    ran = subprocess.run(
        [wrk(), *size, "-s", HERE / "load.lua", f"http://127.0.0.1:{server.port}", "--", workload, str(ROWS)],
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(ran.stdout.splitlines()[-1])


def measure(
    project: Project, server: Server, workload: str, clients: int, seconds: float, warm_up: float
) -> dict[str, Any]:
    """Measure after a warm-up, and return the row of results."""
    drive(server, workload, clients, warm_up)
    server.settle()
    opened, cpu, start = project.opened(), server.cpu_seconds(), time.perf_counter()
    with Watch(project, server.role) as watch:
        seen = drive(server, workload, clients, seconds)
    elapsed, cpu = time.perf_counter() - start, server.cpu_seconds() - cpu
    server.settle()
    if workload in WRITES:
        project.reset()
    good = seen["requests"] - seen["failed"]
    return {
        "candidate": server.candidate.name,
        "workload": workload,
        "clients": clients,
        "requests_per_second": good / seen["seconds"],
        "p50_ms": seen["p50_ms"],
        "p99_ms": seen["p99_ms"],
        "failed": seen["failed"] + seen["broken"],
        "requests": seen["requests"],
        "cpu_us_per_request": cpu / max(1, seen["requests"]) * 1e6,
        "cpus_busy": cpu / elapsed,
        "connections_held": watch.most,
        "connections_opened": project.opened() - opened,
    }


class Watch:
    """The most connections that a role held at once."""

    def __init__(self, project: Project, role: str) -> None:
        self.most = 0
        self._project, self._role = project, role
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self) -> None:
        while not self._done.wait(SAMPLE_SECONDS):
            self.most = max(self.most, self._project.held(self._role))

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
