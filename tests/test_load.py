"""`make load` as a person runs it, on a real server: what it prints, and when it fails."""

import contextlib
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import CLEAN, free_port, postgres, run, served


@pytest.fixture(scope="module")
def service(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with postgres(installed, tmp_path_factory.mktemp("load") / "data", "loaded") as url:
        environ = {"DATABASE_URL": url, "WEB_CONCURRENCY": "2", "WEB_THREADS": "2"}
        with served("exec make prod", installed, port := free_port(), **environ):
            yield port


def load(project: Path, port: int, words: str = "", **environ: str) -> tuple[int, str, dict[str, str]]:
    """Return the exit code, all that was printed, and the rows at the end by name."""
    done = run(f"make load {words}", project, PORT=str(port), **environ)
    rows = re.findall(r"^([a-z ]{12}) (.+)$", done.stdout, re.MULTILINE)
    return done.returncode, done.stdout, {name.strip(): text for name, text in rows}


def test_the_connections_beside_the_plan(service: int, installed: Path):
    """No request fails, no more connections are held than planned, and Locust's report is there."""
    code, text, rows = load(installed, service, 'ARGS="--run-time 3s"')
    assert code == 0, text
    assert re.search(r"^ +Aggregated +\d+ +0\(0.00%\)", text, re.MULTILINE), text
    assert re.fullmatch(r"[1-4] of 4 open at most; \d+ waits for one", rows["connections"])
    assert re.fullmatch(r"[0-4] of 4 busy at most", rows["slots"])
    assert "2 instances x 2 workers x (2 + 0) = 8 of 87" in rows["plan"]
    assert "<html" in (installed / "instance" / "load.html").read_text()[:500].lower()


def test_ctrl_c_ends_it_with_what_was_found(service: int, installed: Path):
    """At once, and without a traceback."""
    environ = CLEAN | {"PORT": str(service), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        ["make", "load", "ARGS=--run-time 60s"], cwd=installed, env=environ, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            assert process.stdout
            text = next(line for line in process.stdout if line.startswith("watch http"))
            os.killpg(process.pid, signal.SIGINT)
            text += process.communicate(timeout=300)[0]
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert "Traceback" not in text, text
    assert "connections  " in text, text


def test_a_service_that_goes_away(installed: Path):
    """Requests that are refused are failures."""
    environ, port = CLEAN | {"PYTHONUNBUFFERED": "1"}, free_port()
    with contextlib.ExitStack() as stack:
        stack.enter_context(served("make run", installed, port))
        with subprocess.Popen(
            ["make", "load", f"ARGS=--run-time 12s --host http://127.0.0.1:{port}"],
            cwd=installed, env=environ, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ) as process:  # fmt: skip
            assert process.stdout
            text = next(line for line in process.stdout if line.startswith("watch http"))
            stack.close()
            text += process.communicate(timeout=300)[0]
    assert process.returncode != 0, text
    assert "Connection refused" in text, text


def test_failures_fail(service: int, installed: Path, tmp_path: Path):
    """A view that is not there, in a locustfile of one's own."""
    own = tmp_path / "own.py"
    own.write_text((installed / "locustfile.py").read_text().replace("/api/notes?limit=20", "/api/nothing"))
    code, text, rows = load(installed, service, f'ARGS="--run-time 2s -f {own}"')
    assert code != 0, text
    assert "404" in text
    assert "problem" not in rows


def test_more_connections_than_planned_fail(installed: Path, tmp_path: Path):
    """The problem is the last thing that is said, and the exit code says it, too."""
    own = tmp_path / "own.py"
    own.write_text(
        "from locustfile import *\n@events.init.add_listener\n"
        "def plan_nothing(environment, **_):\n    environment.plan['connections_per_instance'] = 0\n"
    )
    with served("make run", installed, port := free_port()):
        code, text, rows = load(installed, port, f'ARGS="--run-time 2s -f {own}"', PYTHONPATH=str(installed))
    assert code != 0, text
    assert re.fullmatch(r"[1-9]\d* connections, more than the 0 of the plan", rows["problem"])


def test_without_a_service(installed: Path):
    """One line says what to start, in place of a table of refused connections."""
    code, text, _ = load(installed, free_port())
    assert code != 0
    assert "start `make run` or `make prod` in another terminal" in text
    assert "Traceback" not in text
