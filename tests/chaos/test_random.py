"""Whatever comes in is served or refused with one clear error: requests, environments, answers to the template."""

import http.client
import importlib.util
import json
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from baking import SEED, with_hypothesis
from cookiecutter.exceptions import FailedHookException
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from chaos.harness import CLEAN, HERE, Copy, Postgres, Project, Result, fetch, record

SEGMENT = st.text(max_size=12).map(
    lambda text: "".join(f"%{byte:02X}" for byte in text.encode("utf-8", "surrogatepass"))
)
PATHS = st.one_of(
    st.sampled_from(["/api/notes", "/api/notes/1", "/", "/livez", "/readyz", "/metrics", "/api/notes/"]),
    SEGMENT.map(lambda part: f"/api/notes/{part}"),
    SEGMENT.map(lambda part: f"/{part}"),
)
METHODS = st.sampled_from(["GET", "HEAD", "POST", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
TEXT = st.text(alphabet=st.sampled_from("ab\x00\ud800é"), min_size=1, max_size=4)
NOTE = st.fixed_dictionaries({"title": TEXT}, optional={"body": TEXT})
BODIES = st.one_of(st.just(b""), NOTE.map(lambda note: json.dumps(note).encode()), st.binary(max_size=200))
TYPES = st.sampled_from(
    ["application/json", "application/json; charset=utf-16", "text/plain", "", "application/x-www-form-urlencoded"]
)


def described(project: Project, postgres: Postgres, folder: Path, examples: int, *options: str) -> Result:
    """Send what api.yaml describes, and what violates it, one by one and in sequences: all of schemathesis."""
    result = Result(
        "Requests that a schema describes", f"up to {examples} by schemathesis, each operation and phase",
        "answers that the schema describes, no 5xx, no traceback",
    )  # fmt: skip
    report = folder / "report.json"
    with Copy(project, postgres.url()) as copy:
        done = subprocess.run(
            [Path(sys.executable).parent / "schemathesis", "run", HERE / "api.yaml", "--url", copy.url,
             "--checks", "all", "--max-examples", str(examples), "--generation-database", "none", "--no-color",
             "--report", "json", "--report-json-path", report, *options],
            cwd=folder, env=CLEAN, capture_output=True, text=True, timeout=1200, check=False,
        )  # fmt: skip
        tracebacks = copy.text().count("Traceback")
    found = json.loads(report.read_text()) if report.exists() else {}
    phases = {name: phase["status"] for name, phase in found.get("phases", {}).items()}
    failures = [failure["title"] for failure in found.get("failures", [])]
    # Where a test means little: of an operation that never answered anything but 404, for example.
    warnings = {name: about for name, about in found.get("warnings", {}).items() if about}
    print(done.stdout, done.stderr)  # each failure with a command that repeats it
    result.counted = {"requests": found.get("test_cases", {}).get("generated"), "seed": found.get("seed"),
                      "tracebacks": tracebacks}  # fmt: skip
    result.expect(done.returncode == 0, f"exit code {done.returncode}, failures {failures}")
    result.expect(set(phases.values()) == {"success"}, f"phases {phases}")
    result.expect(not warnings, f"warnings {warnings}")
    result.expect(tracebacks == 0, f"{tracebacks} tracebacks")
    return result


def test_described(baked: Project, postgres: Postgres, tmp_path: Path, long: bool) -> None:
    """The short one sends the same each time, so that an unrelated change does not meet a new find."""
    options = [] if long else ["--seed", "1"]
    assert not record(described(baked, postgres, tmp_path, 500 if long else 10, *options)).missed


@pytest.mark.long
def test_sabotage_described(sabotaged: Callable[[str], Project], postgres: Postgres, tmp_path: Path) -> None:
    name = "the check for what Postgres cannot store"
    result = record(described(sabotaged(name), postgres, tmp_path, 10, "--max-failures", "1"), sabotaged=name)
    assert "Server error" in result.missed[0]


def fuzzed(project: Project, postgres: Postgres, requests: int) -> Result:
    """Send what no schema describes: bytes, halves of surrogate pairs, other types, paths and methods."""
    print(f"SEED={SEED}")  # shown where it fails; in the environment, it repeats the run
    result = Result(
        "Random requests",
        f"{requests} by hypothesis, SEED={SEED}",
        "no 5xx, no traceback, errors are problem documents",
    )
    kinds: Counter[str] = Counter()
    wrong: list[str] = []
    with Copy(project, postgres.url()) as copy:

        @seed(SEED)
        @settings(max_examples=requests, deadline=None, database=None, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))  # fmt: skip
        @given(METHODS, PATHS, BODIES, TYPES)
        def send(method: str, path: str, body: bytes, kind: str) -> None:
            if method in {"POST", "PUT"} and len(body) % 2:  # what is right otherwise gets further
                path, kind = "/api/notes" if method == "POST" else "/api/notes/1", "application/json"
            connection = http.client.HTTPConnection("127.0.0.1", copy.port, timeout=120)
            try:
                connection.request(method, path, body, {"Content-Type": kind} if kind else {})
                answer = connection.getresponse()
                content = answer.read()
                kinds[str(answer.status)] += 1
                problem = (
                    answer.status < 400
                    or method == "HEAD"
                    or (
                        answer.getheader("Content-Type") == "application/problem+json"
                        and json.loads(content)["status"] == answer.status
                    )
                )
                if answer.status >= 500 or not problem:
                    wrong.append(f"{method} {path} {body!r} {kind}: {answer.status} {content[:80]!r}")
            except (OSError, http.client.HTTPException) as error:
                kinds[type(error).__name__] += 1
                wrong.append(f"{method} {path} {body!r}: {error!r}")
            finally:
                connection.close()

        send()
        tracebacks = copy.text().count("Traceback")
        alive = fetch(copy.port, "/api/notes").status
    result.counted = {"answers": dict(kinds), "tracebacks": tracebacks, "afterwards": alive}
    result.expect(not wrong, f"{len(wrong)} wrong, the first: {wrong[:1]}")
    result.expect(tracebacks == 0, f"{tracebacks} tracebacks")
    result.expect(alive == 200, f"afterwards {alive}")
    return result


def test_requests(baked: Project, postgres: Postgres, long: bool) -> None:
    assert not record(fuzzed(baked, postgres, 5000 if long else 500)).missed


@pytest.mark.long
def test_sabotage_requests(sabotaged: Callable[[str], Project], postgres: Postgres) -> None:
    name = "the check for what Postgres cannot store"
    assert record(fuzzed(sabotaged(name), postgres, 1500), sabotaged=name).missed


def environments(project: Project, count: int) -> Result:
    """Run in one process of the project's own, where hypothesis is installed as well."""
    print(f"SEED={SEED}")
    with_hypothesis(project.venv)
    result = Result(
        "Random environments", f"{count} by hypothesis, SEED={SEED}", "settings, or one clear error without a secret"
    )
    done = subprocess.run(
        [project.venv / "bin" / "python", HERE / "service" / "random_environments.py", str(count), str(SEED)],
        cwd=project.folder, env={**CLEAN, "PYTHONPATH": str(project.folder)}, capture_output=True, text=True,
        timeout=600, check=False,
    )  # fmt: skip
    result.counted = json.loads(done.stdout) if done.returncode == 0 else {}
    result.expect(done.returncode == 0, done.stderr[-600:])
    result.expect(result.counted.get("served", 0) > count / 20, "hardly any of them was served")
    result.expect(result.counted.get("refused", 0) > count / 20, "hardly any of them was refused")
    return result


def test_environments(baked: Project, long: bool) -> None:
    assert not record(environments(baked, 2000 if long else 500)).missed


def test_sabotage_environments(sabotaged: Callable[[str], Project]) -> None:
    name = "the masking of what may be a secret"
    assert record(environments(sabotaged(name), 1000), sabotaged=name).missed


ANSWER = st.text(max_size=45) | st.sampled_from(
    ["my_service", "x", "a b", "../up", "{{ 1 }}", "postgres", "é", "a" * 41]
)
COUNT = st.integers(-2, 300_000).map(str) | st.integers(1, 400).map(str) | st.text(max_size=5)


def load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec
    assert spec.loader
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answered(template: Path, bake: Callable[..., Path], into: Path, count: int, baked_for_real: int) -> Result:
    """Let the hook decide in process; of what it lets pass, some are baked and must compile and parse."""
    print(f"SEED={SEED}")
    result = Result(
        "Random answers to the template", f"{count} by hypothesis, SEED={SEED}, {baked_for_real} baked",
        "a project that compiles, or one line that refuses; never a traceback",
    )  # fmt: skip
    hook = load(template / "hooks" / "pre_gen_project.py", "chaos_hook")
    sizing = load(template / "{{cookiecutter.project_slug}}" / "flask_pooling" / "sizing.py", "chaos_sizing")
    names = ("project_name", "project_slug", "description", "author_name")
    outcomes: Counter[str] = Counter()
    wrong: list[str] = []

    @seed(SEED)
    @settings(max_examples=count, deadline=None, database=None, phases=[Phase.generate],
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(st.fixed_dictionaries({}, optional=dict.fromkeys(names, ANSWER)),
           st.fixed_dictionaries({}, optional={"postgres_max_connections": COUNT, "app_instances": COUNT}))  # fmt: skip
    def answer(texts: dict[str, str], counts: dict[str, str]) -> None:
        given_answers = {**texts, **counts}
        complete = {"project_name": "My Service", "project_slug": "my_service", "description": "x", "author_name": "y",
                    "postgres_max_connections": "100", "app_instances": "2", **given_answers}  # fmt: skip
        try:
            refused = hook.problems(complete, sizing)
        except Exception as error:  # noqa: BLE001
            wrong.append(f"{given_answers!r}: {error!r}")
            return
        if refused:
            outcomes["refused"] += 1
            if any("\n" in line or len(line) > 600 for line in refused):
                wrong.append(f"{given_answers!r}: {refused!r}")
        else:
            outcomes["accepted"] += 1
            if outcomes["baked"] < baked_for_real:
                outcomes["baked"] += 1
                try:
                    folder = bake(into / str(outcomes["baked"]), **given_answers)
                    compile_all(folder)
                except FailedHookException:
                    outcomes["refused when baked"] += 1  # a slug that is derived from the name
                except Exception as error:  # noqa: BLE001
                    wrong.append(f"{given_answers!r}: {error!r}")

    answer()
    result.counted = dict(outcomes)
    result.expect(not wrong, f"{len(wrong)} wrong, the first: {wrong[:1]}")
    result.expect(min(outcomes["accepted"], outcomes["refused"]) > count / 50, f"one-sided: {dict(outcomes)}")
    return result


def compile_all(folder: Path) -> None:
    tomllib.loads((folder / "pyproject.toml").read_text())
    for path in folder.rglob("*.py"):
        compile(path.read_text(), str(path), "exec")


def test_answers(template: Path, bake: Callable[..., Path], tmp_path: Path, long: bool) -> None:
    result = answered(template, bake, tmp_path, 500, 150 if long else 8)
    assert not record(result).missed


def test_sabotage_answers(template: Path, bake: Callable[..., Path], tmp_path: Path) -> None:
    """Without the check of the numbers, infeasible or unreadable ones reach the arithmetic."""
    broken = shutil.copytree(template, tmp_path / "template")
    hook = broken / "hooks" / "pre_gen_project.py"
    old = "    wrong = [number_problem(question, count) for question, count in counts.items()]"
    assert hook.read_text().count(old) == 1
    hook.write_text(hook.read_text().replace(old, "    wrong = []"))
    assert record(answered(broken, bake, tmp_path, 300, 0), sabotaged="the check of the numbers").missed
