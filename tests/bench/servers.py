"""The candidates: each is a command that serves one of the apps in candidates/, with its settings."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.bench import machine
from tests.bench.project import CANDIDATES, TOOLS, Project, free_port

START_SECONDS = 120  # under callgrind, on a busy machine
STOP_SECONDS = 10
SETTLE_SECONDS = 10
REST_SECONDS = 0.2
# The plain settings that the floor shares with the baked service. Its hooks are part of what the service costs.
GUNICORN = ["workers", "threads", "worker_connections", "keepalive", "max_requests", "forwarded_allow_ips"]
GUNICORN += ["max_requests_jitter", "worker_tmp_dir", "preload_app", "control_socket_disable"]
SETTINGS = """
import json, runpy
conf = runpy.run_path("gunicorn.conf.py")
print(json.dumps({name: conf[name] for name in %r if name in conf}))
"""
FREEZE = """
import gc

def when_ready(server):
    gc.collect()
    gc.freeze()
"""


@dataclass(frozen=True)
class Candidate:
    """`command` is run with PORT in the environment; {port} stands for it."""

    name: str
    what: str
    command: tuple[str, ...]
    folder: Path
    environ: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Server:
    """A candidate that answers."""

    candidate: Candidate
    role: str
    port: int
    pid: int

    def cpu_seconds(self) -> float:
        return machine.cpu_seconds(self.pid)

    def settle(self) -> None:
        """Wait until it rests: what a load generator leaves in the backlog when it goes is still served."""
        give_up, before = time.monotonic() + SETTLE_SECONDS, -1.0
        while time.monotonic() < give_up and (now := self.cpu_seconds()) > before:
            before = now
            time.sleep(REST_SECONDS)

    def get(self, path: str) -> bytes:
        return self.ask("GET", path)

    def ask(self, method: str, path: str, body: object = None) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection):
            headers = {} if body is None else {"Content-Type": "application/json"}
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            response = connection.getresponse()
            answer = response.read()
            if response.status >= 400:
                raise RuntimeError(f"{self.candidate.name}: {method} {path}: {response.status} {answer[:300]!r}")
            return answer


def all_of_them(project: Project) -> list[Candidate]:
    """List the baked defaults, the usual alternatives, and the floor below which nothing can go."""
    plan = project.plan()
    workers, threads = plan["workers"], plan["threads"]
    flask = ("gunicorn", "--bind", "127.0.0.1:{port}")
    same_size = (*flask, "--workers", str(workers), "--threads", str(threads))
    same_settings = (*flask, "--config", str(gunicorn_like(project)))
    size = {"BENCH_THREADS": str(threads)}
    return [
        baked(project, "baked", "the baked defaults"),
        Candidate(
            "guide",
            "Flask-SQLAlchemy with the guide's literal settings, gunicorn -w 2n+1",
            (*flask, "--workers", str(2 * len(os.sched_getaffinity(0)) + 1), "orm:guide()"),
            CANDIDATES,
        ),
        Candidate(
            "pre-ping",
            "Flask-SQLAlchemy's defaults and pool_pre_ping",
            (*same_size, "orm:preping()"),
            CANDIDATES,
        ),
        Candidate("nullpool", "Flask-SQLAlchemy, a connection a request", (*same_size, "orm:nullpool()"), CANDIDATES),
        Candidate(
            "floor-flask",
            "Flask, psycopg_pool, hand-written SQL, autocommit (a write: one transaction)",
            (*same_settings, "floor_flask:app"),
            CANDIDATES,
            size,
        ),
        Candidate(
            "fastapi",
            "FastAPI, SQLAlchemy's async ORM, asyncpg, uvicorn without its access log",
            (
                *("uvicorn", "--host", "127.0.0.1", "--port", "{port}"),
                *("--workers", str(workers), "--no-access-log", "fastapi_async:app"),
            ),
            CANDIDATES,
            size,
        ),
    ]


def baked(project: Project, name: str, what: str, app: str = "baked:app", **environ: str) -> Candidate:
    return Candidate(name, what, ("gunicorn", app), project.folder, environ)


def without_logs(project: Project) -> list[Candidate]:
    return [
        baked(project, "baked", "the baked defaults"),
        baked(project, "silent", "without access log and metrics", "baked_silent:app"),
    ]


def sizes(project: Project, given: Sequence[tuple[int, int]] = ()) -> list[Candidate]:
    """List other workers x threads: those given, or those that hold no more connections than the default plan."""
    plan = project.plan()
    budget, default = plan["workers"] * plan["threads"], (plan["workers"], plan["threads"])
    most = [(workers, budget // workers) for workers in range(1, budget + 1) if budget % workers == 0]
    tried = [default, *(size for size in (given or (*most, (2, 4), (4, 2))) if size != default)]
    return [
        baked(
            project,
            "baked" if size == default else f"{size[0]}x{size[1]}",
            f"{size[0]} workers x {size[1]} threads",
            WEB_CONCURRENCY=str(size[0]),
            WEB_THREADS=str(size[1]),
            APP_INSTANCES="1",
        )
        for size in dict.fromkeys(tried)
    ]


def recycled(project: Project) -> list[Candidate]:
    """List workers that are never replaced, and ones that are so often that it shows."""
    return [
        baked(
            project,
            f"every-{requests}" if requests else "never",
            f"a worker serves {requests or 'any number of'} requests",
            GUNICORN_CMD_ARGS=f"--max-requests {requests} --max-requests-jitter 0",
        )
        for requests in (0, 1000, 250)
    ]


def gunicorn_like(project: Project) -> Path:
    """Write a config file with the baked service's plain settings."""
    path = project.folder.parent / "gunicorn_like_baked.py"
    settings = json.loads(project.run("python", "-c", SETTINGS % (GUNICORN,)).splitlines()[-1])
    settings["worker_class"] = "gthread"
    path.write_text("".join(f"{name} = {value!r}\n" for name, value in settings.items()) + FREEZE)
    return path


@contextlib.contextmanager
def serving(project: Project, candidate: Candidate, database_port: int | None = None) -> Iterator[Server]:
    """Run a candidate until it answers, and to the end of the context."""
    port, role = free_port(), project.role(candidate.name)
    environ = project.environ(**candidate.environ, DATABASE_URL=project.url(role, database_port))
    environ |= {"PORT": str(port), "WEB_PROBE_PORT": str(free_port())}
    command = [word.replace("{port}", str(port)) for word in candidate.command]
    path = project.folder.parent / f"{candidate.name}-{port}.log"
    with path.open("wb") as log:
        process = subprocess.Popen(
            [TOOLS / command[0], *command[1:]],
            cwd=candidate.folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        server = Server(candidate, role, port, process.pid)
        wait_until_it_answers(server, process, path)
        yield server
    finally:
        stop(process)
        path.unlink()


def wait_until_it_answers(server: Server, process: "subprocess.Popen[bytes]", log: Path) -> None:
    give_up = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up and process.poll() is None:
        try:
            server.get("/api/notes/1")
        except (OSError, http.client.HTTPException):
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"{server.candidate.name} does not answer:\n{log.read_text()[-3000:]}")


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Stop the server itself first, then all that is left of the session that it was started in."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
