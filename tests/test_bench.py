"""`make bench`, shorter: a benchmark that nobody runs for months would not run when it is wanted."""

import itertools
import json
import os
import re
import shutil
import sys
from pathlib import Path

from baking import ROOT, load
from serving import run

CANDIDATES, WORKLOADS = ("baked", "guide"), ("read", "write")
SHORTER = "--rounds 1 --seconds 0.2 --warm-up 0.1 --clients 8"
SHORTER += f" --workloads {','.join(WORKLOADS)} --only {','.join(CANDIDATES)}"


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


def test_the_figures_are_the_benchmarks():
    """The table of docs/benchmark.md is what the stored counts say, and so are the figures of the README."""
    bench = ROOT / "tests" / "bench"
    rows = json.loads((bench / "results" / "instructions.json").read_text())["rows"]
    assert load(bench / "report.py").counted(rows) in (ROOT / "docs" / "benchmark.md").read_text()
    reads = {row["candidate"]: row["instructions"] for row in rows if row["workload"] == "read"}
    shown = re.findall(r"\| (\d\.\d\d) M \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert shown == [f"{reads[name] / 1e6:.2f}" for name in ("baked", "guide", "floor-flask")]
