"""What this machine lets us use: cpus and memory, the container's limits included.

The one module that looks at the machine; the arithmetic is in sizing.py. gunicorn, `os.cpu_count()` and
`os.process_cpu_count()` do not see a cgroup's quota: in a container with half a cpu they all report the host's.

It looks once, and keeps the answer. gunicorn's config and the app ask one after the other, and a limit that changed in
between would give them two plans.
"""

import functools
import os
from collections.abc import Iterator
from pathlib import Path

MIB = 1024 * 1024
# cgroup v1 writes "no limit" as a number just below 2**63.
V1_UNLIMITED = 2**60


@functools.cache
def cpus(root: Path = Path("/")) -> float:
    """The cpus this process may use: the least of the cgroup quota (v2, v1) and the affinity mask."""
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    return min([float(available), *_v2_quotas(root), *_v1_quotas(root)])


@functools.cache
def memory_mib(root: Path = Path("/")) -> int:
    """The memory this process may use, in MiB: the least of the cgroup limits and the machine's own."""
    limits = [_machine_memory(root), *_v2_memory(root), *_v1_memory(root)]
    return min(limits) // MIB


def _v2_quotas(root: Path) -> Iterator[float]:
    for folder in _groups(root, "", "sys/fs/cgroup", "sys/fs/cgroup/unified"):
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if quota.isdecimal() and period.isdecimal() and int(period):
            yield int(quota) / int(period)


def _v1_quotas(root: Path) -> Iterator[float]:
    for folder in _groups(root, "cpu", "sys/fs/cgroup/cpu", "sys/fs/cgroup/cpu,cpuacct"):
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal() and int(period):  # no quota is written as -1
            yield int(quota) / int(period)


def _v2_memory(root: Path) -> Iterator[int]:
    for folder in _groups(root, "", "sys/fs/cgroup", "sys/fs/cgroup/unified"):
        limit = _text(folder / "memory.max")
        if limit.isdecimal():
            yield int(limit)


def _v1_memory(root: Path) -> Iterator[int]:
    for folder in _groups(root, "memory", "sys/fs/cgroup/memory"):
        limit = _text(folder / "memory.limit_in_bytes")
        if limit.isdecimal() and int(limit) < V1_UNLIMITED:
            yield int(limit)


def _groups(root: Path, controller: str, *mounts: str) -> Iterator[Path]:
    """Every folder from our own cgroup up to the mount: a limit on any ancestor binds us too.

    Inside a container the path in /proc/self/cgroup is often the host's and does not exist below the mount; the
    walk then ends at the mount itself, which is the container's own group.
    """
    for line in _text(root / "proc/self/cgroup").splitlines() or ["0::/"]:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(","):
            for mount in mounts:
                folder = root / mount / path.lstrip("/")
                while folder != (root / mount):
                    yield folder
                    folder = folder.parent
                yield folder


def _machine_memory(root: Path) -> int:
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemTotal":
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")  # macOS, BSD


def _text(path: Path) -> str:
    """The file's text, or nothing where it cannot be read: a missing limit is no limit."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
