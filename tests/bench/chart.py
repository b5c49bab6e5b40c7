"""One picture for the README: requests per second and CPU per request, with the range of the rounds."""

import io
import re
from pathlib import Path
from typing import Any

from tests.bench.report import CPU, RATE, cells, middle, names, values

LABELS = {
    "baked": "this template",
    "guide": "the 2024 guide, sync",
    "pre-ping": "Flask-SQLAlchemy + pre-ping",
    "nullpool": "Flask-SQLAlchemy, NullPool",
    "floor-flask": "Flask, hand-written SQL",
    "fastapi": "FastAPI, async ORM, asyncpg",
}
PANELS = ((RATE, "requests per second: longer is better"), (CPU, "CPU per request, µs: shorter is better"))
OURS, OTHERS, RANGES = "#2563eb", "#9ca3af", "#374151"


def draw(result: dict[str, Any], workload: str, path: Path) -> None:
    import matplotlib as mpl  # slow to import, and needed here only

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "bench", "svg.fonttype": "path", "font.size": 9})
    from matplotlib import pyplot as plt

    rows = result["rows"]
    clients = next(clients for name, clients in cells(rows) if name == workload)
    shown = [name for name in reversed(names(rows)) if values(rows, name, RATE, workload=workload, clients=clients)]
    figure, panels = plt.subplots(1, 2, figsize=(9, 0.5 + 0.34 * len(shown)), sharey=True, layout="constrained")
    for axes, (key, title) in zip(panels, PANELS, strict=True):
        found = [values(rows, name, key, workload=workload, clients=clients) for name in shown]
        middles = [middle(figures) for figures in found]
        below = [mid - min(figures) for mid, figures in zip(middles, found, strict=True)]
        above = [max(figures) - mid for mid, figures in zip(middles, found, strict=True)]
        colours = [OURS if name == "baked" else OTHERS for name in shown]
        labels = [LABELS.get(name, name) for name in shown]
        axes.barh(labels, middles, xerr=[below, above], color=colours, capsize=2, ecolor=RANGES)
        axes.set_title(title, fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    machine = result["machine"]
    figure.supxlabel(
        f"{workload} one, {clients} clients, median and range of {len({row['round'] for row in rows})} rounds;"
        f" {machine['cpus']} cpus, Python {machine['python']}, PostgreSQL {machine['postgres']}",
        fontsize=7,
    )
    save(figure, path)


def draw_growth(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw what the clients of a fleet are, and what the server sees of them."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.hashsalt": "growth", "svg.fonttype": "path", "font.size": 9})
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    planned = sorted({(row["instances"], row["clients_planned"]) for row in rows})
    axes.plot(*zip(*planned, strict=True), color=OTHERS, label="the services' connections, by plan")
    for poolers, marker in ((0, "s"), (1, "o"), (2, "^")):
        name = {0: "no pooler", 1: "one PgBouncer"}.get(poolers, f"{poolers} PgBouncers")
        for key, colour, what in (("clients", RANGES, "clients"), ("server", OURS, "server's connections")):
            found = [(row["instances"], row[key]) for row in rows if row["poolers"] == poolers and row.get(key)]
            if found:
                axes.plot(*zip(*found, strict=True), marker, color=colour, label=f"{what}, measured: {name}")
    usable = max(row["usable"] for row in rows)
    axes.axhline(usable, color=OTHERS, linestyle="--", label=f"what the server may give: {usable}")
    axes.set(xscale="log", yscale="log", xlabel="instances", ylabel="connections")
    axes.set_xticks(sorted({row["instances"] for row in rows}), labels=sorted({row["instances"] for row in rows}))
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    picture = io.StringIO()
    figure.savefig(picture, format="svg", metadata={"Date": None, "Creator": None}, facecolor="white")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(re.sub(r"[ \t]+$", "", picture.getvalue(), flags=re.MULTILINE))
