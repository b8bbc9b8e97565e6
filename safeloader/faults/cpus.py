"""How many CPUs this process may really use: CPU affinity and the CPU quota of its cgroups (v1 and v2).

`os.cpu_count()` counts the machine's CPUs. Under Slurm, Docker and Kubernetes a process may use fewer, and workers
beyond that number only take memory and wait for each other.

A quota holds for a cgroup and everything below it, so all cgroups from the process's own up to the one that is
mounted are read, and the smallest quota counts. Parsing is pure; only `available_cpus` and `cgroup_quota` touch files.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from safeloader.faults.cgroups import Folder, folders


@dataclass(frozen=True)
class CpuBudget:
    """The number of CPUs that this process may use, 1 or more, and what it follows from, for a person."""

    cpus: int
    reason: str


@dataclass(frozen=True)
class Quota:
    """A cgroup's CPU limit, in CPUs (1.5 is one and a half), and the file that says so."""

    cpus: float
    file: str


def available_cpus(system: Path = Path("/")) -> CpuBudget:
    """The CPUs that affinity and the cgroup allow this process.

    Args:
        system: Where `proc` and `sys` are found; tests give a recorded tree.
    """
    machine = os.cpu_count() or 1
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else machine
    return budget(machine, affinity, cgroup_quota(system))


def budget(machine: int, affinity: int, quota: Quota | None) -> CpuBudget:
    """Combine the three limits; a quota is rounded down, but never below one CPU."""
    if quota is not None and quota.cpus < affinity:
        whole = max(1, int(quota.cpus))
        return CpuBudget(whole, f"the cgroup allows {quota.cpus:g} of {machine} CPUs ({quota.file})")
    if affinity < machine:
        return CpuBudget(affinity, f"CPU affinity allows {affinity} of {machine} CPUs")
    return CpuBudget(machine, f"the machine has {machine} CPUs")


def cgroup_quota(system: Path) -> Quota | None:
    """The smallest CPU quota on the way from this process's cgroup to the mounted one; None if there is none."""
    quotas = [quota for folder in folders("cpu", system) if (quota := _quota_of(folder, system)) is not None]
    return min(quotas, key=lambda quota: quota.cpus, default=None)


def _quota_of(folder: Folder, system: Path) -> Quota | None:
    if folder.version == 2:
        cpus, name = parse_cpu_max(folder.read("cpu.max", system)), "cpu.max"
    else:
        quota, period = folder.read("cpu.cfs_quota_us", system), folder.read("cpu.cfs_period_us", system)
        cpus, name = parse_cfs(quota, period), "cpu.cfs_quota_us"
    return None if cpus is None else Quota(cpus, folder.file(name))


def parse_cpu_max(text: str) -> float | None:
    """CPUs from v2's `cpu.max`, "quota period" in µs; None for "max …" and for a missing file."""
    quota, _, period = text.strip().partition(" ")
    if not quota.isdecimal():
        return None
    return int(quota) / int(period or 100_000)


def parse_cfs(quota: str, period: str) -> float | None:
    """CPUs from v1's `cpu.cfs_quota_us` and `cpu.cfs_period_us`; None for -1 and for missing files."""
    if not quota.strip().isdecimal() or not period.strip().isdecimal():
        return None
    return int(quota) / int(period)
