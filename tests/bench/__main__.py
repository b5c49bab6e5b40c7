"""`python -m tests.bench`: everything with no argument, or one part of it."""

import argparse
import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

from tests.bench import growth as fleets
from tests.bench import inprocess, load, machine, report, rounds, servers
from tests.bench.project import HERE, LONGEST, MAX_CONNECTIONS, SERVER_SETTINGS, TEMPLATE, Project, baked

RESULTS = HERE / "results"
CHART = TEMPLATE / "docs" / "bench.svg"
GROWTH = TEMPLATE / "docs" / "growth.svg"
MEMORY_REQUESTS = 10_000


def say(text: str = "") -> None:
    print(text, flush=True)


def quick(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measure(
    project: Project, options: argparse.Namespace, choose: Callable[[Project], list[servers.Candidate]]
) -> dict[str, object]:
    candidates = [one for one in choose(project) if not options.only or one.name in options.only]
    if not candidates:
        raise SystemExit(f"no such candidate: {options.only}")
    rows = rounds.run(
        project,
        candidates,
        workloads=options.workloads,
        clients=options.clients,
        rounds=options.rounds,
        seconds=options.seconds,
        warm_up=options.warm_up,
        say=quick,
    )
    say(report.speed(rows))
    say()
    say(report.memory(rows))
    if verdicts := report.bars(rows):
        say()
        say(verdicts)
    say()
    say(report.footnote(rows))
    postgres = project.admin.execute("show server_version").fetchone()[0]
    return {
        "machine": machine.describe() | {"postgres": postgres},
        "server_settings": SERVER_SETTINGS | {"max_connections": MAX_CONNECTIONS},
        "plan": project.plan(),
        "measured": time.strftime("%Y-%m-%d"),
        "seconds": options.seconds,
        "candidates": {one.name: one.what for one in candidates},
        "rows": rows,
    }


def run(project: Project, options: argparse.Namespace) -> None:
    """Run all candidates of the benchmark."""
    result = measure(project, options, servers.all_of_them)
    chosen = [one for one in servers.all_of_them(project) if not options.only or one.name in options.only]
    result["round_trips"] = rounds.count(project, chosen, options.workloads)
    say()
    say(report.round_trips(result["round_trips"]))
    rounds.store(options.out or RESULTS / "bench.json", result)


def sweep(project: Project, options: argparse.Namespace) -> None:
    """Try other workers x threads: within the same connection budget, or --sizes."""
    result = measure(project, options, lambda project: servers.sizes(project, options.sizes))
    say()
    say(report.against(result["rows"]))
    rounds.store(options.out or RESULTS / "sweep.json", result)


def recycle(project: Project, options: argparse.Namespace) -> None:
    """Measure what it costs to replace a worker after so many requests."""
    rounds.store(options.out or RESULTS / "recycle.json", measure(project, options, servers.recycled))


def counts(project: Project, options: argparse.Namespace) -> None:
    """Round trips of each endpoint of the baked service, and what the liveness check costs."""
    with (
        rounds.counting(project.port) as (port, counted),
        servers.serving(project, servers.baked(project, "baked", ""), port) as server,
    ):
        load.drive(server, "read", rounds.WARM_UP_CLIENTS, 1)
        load.drive(server, "write", rounds.WARM_UP_CLIENTS, 1)
        server.settle()
        ids = iter(range(1, 10_000))
        note = {"title": "changed", "body": ""}
        requests = {
            "GET /": lambda: server.get("/"),
            "GET /livez": lambda: server.get("/livez"),
            "GET /readyz": lambda: server.get("/readyz"),
            "GET /api/notes/<id>": lambda: server.get("/api/notes/500"),
            "GET /api/notes": lambda: server.get("/api/notes?limit=20"),
            "POST /api/notes": lambda: server.ask("POST", "/api/notes", note),
            "PUT /api/notes/<id>": lambda: server.ask("PUT", "/api/notes/500", note),
            "DELETE /api/notes/<id>": lambda: server.ask("DELETE", f"/api/notes/{next(ids)}"),
        }
        body = []
        for name, request in requests.items():
            for _ in range(200):  # each statement is prepared on each connection at its fifth use
                request()
            found = []
            for _ in range(rounds.COUNTED_REQUESTS):
                before = counted.snapshot()[1]
                request()
                found.append(counted.snapshot()[1] - before)
            body.append([name, min(found), median(found), max(found)])
    say(report.table(["round trips a request", "least", "median", "most"], body))
    timings, sent = inprocess.guard(project)
    say()
    say(f"liveness check at checkout: {median(timings):.2f} us (bar: 2), round trips of all checks: {sent} (bar: 0)")


def memory(project: Project, options: argparse.Namespace) -> None:
    """Measure the PSS of a worker, idle and after 10,000 requests, with the app loaded before the fork and after it."""
    plan = project.plan()
    plain = ("gunicorn", "--config", "/dev/null", "--workers", str(plan["workers"]), "--threads", str(plan["threads"]))
    after_fork = servers.Candidate(
        "no-preload",
        "each worker imports the app itself",
        (*plain, "--bind", "127.0.0.1:{port}", "baked_unplanned:app"),
        project.folder,
    )
    found: dict[str, list[dict[str, dict[str, float]]]] = {}
    peaks: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for candidate in (servers.baked(project, "baked", ""), after_fork):
            with servers.serving(project, candidate) as server:
                load.drive(server, "read", 4, 1)  # all workers have served, or they would have half of it unloaded
                idle, requests = machine.memory(server.pid), 0
                while requests < MEMORY_REQUESTS:
                    requests += load.drive(server, "read", 32, 1)["requests"]
                after = machine.memory(server.pid)
                project.admin.execute(LONGEST)
                load.drive(server, "largest", 32, 3)
                project.reset()
                found.setdefault(candidate.name, []).append({"idle": idle, "after": after})
                peaks.setdefault(candidate.name, []).append(machine.peak_mib(server.pid))
    body = []
    for when in ("idle", "after"):
        for figure in ("pss_worker_mib", "pss_share_mib"):
            ours, theirs = ([one[when][figure] for one in found[name]] for name in ("baked", "no-preload"))
            paired = report.Paired(tuple(a / b for a, b in zip(ours, theirs, strict=True)))
            body.append([f"{figure} {when}", f"{median(ours):.1f}", f"{median(theirs):.1f}", paired])
    say(report.table(["", "baked", "without preload", "ratio (bar: 0.6)"], body))
    say()
    for name, most in peaks.items():
        say(f"{name}: largest pages in all threads: a worker held up to {max(most):.0f} MiB, shared memory included")


def startup(project: Project, options: argparse.Namespace) -> None:
    """Measure the CPU to import the service and to build its app."""
    found, over_bare = inprocess.start(project, options.rounds)
    say("CPU seconds: import {import:.2f} + create_app {create_app:.2f} = {both:.2f}".format(**found))
    say(f"the same over Flask, Flask-SQLAlchemy and one engine without any app: {over_bare}")
    say(f"the whole process, Python itself included: {found['process']:.2f} s")


def instructions(project: Project, options: argparse.Namespace) -> None:
    """Count the instructions of a whole server for one request. They are exact; requests per second are not."""
    known = [*servers.without_logs(project), *servers.all_of_them(project)]
    candidates = {one.name: one for one in known if one.command[0] == "gunicorn"}
    chosen = [one for one in candidates.values() if not options.only or one.name in options.only]
    rows = []
    for workload in options.workloads:
        for one in chosen:
            figure = inprocess.server_instructions(project, one, workload, options.requests)
            rows.append({"candidate": one.name, "workload": workload, "instructions": round(figure)})
        project.reset()
        found = {row["candidate"]: row["instructions"] for row in rows if row["workload"] == workload}
        first = found[chosen[0].name]
        body = [[name, f"{figure / 1000:.0f}", f"{first / figure:.3f}"] for name, figure in found.items()]
        say(report.table([workload, "thousand instructions a request", f"{chosen[0].name}'s over it"], body))
        say()
    rounds.store(options.out or RESULTS / "instructions.json", {"measured": time.strftime("%Y-%m-%d"), "rows": rows})


def growth(project: Project, options: argparse.Namespace) -> None:
    """Count connections at the server and at the poolers, from 10 instances to 1,000."""
    rows = fleets.grow(project, options.fleets)
    say(report.growth(rows))
    rounds.store(options.out or RESULTS / "growth.json", {"measured": time.strftime("%Y-%m-%d"), "rows": rows})


def chart(project: None, options: argparse.Namespace) -> None:
    """Draw the picture of stored results, and the table of the README."""
    from tests.bench.chart import draw, draw_growth

    if (grown := RESULTS / "growth.json").exists():
        draw_growth(json.loads(grown.read_text())["rows"], GROWTH)
    result = json.loads((options.out or RESULTS / "bench.json").read_text())
    draw(result, "read", CHART)
    counted = json.loads((RESULTS / "instructions.json").read_text())["rows"]
    say(report.summary(result, counted))


def words(text: str) -> list[str]:
    return text.split(",")


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def sizes(text: str) -> list[tuple[int, int]]:
    return [(int(workers), int(threads)) for workers, threads in (word.split("x") for word in text.split(","))]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parts = parser.add_subparsers(dest="part", required=True)

    def part(function: Callable, *, needs_project: bool = True, **defaults: object) -> argparse.ArgumentParser:
        sub = parts.add_parser(function.__name__, help=function.__doc__, description=function.__doc__)
        sub.set_defaults(function=function, needs_project=needs_project)
        sub.add_argument("--rounds", type=int, default=defaults.get("rounds", 5))
        sub.add_argument("--out", type=Path, help="where the rows are stored, or read from")
        sub.add_argument("--only", type=words, help="of the candidates, with commas between")
        return sub

    for function, workloads, clients in (
        (run, ["read", "page", "write", "slow", "waits"], [32, 128]),
        (sweep, ["read", "slow", "waits"], [128]),
        (recycle, ["read"], [32]),
    ):
        sub = part(function)
        sub.add_argument("--seconds", type=float, default=5, help="of each cell")
        sub.add_argument("--warm-up", type=float, default=1, help="seconds before each cell")
        sub.add_argument("--clients", type=numbers, default=clients)
        sub.add_argument("--workloads", type=words, default=workloads)
        if function is sweep:
            sub.add_argument("--sizes", type=sizes, default=[], help="workers x threads, as 3x4,3x8")
    part(counts)
    part(memory, rounds=3)
    part(startup, rounds=9)
    sub = part(instructions)
    sub.add_argument("--workloads", type=words, default=["read", "page", "write"])
    sub.add_argument("--requests", type=int, default=150)
    sub = part(growth)
    sub.add_argument("--fleets", type=sizes, default=fleets.FLEETS, help="instances x poolers, as 50x1,200x2")
    part(chart, needs_project=False)
    return parser


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what was started is stopped
    options = parser().parse_args()
    if not options.needs_project:
        options.function(None, options)
        return
    with baked() as project:
        options.function(project, options)


if __name__ == "__main__":
    main()
