"""New code while requests keep coming: none of them may fail."""

import signal
import threading
import time
from collections.abc import Callable

import pytest

from chaos.harness import Copy, Load, Postgres, Project, Result, Sampler, read, record, wait_for

PATH = "/chaos/query?s=0.02"


def progress(load: Load, requests: float) -> None:
    """Wait for so many answers more."""
    enough = len(load.answers) + requests
    wait_for(lambda: len(load.answers) >= enough, 120, "progress")


def hup(project: Project, postgres: Postgres, requests: int) -> Result:
    result = Result("Deploy: HUP under load", f"{requests} requests, 24 clients, 20 ms query", "none failed")
    with Copy(project, postgres.url()) as copy:
        before = set(copy.workers())
        with Load(copy.port, read(PATH), clients=24, requests=requests) as load:
            for _ in range(3):
                progress(load, requests / 8)
                copy.signal(signal.SIGHUP)
            load.wait()
        renewed = not before & set(copy.workers())
    result.counted = {"answers": dict(load.kinds()), "all workers new": renewed}
    result.expect(set(load.kinds()) == {"200"} and len(load.answers) == requests, f"answers {dict(load.kinds())}")
    result.expect(renewed, "some workers are still the old ones")
    return result


def rolling(project: Project, postgres: Postgres, requests: int, *, drained: bool = True) -> Result:
    """A balancer as an orchestrator is one: it sends to the copies that are ready, and not to one that is to stop."""
    how = "taken out of the balancer a second before TERM" if drained else "TERM at once"
    result = Result(
        f"Deploy: old copy down while the new one comes up, {how}", f"{requests} requests, 24 clients, 20 ms query",
        "none failed; peak <= plan",
    )  # fmt: skip
    old, new = Copy(project, postgres.url(), APP_INSTANCES=2), Copy(project, postgres.url(), APP_INSTANCES=2)
    with old, Sampler(postgres, project.slug) as sampler:
        targets = [old.port]
        turn = iter(range(10**9))
        with Load(lambda: targets[next(turn) % len(targets)], read(PATH), clients=24) as load:
            wait_for(lambda: len(load.answers) > requests / 4, 120, "progress")
            with new:
                wait_for(lambda: new.get("/readyz").status == 200, 20, "ready copy")
                targets.append(new.port)
                progress(load, requests / 4)
                if drained:
                    targets.remove(old.port)
                    time.sleep(1)
                stop = threading.Thread(target=old.stop)
                stop.start()
                if not drained:
                    time.sleep(0.3)
                    targets.remove(old.port)
                stop.join()
                wait_for(lambda: len(load.answers) >= requests, 120, "progress")
                load.stop()
        peak, plan = sampler.peak(), old.plan["peak"]
    result.counted = {"answers": dict(load.kinds()), "peak": peak, "plan": plan}
    result.expect(set(load.kinds()) == {"200"}, f"answers {dict(load.kinds())}")
    result.expect(peak <= plan, f"peak {peak} > {plan}")
    return result


def test_hup(baked: Project, postgres: Postgres, long: bool) -> None:
    assert not record(hup(baked, postgres, 10_000 if long else 1500)).missed


def test_rolling(baked: Project, postgres: Postgres, long: bool) -> None:
    assert not record(rolling(baked, postgres, 10_000 if long else 1500)).missed


@pytest.mark.long
def test_sabotage(sabotaged: Callable[[str], Project], postgres: Postgres) -> None:
    """No grace for what is in flight, and the balancer is not told."""
    name = "the graceful stop"
    result = rolling(sabotaged(name), postgres, 1000, drained=False)
    assert record(result, sabotaged=name).missed
