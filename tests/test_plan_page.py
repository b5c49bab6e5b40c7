"""docs/plan/index.html in a real browser: the same arithmetic as sizing.py, a form that its URL restores, and blocks that
open what the page says."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromium
import pytest
from baking import PROJECT, ROOT, load

PAGE = ROOT / "docs" / "plan" / "index.html"
sizing = load(ROOT / PROJECT / "flask_pooling" / "sizing.py")
INPUTS = 10_000
# What the page's own functions say of many inputs at once.
OUTCOMES = """
(%s).map((numbers) => {
  try {
    const p = plan(numbers);
    return { workers: p.workers, threads: p.threads, pool_size: p.pool_size, notes: p.notes, sum: sum(p),
      connections_per_instance: connectionsPerInstance(p), connections_peak: connectionsPeak(p),
      connections_usable: connectionsUsable(p), role_limit: roleLimit(p), pooler_sizes: poolerSizes(p) };
  } catch (error) {
    if (!(error instanceof PlanError)) throw error;
    return { error: error.message, remedies: error.remedies.map(({ name, value }) => [name, value]) };
  }
})
"""


@pytest.fixture(scope="module")
def browser() -> Iterator[chromium.Page]:
    with chromium.opened() as page:
        yield page


def numbers(chance: random.Random) -> dict[str, Any]:
    """Inputs of a plan: mostly of everyday size, so that much of it is about to fit or not to; some at the limits."""

    def one(usual: int, most: int, least: int = 1) -> int:
        return chance.choice([chance.randint(least, usual)] * 9 + [chance.randint(least, most)])

    def perhaps(usual: int, most: int) -> int | None:
        return one(usual, most) if chance.random() < 0.25 else None

    names = chance.sample(["worker", "beat", "mail"], chance.choice([0, 0, 1, 2, 3]))
    return {
        "cpus": chance.choice([chance.randint(1, 16), round(chance.uniform(0.01, 16), 2), chance.uniform(0.01, 4096)]),
        "memory_mib": chance.choice([128, 256, 512, 1024, 2048, chance.randint(1, 500), one(16_384, 1_000_000)]),
        "max_connections": one(500, 262_143),
        "instances": one(20, 262_143),
        "reserved": one(20, 100_000, least=0),
        "worker_class": chance.choice(["gthread", "gthread", "sync"]),
        "worker_memory_mib": chance.choice([150, one(600, 100_000)]),
        "workers": perhaps(14, 1000),
        "threads": perhaps(8, 1000),
        "pool_size": perhaps(12, 1000),
        "max_overflow": chance.choice([0, 0, one(10, 1000)]),
        "pooler": chance.choice(["none", "none", "pgbouncer"]),
        "poolers": one(6, 1000),
        "binds": chance.choice([0, 0, one(4, 100)]),
        "jobs": {name: {"copies": one(10, 99_999), "connections": one(10, 99_999)} for name in names},
    }


def outcome(inputs: dict[str, Any]) -> dict[str, Any]:
    """What sizing.py says, in the form of OUTCOMES."""
    jobs = {name: sizing.Job(**job) for name, job in inputs["jobs"].items()}
    try:
        plan = sizing.plan(**inputs | {"jobs": jobs})
    except sizing.PlanError as error:
        return {"error": str(error), "remedies": [[each.name, each.value] for each in error.remedies]}
    names = ("workers", "threads", "pool_size", "sum", "connections_per_instance", "connections_peak")
    names += ("connections_usable", "role_limit", "pooler_sizes")
    return {name: getattr(plan, name) for name in names} | {"notes": list(plan.notes)}


def test_the_arithmetic_is_that_of_the_library(browser: chromium.Page):
    """Numbers, notes, errors and what would help are the same for 10,000 random inputs."""
    seed = random.randrange(2**32)  # noqa: S311  # no secret
    chance = random.Random(seed)  # noqa: S311
    print(f"seed {seed}")
    browser.open(PAGE.as_uri())
    inputs = [numbers(chance) for _ in range(INPUTS)]
    said = browser.ask(OUTCOMES % json.dumps(inputs))
    expected = [outcome(each) for each in inputs]
    different = [(given, want, got) for given, want, got in zip(inputs, expected, said, strict=True) if want != got]
    assert different[:1] == [], f"{len(different)} of {INPUTS} differ; seed {seed}"
    # As many kinds of answer as there are. Otherwise this would say little.
    errors = [each["error"] for each in expected if "error" in each]
    assert INPUTS / 5 < len(errors) < INPUTS * 4 / 5
    kinds = ("a sync worker has", "is less than WEB_THREADS", "no connection is left for pgbouncer", "the jobs alone")
    kinds += ("for the master holds fewer", "has to serve at least", "slots each = ")
    assert [kind for kind in kinds if not any(kind in error for error in errors)] == []
