"""Interleaved rounds: in each, all candidates are started, and each cell is measured on one after the other, in an
order that turns with the rounds. What is compared was then measured seconds apart, and a slow minute of the machine
hits all of them alike."""

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.bench import load, machine
from tests.bench.project import Project
from tests.bench.proxy import counting
from tests.bench.servers import Candidate, Server, serving

WARM_UP_CLIENTS = 32
COUNTED_REQUESTS = 50
Row = dict[str, Any]


def run(
    project: Project,
    candidates: Sequence[Candidate],
    *,
    workloads: Sequence[str],
    clients: Sequence[int],
    rounds: int,
    seconds: float,
    warm_up: float,
    say: Callable[[str], None],
) -> list[Row]:
    rows: list[Row] = []
    for number in range(rounds):
        turn = number % len(candidates)
        order = [*candidates[turn:], *candidates[:turn]]
        with contextlib.ExitStack() as stack:
            servers = [stack.enter_context(serving(project, candidate)) for candidate in order]
            for workload in workloads:
                for at_once in clients:
                    for server in servers:
                        row = load.measure(project, server, workload, at_once, seconds, warm_up)
                        rows.append({"round": number, **row})
                        say(
                            f"round {number + 1}/{rounds} {workload:<5} {at_once:>3} clients"
                            f" {server.candidate.name:<12}"
                            f" {row['cpu_us_per_request']:>6.0f} us {row['requests_per_second']:>8.0f}/s"
                            f" p99 {row['p99_ms']:>6.1f} ms {row['failed']} failed"
                        )
            for server in servers:
                rows.append({"round": number, "candidate": server.candidate.name, **machine.memory(server.pid)})
    return rows


def count(project: Project, candidates: Sequence[Candidate], workloads: Sequence[str]) -> list[Row]:
    """Round trips to the server for each request, on the wire, once every connection and statement is warm."""
    rows: list[Row] = []
    for candidate in candidates:
        with counting(project.port) as (port, counts), serving(project, candidate, port) as server:
            for workload in workloads:
                load.drive(server, workload, WARM_UP_CLIENTS, 1)
                server.settle()
                before = counts.snapshot()
                for _ in range(COUNTED_REQUESTS):
                    ask(server, workload)
                connections, round_trips = (b - a for a, b in zip(before, counts.snapshot(), strict=True))
                rows.append(
                    {
                        "candidate": candidate.name,
                        "workload": workload,
                        "round_trips_per_request": round_trips / COUNTED_REQUESTS,
                        "connections_per_request": connections / COUNTED_REQUESTS,
                    }
                )
        project.reset()
    return rows


def ask(server: Server, workload: str) -> dict[str, Any]:
    """Send one request of a workload."""
    if workload == "write":
        return json.loads(server.ask("POST", "/api/notes", {"title": "A note that was written", "body": "word"}))
    paths = {"page": "/api/notes?limit=20", "slow": "/slow", "waits": "/slow"}
    return json.loads(server.get(paths.get(workload, "/api/notes/7")))


def store(path: Path, result: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
