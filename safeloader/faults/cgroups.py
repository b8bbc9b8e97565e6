"""Where the kernel's files about this process's cgroups are, and what the memory controller's say: v1, v2, hybrid.

    /proc/self/cgroup      which cgroup the process is in, for each hierarchy
    /proc/self/mountinfo   where which part of a hierarchy is mounted
            └─► folders("memory")  /sys/fs/cgroup/memory/slurm/job_1/step_0   its own, first
                                   /sys/fs/cgroup/memory/slurm/job_1          then all above it that can be seen,
                                   /sys/fs/cgroup/memory/slurm                since limits hold for all below
                                   /sys/fs/cgroup/memory

`memory_cgroups` reads the memory controller's files into one shape for both versions. What follows from them, and
what the CPU controller's files mean, is for `memory` and `cpus` to know. Parsing is pure; only `read` touches files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

_NO_LIMIT_NBYTES: Final = 2**60
"""From here on a number is no limit: v1 says "unlimited" as 2**63 less one page, whose size varies."""


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


@dataclass(frozen=True)
class Folder:
    """A cgroup that this process is in, or one above it.

    Attributes:
        path: The folder of its files, absolute.
        version: 1 or 2.
        guessed: The mount does not show the cgroup that `/proc/self/cgroup` names, so what is mounted was taken to
            be the process's own. That is right in most containers, but nothing proves it.
    """

    path: PurePosixPath
    version: int
    guessed: bool = False

    def file(self, name: str) -> str:
        """The full name of one of its files, for messages."""
        return str(self.path / name)

    def read(self, name: str, system: Path) -> str:
        """The text of one of its files; see `read`."""
        return read(system / self.path.relative_to("/") / name)


@dataclass(frozen=True)
class Limit:
    """A cgroup's memory limit in bytes, and the file that says so.

    `inherited`: it is that of a cgroup further up, which perhaps can't be seen (a container on v1).
    """

    nbytes: int
    file: str
    inherited: bool = False


@dataclass(frozen=True)
class CgroupMemory:
    """What one cgroup's files say; None for what they don't.

    Attributes:
        folder: The cgroup.
        limit: The smallest of its limits; None if it has none.
        usage_nbytes: Memory of all processes there and below, with the file cache they filled.
        cache_nbytes: How much of that is file cache, active or not; see NOTE [file cache] in `memory`.
        kills: Victims of the OOM killer; see NOTE [who is counted] in `memory`.
        kills_file: The file that says so.
    """

    folder: Folder
    limit: Limit | None
    usage_nbytes: int | None
    cache_nbytes: int
    kills: int | None
    kills_file: str

    @property
    def room_nbytes(self) -> int | None:
        """How much more fits below the limit, 0 or more; None if there is no limit or no known usage."""
        if self.limit is None or self.usage_nbytes is None:
            return None
        return max(0, self.limit.nbytes - max(0, self.usage_nbytes - self.cache_nbytes))


def folders(controller: str, system: Path = Path("/")) -> Iterator[Folder]:
    """The process's own cgroup and all above it, as far as they are mounted, for each hierarchy that may do.

    The v2 hierarchy is always among them, since only its folders tell which controllers it has: expect files to be
    missing there.

    Args:
        controller: As the kernel calls it: "cpu", "memory".
        system: Where `proc` and `sys` are found; tests give a recorded tree.
    """
    memberships = parse_memberships(read(system / "proc/self/cgroup"))
    for mount in parse_mounts(read(system / "proc/self/mountinfo")):
        if mount.controllers is None:
            if "" in memberships:
                yield from _upwards(mount, memberships[""], version=2)
        elif controller in mount.controllers and controller in memberships:
            yield from _upwards(mount, memberships[controller], version=1)


def _upwards(mount: Mount, cgroup: str, *, version: int) -> Iterator[Folder]:
    """The folders of `cgroup` and its ancestors below the mount.

    In a container without a cgroup namespace `/proc/self/cgroup` names the host's path, and the mount shows only
    the part below the container's own cgroup: what is not below `mount.root` is taken as that root.
    """
    try:
        below = PurePosixPath(cgroup).relative_to(mount.root)
    except ValueError:
        below = PurePosixPath("..")
    guessed = ".." in below.parts
    if guessed:
        below = PurePosixPath()
    path = PurePosixPath(mount.point) / below
    yield Folder(path, version, guessed)
    for _ in below.parts:
        path = path.parent
        yield Folder(path, version)


def memory_cgroups(system: Path = Path("/")) -> list[CgroupMemory]:
    """What the memory controller says of each of `folders`, in their order."""
    found = folders("memory", system)
    return [_memory_v2(folder, system) if folder.version == 2 else _memory_v1(folder, system) for folder in found]


def _memory_v1(folder: Folder, system: Path) -> CgroupMemory:
    """Source: the kernel's admin-guide/cgroup-v1/memory.rst; `total_` counts the cgroups below as usage does."""
    stat = parse_counts(folder.read("memory.stat", system))
    limits = []
    if (nbytes := parse_nbytes(folder.read("memory.limit_in_bytes", system))) is not None:
        limits.append(Limit(nbytes, folder.file("memory.limit_in_bytes")))
    if (nbytes := parse_nbytes(str(stat.get("hierarchical_memory_limit")))) is not None:
        limits.append(Limit(nbytes, folder.file("memory.stat"), inherited=True))
    return CgroupMemory(
        folder=folder,
        limit=min(limits, key=lambda limit: (limit.nbytes, limit.inherited), default=None),
        usage_nbytes=parse_nbytes(folder.read("memory.usage_in_bytes", system)),
        cache_nbytes=stat.get("total_inactive_file", 0) + stat.get("total_active_file", 0),
        kills=parse_counts(folder.read("memory.oom_control", system)).get("oom_kill"),
        kills_file=folder.file("memory.oom_control"),
    )


def _memory_v2(folder: Folder, system: Path) -> CgroupMemory:
    """Source: the kernel's admin-guide/cgroup-v2.rst; all its files count the cgroups below."""
    stat = parse_counts(folder.read("memory.stat", system))
    limits = [
        Limit(nbytes, folder.file(name))
        for name in ("memory.max", "memory.high")
        if (nbytes := parse_nbytes(folder.read(name, system))) is not None
    ]
    return CgroupMemory(
        folder=folder,
        limit=min(limits, key=lambda limit: limit.nbytes, default=None),
        usage_nbytes=parse_nbytes(folder.read("memory.current", system)),
        cache_nbytes=stat.get("inactive_file", 0) + stat.get("active_file", 0),
        kills=parse_counts(folder.read("memory.events", system)).get("oom_kill"),
        kills_file=folder.file("memory.events"),
    )


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


def parse_nbytes(text: str) -> int | None:
    """A file that is one number of bytes; None for "max", v1's way to say so, and a missing file."""
    if not text.strip().isdecimal():
        return None
    nbytes = int(text)
    return nbytes if nbytes < _NO_LIMIT_NBYTES else None


def parse_counts(text: str) -> dict[str, int]:
    """Lines of a name and a number: `memory.stat`, `memory.events`, `memory.oom_control`, `/proc/vmstat`."""
    pairs = (line.split() for line in text.splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdecimal()}


def read(path: Path) -> str:
    """The file's text; empty if it isn't there or may not be read.

    Names of mounts need not be UTF-8: what is not is kept as surrogates.
    """
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return ""
