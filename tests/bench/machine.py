"""A running server as Linux sees it: processes, CPU, memory. And the machine, for the record."""

import contextlib
import os
import platform
from importlib.metadata import version
from pathlib import Path

TICKS = os.sysconf("SC_CLK_TCK")
MIB = 1024  # KiB
LIBRARIES = ["flask", "sqlalchemy", "psycopg", "psycopg-pool", "gunicorn", "fastapi", "uvicorn", "asyncpg"]


def tree(root: int) -> list[int]:
    """Return a process and all that descend from it."""
    found = [root]
    for pid in found:
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):  # a thread or a process that has just ended
                found += map(int, children.read_text().split())
    return found


def cpu_seconds(root: int) -> float:
    """Sum up the CPU time of a process and its descendants, those that have ended and been waited for included."""
    total = 0
    for pid in tree(root):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        total += sum(map(int, fields[11:15]))  # utime, stime, and the same of children that were waited for
    return total / TICKS


def workers(root: int) -> list[int]:
    """Return the processes that serve: those without children of their own, less Python's own helper."""
    return [
        pid
        for pid in tree(root)
        if len(tree(pid)) == 1 and b"resource_tracker" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]


def pss_mib(pid: int) -> float:
    """Return the memory of one process, with what it shares divided by the number that share it."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) / MIB
    raise RuntimeError(f"no Pss for {pid}")


def peak_mib(root: int) -> float:
    """Return the most that a worker has held since it started, all that it shares with others included."""
    statuses = (Path(f"/proc/{pid}/status").read_text().splitlines() for pid in workers(root))
    return max(int(line.split()[1]) for lines in statuses for line in lines if line.startswith("VmHWM:")) / MIB


def memory(root: int) -> dict[str, float]:
    """Return the PSS of a worker on average, and of the whole server divided by its workers."""
    serving = workers(root)
    return {
        "workers": len(serving),
        "pss_worker_mib": sum(map(pss_mib, serving)) / len(serving),
        "pss_share_mib": sum(map(pss_mib, tree(root))) / len(serving),
    }


def describe() -> dict[str, object]:
    """Describe the machine of the figures."""
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": model[0].partition(":")[2].strip() if model else platform.processor(),
        "cpus": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "linux": platform.release(),
        "libraries": {name: version(name) for name in LIBRARIES},
    }
