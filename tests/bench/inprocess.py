"""In-process figures: what one request, one checkout, one start costs, without a web server and its noise."""

import contextlib
import dataclasses
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.bench.project import CANDIDATES, HERE, TEMPLATE, Project, bake
from tests.bench.proxy import counting
from tests.bench.report import Paired
from tests.bench.rounds import ask
from tests.bench.servers import Candidate, serving

INSIDE = HERE / "inside"
PROJECT = "{{cookiecutter.project_slug}}"
CONNECT = """
from app.extensions import db
from baked import app

with app.app_context():
    db.engine.raw_connection()
"""


@dataclass(frozen=True)
class Loop:
    """A WSGI app that is called in a process of its own."""

    name: str
    spec: str
    folder: Path

    def command(self, workload: str) -> list[str | Path]:
        return [sys.executable, INSIDE / "loop.py", self.spec, workload]


def loops(project: Project, extra: Sequence[Path] = ()) -> list[Loop]:
    """The baked app and what it is held against; `extra` are other copies of the project, to compare a change."""
    return [
        Loop("baked", "baked:app", project.folder),
        Loop("silent", "baked_silent:app", project.folder),
        Loop("pre-ping", "orm:preping()", CANDIDATES),
        Loop("floor-flask", "floor_flask:app", CANDIDATES),
        Loop("floor-wsgi", "floor_wsgi:app", CANDIDATES),
        *(Loop(folder.name, "baked:app", folder.resolve()) for folder in extra),
    ]


@contextlib.contextmanager
def started(
    project: Project, loop: Loop, workload: str, under: Sequence[str] = ()
) -> Iterator["subprocess.Popen[str]"]:
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryDirectory() as metrics:
        process = subprocess.Popen(
            [*under, *loop.command(workload)],
            cwd=loop.folder,
            # The metrics go to files, as under gunicorn.
            env=project.environ(BENCH_THREADS="1", PYTHONPATH=str(loop.folder), PROMETHEUS_MULTIPROC_DIR=metrics),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            yield process
        finally:
            process.stdin.close()
            process.stdout.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()


def take(process: "subprocess.Popen[str]", requests: int) -> float:
    """CPU microseconds a request."""
    process.stdin.write(f"{requests}\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError("the loop ended; run inside/loop.py by hand to see why")
    return float(answer) / requests * 1e6


def cpu(project: Project, loops: Sequence[Loop], workload: str, batches: int, requests: int) -> dict[str, list[float]]:
    """CPU microseconds a request, batch by batch, in turns: what is compared ran within a fraction of a second."""
    with contextlib.ExitStack() as stack:
        running = {loop.name: stack.enter_context(started(project, loop, workload)) for loop in loops}
        for process in running.values():
            take(process, 300)
        found: dict[str, list[float]] = {name: [] for name in running}
        for _ in range(batches):
            for name, process in running.items():
                found[name].append(take(process, requests))
        return found


def instructions(project: Project, loop: Loop, workload: str, requests: int) -> float:
    """Instructions a request in user space, by callgrind."""
    with (
        tempfile.TemporaryDirectory() as folder,
        started(project, loop, workload, _callgrind(folder)) as process,
    ):
        return _counted(folder, process.pid, lambda times: take(process, times), requests)


def server_instructions(project: Project, candidate: Candidate, workload: str, requests: int) -> float:
    """The same of a whole server under gunicorn: its loop, its threads, its parser, its sockets."""
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
    """Microseconds of the check at checkout, and the round trips of all of them together."""
    with counting(project.port) as (port, counts):
        said = project.run("python", INSIDE / "guard.py", DATABASE_URL=project.url(port=port))
        # What SQLAlchemy asks a new connection, once, is not the check's.
        after_checks = counts.snapshot()[1]
        project.run("python", "-c", CONNECT, DATABASE_URL=project.url(port=port))
        connecting = counts.snapshot()[1] - after_checks
    return json.loads(said.splitlines()[-1]), after_checks - connecting


def start(project: Project, times: int) -> tuple[dict[str, float], Paired]:
    """CPU seconds to import the service and build its app, with its bytecode compiled: medians; and the whole over
    what Flask and Flask-SQLAlchemy alone take, in turns."""
    found, bare = [], []
    for _ in range(times):
        for name, runs in (("start.py", found), ("bare.py", bare)):
            runs.append(json.loads(project.run("python", INSIDE / name).splitlines()[-1]))
    ratios = tuple(ours["both"] / theirs["both"] for ours, theirs in zip(found, bare, strict=True))
    return {name: median(run[name] for run in found) for name in found[0]}, Paired(ratios)


def start_instructions(project: Project) -> dict[str, int]:
    """Instructions of a whole process: Python alone, Flask and Flask-SQLAlchemy alone, and the service."""
    programs = {"Python alone": ("-c", ""), "Flask, Flask-SQLAlchemy, an engine": (INSIDE / "bare.py",)}
    programs["the service"] = (INSIDE / "start.py",)
    found = {}
    for name, words in programs.items():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "callgrind"
            count = (_valgrind(), "--tool=callgrind", f"--callgrind-out-file={out}", sys.executable)
            project.run(*count, *words)
            found[name] = _total(out)
    return found


def baking(times: int) -> Paired:
    """How long it takes to bake, against a template of as many files, all empty, and no hooks."""
    ratios = []
    with _templates() as scratch:
        for number in range(times):
            taken = []
            for name in ("template", "empty"):
                before = time.perf_counter()
                bake(scratch / name, scratch / f"{name}-{number}")
                taken.append(time.perf_counter() - before)
            ratios.append(taken[0] / taken[1])
    return Paired(tuple(ratios))


def baking_instructions() -> dict[str, int]:
    """The same in instructions, those of the hooks included."""
    found = {}
    with _templates() as scratch:
        for name in ("template", "empty"):
            counts = scratch / f"{name}-counts"
            counts.mkdir()
            under = (_valgrind(), "--tool=callgrind", "--trace-children=yes", f"--callgrind-out-file={counts}/%p")
            bake(scratch / name, scratch / f"{name}-counted", under)
            found[f"a bake of the {name}"] = sum(map(_total, counts.iterdir()))
    return found


@contextlib.contextmanager
def _templates() -> Iterator[Path]:
    """A folder with the template, and with one of as many files, all empty, and no hooks."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        scratch = Path(folder)
        template, empty = scratch / "template", scratch / "empty"
        shutil.copytree(TEMPLATE, template, ignore=lambda folder, names: _untracked(Path(folder), names))
        (empty / PROJECT).mkdir(parents=True)
        (empty / "cookiecutter.json").write_text('{"project_slug": "empty"}')
        for path in (template / PROJECT).rglob("*"):
            copy = empty / path.relative_to(template)
            if path.is_file():
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.touch()
        yield scratch


def _untracked(folder: Path, names: list[str]) -> list[str]:
    """What a clone of the template would not have."""
    return [name for name in names if name in {"__pycache__", "tests"} or (folder == TEMPLATE and name[0] == ".")]
