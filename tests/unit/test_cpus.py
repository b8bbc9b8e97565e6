"""CPU budgets from recorded `/proc` and `/sys` files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from safeloader.faults.cpus import (
    CpuBudget,
    Quota,
    available_cpus,
    budget,
    cgroup_quota,
    parse_cfs,
    parse_cpu_max,
)

V1_MOUNTS = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
33 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
"""
V2_MOUNTS = """\
24 30 0:22 / /proc rw,nosuid,nodev,noexec,relatime shared:13 - proc proc rw
29 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate
"""


def system(folder: Path, files: dict[str, str]) -> Path:
    """A file tree to read instead of the machine's."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("text", "cpus"), [("max 100000\n", None), ("150000 100000\n", 1.5), ("400000\n", 4.0), ("", None)]
)
def test_cpu_max(text: str, cpus: float | None) -> None:
    assert parse_cpu_max(text) == cpus


@pytest.mark.parametrize(
    ("quota", "period", "cpus"), [("-1\n", "100000\n", None), ("250000\n", "100000\n", 2.5), ("", "", None)]
)
def test_cfs(quota: str, period: str, cpus: float | None) -> None:
    assert parse_cfs(quota, period) == cpus


def test_the_smallest_quota_on_the_way_up_counts(tmp_path: Path) -> None:
    found = cgroup_quota(
        system(
            tmp_path,
            {
                "proc/self/cgroup": "0::/kubepods/pod7/train\n",
                "proc/self/mountinfo": V2_MOUNTS,
                "sys/fs/cgroup/kubepods/cpu.max": "1600000 100000\n",
                "sys/fs/cgroup/kubepods/pod7/cpu.max": "300000 100000\n",
                "sys/fs/cgroup/kubepods/pod7/train/cpu.max": "max 100000\n",
            },
        )
    )
    assert found == Quota(3.0, "/sys/fs/cgroup/kubepods/pod7/cpu.max")


def test_docker_on_v1_where_the_mount_shows_the_containers_own_cgroup(tmp_path: Path) -> None:
    found = cgroup_quota(
        system(
            tmp_path,
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/docker/1f\n4:memory:/docker/1f\n",
                "proc/self/mountinfo": V1_MOUNTS.format(root="/docker/1f"),
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
        )
    )
    assert found == Quota(2.0, "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us")


@pytest.mark.parametrize("seen", ["/host/path/the/mount/does/not/show", "/../../other"])
def test_a_cgroup_outside_the_mount_is_taken_as_its_root(seen: str, tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": f"0::{seen}\n",
        "proc/self/mountinfo": V2_MOUNTS,
        "sys/fs/cgroup/cpu.max": "100000 100000\n",
    }
    assert cgroup_quota(system(tmp_path, files)) == Quota(1.0, "/sys/fs/cgroup/cpu.max")


def test_no_files_no_quota(tmp_path: Path) -> None:
    assert cgroup_quota(tmp_path) is None


@pytest.mark.parametrize(
    ("affinity", "quota", "expected"),
    [
        (64, None, CpuBudget(64, "the machine has 64 CPUs")),
        (4, None, CpuBudget(4, "CPU affinity allows 4 of 64 CPUs")),
        (4, Quota(8, "f"), CpuBudget(4, "CPU affinity allows 4 of 64 CPUs")),
        (64, Quota(2.5, "f"), CpuBudget(2, "the cgroup allows 2.5 of 64 CPUs (f)")),
        (64, Quota(0.5, "f"), CpuBudget(1, "the cgroup allows 0.5 of 64 CPUs (f)")),
    ],
)
def test_the_smallest_limit_counts_and_is_named(affinity: int, quota: Quota | None, expected: CpuBudget) -> None:
    assert budget(64, affinity, quota) == expected


def test_this_machine() -> None:
    assert 1 <= available_cpus().cpus <= len(os.sched_getaffinity(0))
