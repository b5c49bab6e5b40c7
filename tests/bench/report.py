"""Medians, their spread, and paired ratios, in words that say what the figures can carry and what they cannot."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

Row = dict[str, Any]
# A ratio whose rounds differ by more than this says little, whatever its median is.
NOISY = 1.4
FEW = 3

RATE, CPU = "requests_per_second", "cpu_us_per_request"


@dataclass(frozen=True)
class Paired:
    """One figure of two candidates, divided round by round."""

    ratios: tuple[float, ...]

    @property
    def middle(self) -> float:
        return median(self.ratios)

    @property
    def low(self) -> float:
        return min(self.ratios)

    @property
    def high(self) -> float:
        return max(self.ratios)

    @property
    def noisy(self) -> bool:
        return len(self.ratios) < FEW or self.low <= 0 or self.high / self.low > NOISY

    @property
    def confidence(self) -> float:
        """That the true median is between the lowest and the highest: each round is above or below it like a coin."""
        return 1 - 2 ** (1 - len(self.ratios))

    def __str__(self) -> str:
        text = f"{self.middle:.2f} [{self.low:.2f}, {self.high:.2f}]"
        return f"{text} {'too noisy' if self.noisy else ''}".rstrip()


@dataclass(frozen=True)
class Bar:
    """A claim: the figure of `ours` divided by that of `theirs` is at least, or at most, so much."""

    workload: str
    figure: str
    theirs: str
    at_least: float | None = None
    at_most: float | None = None

    def judge(self, paired: Paired) -> str:
        if len(paired.ratios) < FEW:
            return "too few rounds"
        better = paired.low if self.at_most is None else paired.high
        worse = paired.high if self.at_most is None else paired.low
        if self._holds(better):
            return "holds"
        if not self._holds(worse):
            return "FAILS"
        return f"not resolved ({'holds' if self._holds(paired.middle) else 'fails'} at the median)"

    def _holds(self, ratio: float) -> bool:
        return ratio >= self.at_least if self.at_most is None else ratio <= self.at_most

    def __str__(self) -> str:
        sign = f">= {self.at_least:.2f}" if self.at_most is None else f"<= {self.at_most:.2f}"
        return f"{self.workload} against {self.theirs}, {NAMES[self.figure]} {sign}"


NAMES = {RATE: "requests/s", CPU: "CPU a request"}
BARS = (
    Bar("read", CPU, "guide", at_most=0.9),
    Bar("read", CPU, "fastapi", at_most=1.0),
    Bar("read", RATE, "guide", at_least=1.2),
    Bar("read", RATE, "fastapi", at_least=1.0),
)


def cells(rows: Iterable[Row]) -> list[tuple[str, int]]:
    return list(dict.fromkeys((row["workload"], row["clients"]) for row in rows if "workload" in row))


def names(rows: Iterable[Row]) -> list[str]:
    """Return the candidates, the one that all are compared with first."""
    found = dict.fromkeys(row["candidate"] for row in rows)
    return ["baked", *(name for name in found if name != "baked")] if "baked" in found else list(found)


def values(rows: Iterable[Row], candidate: str, figure: str, **where: Any) -> list[float]:
    """Return a figure's values, round by round."""
    return [
        row[figure]
        for row in sorted(rows, key=lambda row: row["round"])
        if figure in row and row["candidate"] == candidate and all(row.get(k) == v for k, v in where.items())
    ]


def pair(rows: Iterable[Row], ours: str, theirs: str, figure: str, **where: Any) -> Paired | None:
    rows = list(rows)
    ours_values, theirs_values = (values(rows, name, figure, **where) for name in (ours, theirs))
    ratios = [a / b for a, b in zip(ours_values, theirs_values, strict=False) if b]
    return Paired(tuple(ratios)) if ratios else None


def middle(figures: Sequence[float]) -> float:
    return median(figures) if figures else math.nan


def spread(figures: Sequence[float]) -> str:
    """Return half the range, as a percentage of the median."""
    mid = middle(figures)
    return f"{(max(figures) - min(figures)) / 2 / mid * 100:.0f}%" if figures and mid else "-"


def table(head: Sequence[str], body: Iterable[Sequence[object]]) -> str:
    """Write a table in Markdown, which reads well in a terminal."""
    rows = [list(head), *([str(cell) for cell in row] for row in body)]
    widths = [max(len(row[n]) for row in rows) for n in range(len(head))]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    lines = [f"| {' | '.join(row)} |" for row in padded]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def speed(rows: list[Row]) -> str:
    """Write a table for each cell; ratios are the first candidate's, over the other's, in the same round. CPU comes
    first, since it is the steadier figure."""
    head = ["candidate", "CPU us", "±", "requests/s", "±", "p50 ms", "p99 ms", "failed", "opened", "held"]
    ours = names(rows)[0]
    head += [f"{ours}'s CPU, paired", f"{ours}'s requests/s, paired"]
    parts = []
    for workload, clients in cells(rows):
        where = {"workload": workload, "clients": clients}

        def figure(name: str, key: str, how: Callable[[list[float]], Any] = middle, where: Row = where) -> Any:
            return how(values(rows, name, key, **where))

        body = [
            [
                name,
                f"{figure(name, CPU):.0f}",
                figure(name, CPU, spread),
                f"{figure(name, RATE):.0f}",
                figure(name, RATE, spread),
                f"{figure(name, 'p50_ms'):.1f}",
                f"{figure(name, 'p99_ms'):.1f}",
                figure(name, "failed", sum),
                f"{figure(name, 'connections_opened'):.0f}",
                f"{figure(name, 'connections_held', max):.0f}",
                *("" if name == ours else str(pair(rows, ours, name, key, **where)) for key in (CPU, RATE)),
            ]
            for name in names(rows)
            if values(rows, name, RATE, **where)
        ]
        parts.append(f"{workload}, {clients} clients\n\n{table(head, body)}")
    return "\n\n".join(parts)


def against(rows: list[Row]) -> str:
    """Write one line for each workload: the first candidate's requests/s over each other's."""
    first, *others = names(rows)
    body = [
        [workload, *(pair(rows, first, name, RATE, workload=workload, clients=clients) for name in others)]
        for workload, clients in cells(rows)
    ]
    return table([f"requests/s of {first} over", *others], body)


def round_trips(rows: list[Row]) -> str:
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    body = []
    for name in names(rows):
        line = [name]
        for workload in workloads:
            for row in rows:
                if (row["candidate"], row["workload"]) == (name, workload):
                    opened = row["connections_per_request"]
                    line.append(f"{row['round_trips_per_request']:g}" + (f" + {opened:g} connection" if opened else ""))
        body.append(line)
    return table(["round trips a request", *workloads], body)


def memory(rows: list[Row]) -> str:
    body = [
        [
            name,
            f"{middle(values(rows, name, 'workers')):.0f}",
            f"{middle(values(rows, name, 'pss_worker_mib')):.1f}",
            f"{middle(values(rows, name, 'pss_share_mib')):.1f}",
        ]
        for name in names(rows)
    ]
    return table(["memory after the load", "workers", "PSS of a worker, MiB", "PSS of all / workers, MiB"], body)


def summary(result: dict[str, Any], counted: list[Row], clients: int = 32) -> str:
    """Write the README's table: requests per second of the baked service over each other candidate's, and counts."""
    rows = result["rows"]
    workloads = [workload for workload, at_once in cells(rows) if at_once == clients]
    trips = {
        (row["candidate"], row["workload"]): f"{row['round_trips_per_request']:.0f}" for row in result["round_trips"]
    }
    instructions = {
        row["candidate"]: f"{row['instructions'] / 1e6:.2f} M" for row in counted if row["workload"] == "read"
    }
    body = [
        [
            result["candidates"][name],
            *(
                "1" if name == "baked" else str(pair(rows, "baked", name, RATE, workload=one, clients=clients))
                for one in workloads
            ),
            " / ".join(trips[name, one] for one in ("read", "write")),
            instructions.get(name, "-"),
            f"{middle(values(rows, name, 'pss_share_mib')):.0f}",
        ]
        for name in names(rows)
    ]
    head = [*workloads, "round trips, read / write", "instructions of a read", "MiB a worker"]
    return table(["requests/s of the baked service over", *head], body)


def counted(rows: list[Row]) -> str:
    """Return the instructions of a whole server for one request, by candidate and workload."""
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    found = {(row["candidate"], row["workload"]): f"{row['instructions'] / 1e6:.2f} M" for row in rows}
    candidates = dict.fromkeys(row["candidate"] for row in rows)
    body = [[name, *(found.get((name, workload), "-") for workload in workloads)] for name in candidates]
    return table(["instructions a request", *workloads], body)


def bars(rows: list[Row]) -> str:
    body = []
    for bar in BARS:
        for workload, clients in cells(rows):
            paired = pair(rows, "baked", bar.theirs, bar.figure, workload=workload, clients=clients)
            if workload == bar.workload and paired:
                body.append([bar, clients, paired, bar.judge(paired)])
    return table(["bar", "clients", "median [lowest, highest]", "verdict"], body) if body else ""


def footnote(rows: list[Row]) -> str:
    rounds = len({row["round"] for row in rows})
    confidence = Paired((1.0,) * rounds).confidence
    return (
        f"Medians of {rounds} rounds; ± is half the range. A paired ratio is taken within each round; the true median"
        f" is between the lowest and the highest of them with a probability of {confidence:.0%}. Where these differ by"
        f" more than {NOISY}x, or there are fewer than {FEW}, the ratio is called too noisy."
    )


def growth(rows: list[Row]) -> str:
    """Connections by the size of the fleet: what the plan says, and what was open while it was busy."""
    head = ["instances", "PgBouncers", "clients by plan", "clients", "server may", "server's peak", "refused"]
    keys = ("instances", "poolers", "clients_planned", "clients", "usable", "server", "failed")
    return table(head, ([row.get(key, "-") for key in keys] for row in rows))
