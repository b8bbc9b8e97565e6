"""How many CPUs this process may really use: CPU affinity and the CPU quota of its cgroups (v1 and v2).

`os.cpu_count()` counts the machine's CPUs. Under Slurm, Docker and Kubernetes a process may use fewer, and workers
beyond that number only take memory and wait for each other.

A quota holds for a cgroup and everything below it, so all cgroups from the process's own up to the one that is
mounted are read, and the smallest quota counts. Parsing is pure; only `available_cpus` and `_read` touch files.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


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


@dataclass(frozen=True)
class Mount:
    """A mounted cgroup hierarchy, from `/proc/self/mountinfo`.

    Attributes:
        point: Where it is mounted.
        root: The cgroup that appears there, as `/proc/self/cgroup` names it.
        controllers: Those of a v1 hierarchy; None for v2.
    """

    point: str
    root: str
    controllers: frozenset[str] | None


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
    memberships = parse_memberships(_read(system / "proc/self/cgroup"))
    quotas: list[Quota] = []
    for mount in parse_mounts(_read(system / "proc/self/mountinfo")):
        controller = "" if mount.controllers is None else "cpu"
        if controller not in memberships or (mount.controllers is not None and "cpu" not in mount.controllers):
            continue
        for folder in _upwards(mount, memberships[controller]):
            found = _quota_of(system, folder, version=2 if mount.controllers is None else 1)
            if found is not None:
                quotas.append(found)
    return min(quotas, key=lambda quota: quota.cpus, default=None)


def _quota_of(system: Path, folder: PurePosixPath, *, version: int) -> Quota | None:
    here = system / folder.relative_to("/")
    if version == 2:
        cpus, name = parse_cpu_max(_read(here / "cpu.max")), "cpu.max"
    else:
        quota, period = _read(here / "cpu.cfs_quota_us"), _read(here / "cpu.cfs_period_us")
        cpus, name = parse_cfs(quota, period), "cpu.cfs_quota_us"
    return None if cpus is None else Quota(cpus, str(folder / name))


def _upwards(mount: Mount, cgroup: str) -> Iterator[PurePosixPath]:
    """The folders of `cgroup` and its ancestors below the mount.

    In a container without a cgroup namespace `/proc/self/cgroup` names the host's path, and the mount shows only
    the part below the container's own cgroup: what is not below `mount.root` is taken as that root.
    """
    try:
        below = PurePosixPath(cgroup).relative_to(mount.root)
    except ValueError:
        below = PurePosixPath()
    if ".." in below.parts:
        below = PurePosixPath()
    folder = PurePosixPath(mount.point) / below
    yield folder
    for _ in below.parts:
        folder = folder.parent
        yield folder


def parse_memberships(text: str) -> dict[str, str]:
    """`/proc/self/cgroup` as {controller: path}; the v2 hierarchy's controller is "".

    Source: cgroups(7), lines `hierarchy-ID:controller-list:cgroup-path`.
    """
    memberships: dict[str, str] = {}
    for line in text.splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for controller in controllers.split(","):
            memberships[controller] = path
    return memberships


def parse_mounts(text: str) -> list[Mount]:
    """The cgroup mounts in `/proc/self/mountinfo`.

    Source: proc_pid_mountinfo(5): fields 4 and 5 are root and mount point; after a lone `-` come the type, the
    source and the super options, which for v1 list the controllers.
    """
    mounts = []
    for line in text.splitlines():
        before, _, after = line.partition(" - ")
        fields, kind = before.split(), after.split()
        if len(fields) < 5 or len(kind) < 3:
            continue
        if kind[0] == "cgroup2":
            mounts.append(Mount(fields[4], fields[3], None))
        elif kind[0] == "cgroup":
            mounts.append(Mount(fields[4], fields[3], frozenset(kind[2].split(","))))
    return mounts


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


def _read(path: Path) -> str:
    """The file's text; empty if it isn't there or may not be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
