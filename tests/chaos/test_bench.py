"""`make bench`, shorter: a benchmark that nobody runs for months would not run when it is wanted."""

import itertools
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from serving import run

CANDIDATES, WORKLOADS = ("baked", "guide"), ("read", "write")
SHORTER = "--rounds 1 --seconds 0.2 --warm-up 0.1 --clients 8"
SHORTER += f" --workloads {','.join(WORKLOADS)} --only {','.join(CANDIDATES)}"


@pytest.mark.long
def test_bench(template: Path, tmp_path: Path):
    """It installs, bakes, serves, loads, counts, prints its tables, and stores what it found for the chart."""
    checkout = shutil.copytree(template, tmp_path / "a checkout")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where uv is
    done = run(f'make bench ARGS="{SHORTER}"', checkout, PATH=path)
    assert done.returncode == 0, done.stdout

    result = json.loads((checkout / "tests" / "bench" / "results" / "bench.json").read_text())
    cells = [row for row in result["rows"] if "workload" in row]
    pairs = list(itertools.product(CANDIDATES, WORKLOADS))
    assert sorted((row["candidate"], row["workload"]) for row in cells) == pairs
    assert [row for row in cells if row["failed"] or not row["requests_per_second"]] == []
    assert sorted(row["candidate"] for row in result["rows"] if "pss_worker_mib" in row) == list(CANDIDATES)
    trips = {(row["candidate"], row["workload"]): row["round_trips_per_request"] for row in result["round_trips"]}
    assert sorted(trips) == pairs
    assert trips["baked", "read"] == 1

    printed = re.findall(r"^\| (.+?) +\|", done.stdout, re.MULTILINE)
    for head in (
        "candidate",
        "memory after the load",
        "bar",
        "round trips a request",
        "requests/s of the baked service over",
    ):
        assert head in printed
    assert "<svg" in (checkout / "docs" / "bench.svg").read_text()
