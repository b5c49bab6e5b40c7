"""The promise: never more connections than the plan says, whatever happens to the workers."""

import contextlib
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from chaos.harness import NO_CONNECTION_LEFT, Copy, Load, Postgres, Project, Result, Sampler, read, record

BAR = "peak <= plan, no 'too many clients', nothing failed; a signal that adds workers is refused with a line"
REFUSED = "which the plan does not count. Restart the service instead."
RECYCLED = (
    ("gunicorn.conf.py", "max_requests = 10_000", "max_requests = 200"),
    ("gunicorn.conf.py", "max_requests_jitter = 5_000", "max_requests_jitter = 100"),
)


def signalled(number: signal.Signals, times: int = 1) -> Callable[[list[Copy]], None]:
    def act(copies: list[Copy]) -> None:
        for _ in range(times):
            copies[0].signal(number)
            time.sleep(0.3)

    return act


ACTS: dict[str, Callable[[list[Copy]], None]] = {
    "nothing else": lambda copies: None,
    "TTIN x 5": signalled(signal.SIGTTIN, 5),
    "HUP x 3": signalled(signal.SIGHUP, 3),
    "USR2": signalled(signal.SIGUSR2),
}


def budgets(
    project: Project,
    postgres: Postgres,
    acts: dict[str, Callable[[list[Copy]], None]],
    seconds: float,
    path: str = "/chaos/query?s=0.02",
) -> list[Result]:
    """Run two copies, as planned for, both under full load while one of them is acted upon."""
    results = []
    with contextlib.ExitStack() as stack:
        copies = [Copy(project, postgres.url(), APP_INSTANCES=2) for _ in range(2)]
        for copy in copies:
            copy.start(wait=False)
            stack.callback(copy.stop)
        for copy in copies:
            copy.ready()
        plan = copies[0].plan["peak"]
        sampler = stack.enter_context(Sampler(postgres, project.slug))
        loads = [stack.enter_context(Load(copy.port, read(path), clients=32)) for copy in copies]
        for name, act in acts.items():
            sampler.peak()
            seen = [len(load.answers) for load in loads]
            workers = {pid for copy in copies for pid in copy.workers()}
            said = copies[0].text().count(REFUSED)
            act(copies)
            time.sleep(seconds)
            said = copies[0].text().count(REFUSED) - said
            peak, kinds = sampler.peak(), Counter[str]()
            for load, start in zip(loads, seen, strict=True):
                kinds.update(answer.kind for answer in load.answers[start:])
            renewed = len({pid for copy in copies for pid in copy.workers()} - workers)
            refused = len(NO_CONNECTION_LEFT.findall(postgres.log.read_text()))
            result = Result(f"Budget: {name}", "2 copies, 32 clients each, 20 ms query, workers recycled", BAR)
            result.counted = {"peak": peak, "plan": plan, "answers": dict(kinds), "new workers": renewed,
                              "signals refused": said}  # fmt: skip
            result.expect(peak <= plan, f"peak {peak} > {plan}")
            result.expect(refused == 0, f"{refused} times too many clients")
            result.expect(set(kinds) == {"200"}, f"answers {dict(kinds)}")
            result.expect(bool(said) == (name != "nothing else"), f"{said} signals refused")
            results.append(result)
    return results


def test_budget(baked: Project, postgres: Postgres, tmp_path: Path, long: bool) -> None:
    results = budgets(baked.copy(tmp_path, RECYCLED), postgres, ACTS, 20 if long else 3)
    for result in results:
        record(result)
    assert not [result.missed for result in results if result.missed]


def test_workers_on_the_command_line(baked: Project, postgres: Postgres) -> None:
    """`--workers` would change one side of the sum without the other: refused, with the variable that changes both."""
    result = Result("Budget: --workers, --threads, GUNICORN_CMD_ARGS", "start", "refused, with the variable to set")
    cases = [
        ("WEB_CONCURRENCY", ("--workers=9",), {}),
        ("WEB_THREADS", (), {"GUNICORN_CMD_ARGS": "--threads=9"}),
    ]
    for variable, arguments, env in cases:
        with pytest.raises(RuntimeError) as refused, Copy(baked, postgres.url(), *arguments, **env):
            pass
        result.expect(f"leave it out; {variable} changes it" in str(refused.value), str(refused.value)[-200:])
    result.counted = {"refused": len(cases) - len(result.missed)}
    assert not record(result).missed


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "act", "path"),
    [
        ("pools without overflow", "nothing else", "/chaos/two?s=0.02"),
        ("the refusal of TTIN", "TTIN x 5", "/chaos/query?s=0.02"),
        ("the refusal of HUP", "HUP x 3", "/chaos/query?s=0.02"),
    ],
)
def test_sabotage(name: str, act: str, path: str, sabotaged: Callable[[str], Project], postgres: Postgres) -> None:
    (result,) = budgets(sabotaged(name), postgres, {act: ACTS[act]}, 6, path)
    assert any("peak" in missed or "answers" in missed for missed in record(result, sabotaged=name).missed)
