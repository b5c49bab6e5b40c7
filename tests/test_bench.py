"""The documents have the figures of speed that `make bench` has stored; tests/chaos/test_bench.py runs it."""

import json
import re

from baking import ROOT, load


def test_the_figures_are_the_benchmarks():
    """The table of docs/benchmark.md is what the stored counts say, and so are the figures of the README."""
    bench = ROOT / "tests" / "bench"
    rows = json.loads((bench / "results" / "instructions.json").read_text())["rows"]
    assert load(bench / "report.py").counted(rows) in (ROOT / "docs" / "benchmark.md").read_text()
    reads = {row["candidate"]: row["instructions"] for row in rows if row["workload"] == "read"}
    shown = re.findall(r"\| (\d\.\d\d) M \|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert shown == [f"{reads[name] / 1e6:.2f}" for name in ("baked", "guide", "floor-flask")]
