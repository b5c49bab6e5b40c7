"""cpus and memory, on folders that look like a machine's."""

import os
from pathlib import Path

import pytest

from flask_pooling import machine

pytestmark = pytest.mark.sqlite  # no database in it: once is enough


V2 = "0::/a/b\n"
V1 = "4:memory:/a/b\n3:cpuset:/\n2:cpu,cpuacct:/a/b\n1:name=systemd:/x\n"
MEMINFO = "MemTotal:       8388608 kB\nMemFree: 1 kB\n"


def lay_out(root: Path, files: dict[str, str]) -> Path:
    for name, text in {"proc/meminfo": MEMINFO, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8),
        ({"proc/self/cgroup": V2}, 8),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 8),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/a/b/cpu.max": "50000 100000\n"}, 0.5),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/a/cpu.max": "150000 100000\n"}, 1.5),
        (
            {
                "proc/self/cgroup": V2,
                "sys/fs/cgroup/a/b/cpu.max": "400000 100000",
                "sys/fs/cgroup/a/cpu.max": "250000 100000",
            },
            2.5,
        ),
        # In a container the path is the host's, and the mount is our own group.
        ({"proc/self/cgroup": "0::/host/path\n", "sys/fs/cgroup/cpu.max": "300000 100000\n"}, 3),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/a/b/cpu.max": "nonsense\n"}, 8),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/a/b/cpu.max": ""}, 8),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/a/b/cpu.max": "100000 0"}, 8),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/a/b/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/a/b/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/a/b/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/a/b/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "120000\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000\n",
            },
            1.2,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
            },
            2,
        ),
        # Hybrid: v1 has the controllers, v2 is mounted beside them.
        (
            {
                "proc/self/cgroup": V1 + "0::/a\n",
                "sys/fs/cgroup/unified/a/cpu.max": "max 100000",
                "sys/fs/cgroup/cpu/a/b/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu/a/b/cpu.cfs_period_us": "100000",
            },
            0.5,
        ),
    ],
)
def test_cpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], expected: float) -> None:
    """The least of every quota on the way up and the affinity mask."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert machine.cpus(lay_out(tmp_path, files)) == pytest.approx(expected)


def test_the_affinity_mask_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """taskset and cpusets narrow what a quota leaves."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3}, raising=False)
    files = {"proc/self/cgroup": V2, "sys/fs/cgroup/a/b/cpu.max": "400000 100000"}
    assert machine.cpus(lay_out(tmp_path, files)) == 1


def test_without_an_affinity_mask_the_cores_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS has none."""
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert machine.cpus(tmp_path) == 6


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 8192),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/a/b/memory.max": "max\n"}, 8192),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/a/b/memory.max": f"{512 * 1024 * 1024}\n"}, 512),
        (
            {
                "proc/self/cgroup": V2,
                "sys/fs/cgroup/a/b/memory.max": str(4 << 30),
                "sys/fs/cgroup/a/memory.max": str(1 << 30),
            },
            1024,
        ),
        ({"proc/self/cgroup": V1, "sys/fs/cgroup/memory/a/b/memory.limit_in_bytes": "9223372036854771712"}, 8192),
        ({"proc/self/cgroup": V1, "sys/fs/cgroup/memory/a/memory.limit_in_bytes": str(256 << 20)}, 256),
        ({"proc/self/cgroup": "0::/host\n", "sys/fs/cgroup/memory.max": str(2 << 30)}, 2048),
        ({"proc/self/cgroup": V2, "sys/fs/cgroup/a/b/memory.max": str(64 << 30)}, 8192),
    ],
)
def test_memory(tmp_path: Path, files: dict[str, str], expected: int) -> None:
    """The least of every limit on the way up and the machine's own, in MiB."""
    assert machine.memory_mib(lay_out(tmp_path, files)) == expected


def test_memory_where_there_is_no_proc(tmp_path: Path) -> None:
    """sysconf knows."""
    assert machine.memory_mib(tmp_path) > 100


def test_all_who_ask_get_the_same_answer(tmp_path: Path) -> None:
    """Though the limit changes between gunicorn's question and the app's."""
    limits = {"sys/fs/cgroup/a/b/cpu.max": "50000 100000", "sys/fs/cgroup/a/b/memory.max": "1048576"}
    lay_out(tmp_path, {"proc/self/cgroup": V2, **limits})
    first = machine.cpus(tmp_path), machine.memory_mib(tmp_path)
    lay_out(tmp_path, dict.fromkeys(limits, "max 100000"))
    assert (machine.cpus(tmp_path), machine.memory_mib(tmp_path)) == first == (0.5, 1)


def test_this_machine_can_be_read() -> None:
    """Whatever it is."""
    assert machine.cpus() > 0
    assert machine.memory_mib() > 0
