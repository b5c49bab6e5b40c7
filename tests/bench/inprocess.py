"""Figures without the noise of requests per second: instructions of a request, one checkout, one start."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

from tests.bench.project import HERE, Project
from tests.bench.proxy import counting
from tests.bench.report import Paired
from tests.bench.rounds import ask
from tests.bench.servers import Candidate, serving

INSIDE = HERE / "inside"
CONNECT = """
from app.extensions import db
from baked import app

with app.app_context():
    db.engine.raw_connection()
"""


def server_instructions(project: Project, candidate: Candidate, workload: str, requests: int) -> float:
    """Count the instructions a request in user space, by callgrind, of a whole server under gunicorn: its loop, its
    threads, its parser, its sockets."""
    with tempfile.TemporaryDirectory() as folder:
        command = (*_callgrind(folder), sys.executable, str(INSIDE / "one_process.py"), *candidate.command[1:])
        with serving(project, dataclasses.replace(candidate, command=command)) as server:

            def ask_often(times: int) -> None:
                for _ in range(times):
                    ask(server, workload)

            return _counted(folder, server.pid, ask_often, requests)


def _valgrind() -> str:
    found = shutil.which("valgrind")
    if not found:
        raise SystemExit("valgrind is not installed: apt-get install valgrind")
    return found


def _callgrind(folder: str) -> tuple[str, ...]:
    return (_valgrind(), "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/callgrind")


def _counted(folder: str, pid: int, ask_often: Callable[[int], object], requests: int) -> float:
    """Count once everything is warm: connections, prepared statements, caches."""

    def order(what: str) -> None:
        done = subprocess.run(["callgrind_control", what, str(pid)], check=True, capture_output=True, text=True)
        if "Error" in done.stdout:  # it exits with 0 all the same
            raise RuntimeError(done.stdout)

    ask_often(50)
    order("--instr=on")
    ask_often(5)
    order("--zero")
    ask_often(requests)
    order("--dump")
    order("--instr=off")
    return _total(Path(folder) / "callgrind.1") / requests


def _total(dump: Path) -> int:
    return int(re.search(r"^totals: (\d+)", dump.read_text(), re.MULTILINE)[1])


def guard(project: Project) -> tuple[list[float], int]:
    """Measure the microseconds of the check at checkout, and the round trips of all of them together."""
    with counting(project.port) as (port, counts):
        said = project.run("python", INSIDE / "guard.py", DATABASE_URL=project.url(port=port))
        # What SQLAlchemy asks a new connection, once, is not the check's.
        after_checks = counts.snapshot()[1]
        project.run("python", "-c", CONNECT, DATABASE_URL=project.url(port=port))
        connecting = counts.snapshot()[1] - after_checks
    return json.loads(said.splitlines()[-1]), after_checks - connecting


def start(project: Project, times: int) -> tuple[dict[str, float], Paired]:
    """Measure the CPU seconds to import the service and build its app, with its bytecode compiled: medians; and the
    whole over what Flask and Flask-SQLAlchemy alone take, in turns."""
    found, bare = [], []
    for _ in range(times):
        for name, runs in (("start.py", found), ("bare.py", bare)):
            runs.append(json.loads(project.run("python", INSIDE / name).splitlines()[-1]))
    ratios = tuple(ours["both"] / theirs["both"] for ours, theirs in zip(found, bare, strict=True))
    return {name: median(run[name] for run in found) for name in found[0]}, Paired(ratios)
