"""The cpus and the memory that this process may use, the container's limits included.

Only this module looks at the machine; the arithmetic is in sizing.py. gunicorn, `os.cpu_count()` and
`os.process_cpu_count()` do not see a cgroup's quota: in a container with half a cpu they report the host's cpus.

Each number is read once and kept. gunicorn's config and the app ask one after the other, and must get the same plan.
"""

import functools
import os
from collections.abc import Iterator
from pathlib import Path

MIB = 1024 * 1024


@functools.cache
def cpus(root: Path = Path("/")) -> float:
    """Return the cpus that this process may use: the least of the cgroup quota (v2, v1) and the affinity mask."""
    found = [float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1))]
    for group in _groups(root):
        v1 = f"{_text(group / 'cpu.cfs_quota_us')} {_text(group / 'cpu.cfs_period_us')}"
        for text in (_text(group / "cpu.max"), v1):
            quota, _, period = text.partition(" ")
            if quota.isdecimal() and period.isdecimal() and int(period):  # no quota is written as max, in v1 as -1
                found.append(int(quota) / int(period))
    return min(found)


@functools.cache
def memory_mib(root: Path = Path("/")) -> int:
    """Return the memory that this process may use: the least of the cgroup limits (v2, v1) and the machine's own."""
    files = (group / name for group in _groups(root) for name in ("memory.max", "memory.limit_in_bytes"))
    limits = [int(text) for text in map(_text, files) if text.isdecimal()]
    return min([_machine_memory(root), *limits]) // MIB  # v1 writes "no limit" as a number just below 2**63


def _groups(root: Path) -> Iterator[Path]:
    """Yield every folder from our own cgroups up to their mounts: the limit of an ancestor holds for us as well.

    v2 is mounted at /sys/fs/cgroup, or at `unified` in it beside v1; a controller of v1 is mounted at its name. In a
    container the path in /proc/self/cgroup is often the host's, and does not exist below the mount. Then only the mount
    itself is found, which is the container's own group.
    """
    for line in _text(root / "proc/self/cgroup").splitlines() or ["0::/"]:
        _, controllers, path = line.split(":", 2)
        for mount in (controllers, *controllers.split(",")) if controllers else ("", "unified"):
            top = root / "sys/fs/cgroup" / mount
            own = top / path.lstrip("/")
            yield from (group for group in (own, *own.parents) if group.is_relative_to(top))


def _machine_memory(root: Path) -> int:
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemTotal":
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # macOS, BSD


def _text(path: Path) -> str:
    """Return the file's text, or an empty one if it cannot be read: no file means no limit."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
