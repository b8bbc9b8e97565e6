"""How much memory there is, who takes it, and whether the kernel's OOM killer was at work. Linux only, no torch.

    OomCounters   did the kernel kill a process of ours for memory?       memory.events, memory.oom_control, vmstat
    available     how much may this process and its children still take?  limits and usage of cgroups, meminfo
    worker_nbytes what does one worker cost?                              /proc/PID/smaps, /proc/PID/status
    Figures       what to write into the record of an incident

Parsing is pure; what takes `system` reads files. What can't be read is None, never zero.

It does not cover swap (a training that swaps is lost), limits of single NUMA nodes, and killers outside the kernel
(systemd-oomd, earlyoom, Slurm's own accounting): no counter of the kernel tells of those.

NOTE [who is counted] `oom_kill` of a cgroup counts the victims that *lived* there, whosever limit was hit: with the
limit at `job_1` and the victim in `job_1/step_0`, v1 counts at `step_0` alone. v2's `memory.events` counts there and
in all above it, so what rises only above our own cgroup, or only for the machine, can be somebody else's process; it
says less, and the sentence says so. `memory.events.local` would not say more: above our cgroup nobody lives, in our
own cgroup both count the same, and workers that were moved into cgroups below it are missing there. The kernel
counts before it sends SIGKILL (mm/oom_kill.c, `__oom_kill_process`), so once a worker's end was reaped, its kill is
counted.

NOTE [file cache] Cached file pages are taken back before anybody is killed, the active ones too. Kubernetes' "working
set" subtracts only inactive ones, but a file that is read twice is active: in the second epoch that is the whole
training set. Measured with a limit of 400 MiB: 300 MiB read twice, 0 MiB inactive; then 340 MiB were allocated and
nobody was killed. The kernel's own MemAvailable counts both kinds as well. The ring is no file cache to the kernel
(memory files are shmem), so it counts as used.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safeloader.faults.cgroups import CgroupMemory, Limit, memory_cgroups, parse_counts, read


@dataclass(frozen=True)
class OomKills:
    """One cgroup's counter: `kills` as `file` says; `own` if this process's own memory is charged there."""

    file: str
    kills: int
    own: bool


@dataclass(frozen=True)
class OomCounters:
    """The kernel's counts of processes that it killed for memory, at one moment.

    Compare with counters of shortly before the death, and count deaths against them: one kill raises them once.

    Attributes:
        cgroups: Those that could be read: the process's own first, then those above it.
        machine: `oom_kill` in `/proc/vmstat` (Linux 4.13 and later), or None.
        limit: The smallest limit that holds for this process, or None.
    """

    cgroups: tuple[OomKills, ...]
    machine: int | None
    limit: Limit | None

    @classmethod
    def read(cls, system: Path = Path("/")) -> OomCounters:
        """Read them now, for the calling process.

        Args:
            system: Where `proc` and `sys` are found; tests give a recorded tree.
        """
        cgroups = memory_cgroups(system)
        counters: list[OomKills] = []
        for cgroup in cgroups:
            if cgroup.kills is not None:
                # The first that counts is the one that our memory is charged to: on v2 a leaf may have no controller.
                own = not counters and not cgroup.folder.guessed
                counters.append(OomKills(cgroup.kills_file, cgroup.kills, own))
        limits = [cgroup.limit for cgroup in cgroups if cgroup.limit is not None]
        return cls(
            tuple(counters),
            parse_counts(read(system / "proc/vmstat")).get("oom_kill"),
            min(limits, key=lambda limit: (limit.nbytes, limit.inherited), default=None),
        )

    @property
    def readable(self) -> bool:
        """Whether the kernel would have told of a kill: if nothing rose then, the OOM killer did nothing."""
        return self.machine is not None or any(counter.own for counter in self.cgroups)

    def killed_since(self, earlier: OomCounters) -> bool:
        """Whether the OOM killer has certainly killed a process with this one's memory cgroup since `earlier`.

        Where that cgroup has no counter, any that rose counts: the kernel tells no more there.
        """
        before = {counter.file: counter.kills for counter in earlier.cgroups}
        own = [counter for counter in self.cgroups if counter.own and counter.file in before]
        if own:
            return any(counter.kills > before[counter.file] for counter in own)
        return self.risen_since(earlier) is not None

    def risen_since(self, earlier: OomCounters) -> str | None:
        """The strongest evidence that the OOM killer was at work since `earlier`; None if nothing rose.

        Returns:
            The end of a sentence. It says so where the counter that rose may be about another process, because that
            of the process's own cgroup was read and stood still; see NOTE [who is counted].
        """
        before = {counter.file: counter.kills for counter in earlier.cgroups}
        known = [counter for counter in self.cgroups if counter.file in before]
        risen = [counter for counter in known if counter.kills > before[counter.file]]
        if risen:
            first = risen[0]
            whose = "its cgroup" if first.own else "a cgroup around it"
            rise = f"({first.file}) rose from {before[first.file]} to {first.kills}{self._limit_at(first)}"
            return f"the OOM-kill counter of {whose} {rise}{'' if first.own else _doubt(known)}"
        if self.machine is not None and earlier.machine is not None and self.machine > earlier.machine:
            rise = f"(/proc/vmstat) rose from {earlier.machine} to {self.machine}"
            return f"the machine's OOM-kill counter {rise}{_doubt(known)}"
        return None

    def _limit_at(self, counter: OomKills) -> str:
        if self.limit is None:
            return ""
        if Path(self.limit.file).parent == Path(counter.file).parent and not self.limit.inherited:
            return f"; the limit there is {gib(self.limit.nbytes)}"
        return f"; the smallest limit on it is {gib(self.limit.nbytes)} ({self.limit.file})"


def _doubt(known: Sequence[OomKills]) -> str:
    """What speaks against a counter further up: the own one, of which the caller knows that it stood still."""
    own = [counter.file for counter in known if counter.own]
    return f", but that of its own cgroup ({own[0]}) did not, so it may have been another process" if own else ""


@dataclass(frozen=True)
class MemoryBudget:
    """How many bytes this process and its children may still take, and what that follows from, for a person."""

    nbytes: int
    reason: str


def available(system: Path = Path("/")) -> MemoryBudget | None:
    """What this process and its children may still take before the kernel kills, or on v2 throttles, one of them.

    The smallest room over all cgroups from its own upwards (limit - (usage - file cache): see NOTE [file cache]),
    and the machine's MemAvailable. A `memory.high` counts like a limit: above it the kernel slows processes down
    until they seem to hang.

    Args:
        system: Where `proc` and `sys` are found; tests give a recorded tree.

    Returns:
        None if neither a limit nor the machine's memory can be read.
    """
    budgets: list[MemoryBudget] = []
    if (found := _tightest(memory_cgroups(system))) is not None:
        room_nbytes, limit, _ = found
        used = f"{gib(limit.nbytes - room_nbytes)} are used, file cache not counted"
        budgets.append(
            MemoryBudget(room_nbytes, f"the cgroup allows {gib(limit.nbytes)}, of which {used} ({limit.file})")
        )
    meminfo = parse_kb(read(system / "proc/meminfo"))
    if "MemAvailable" in meminfo and "MemTotal" in meminfo:
        free, total = meminfo["MemAvailable"], meminfo["MemTotal"]
        budgets.append(MemoryBudget(free, f"the machine has {gib(free)} of {gib(total)} available (/proc/meminfo)"))
    return min(budgets, key=lambda budget: budget.nbytes, default=None)


def _tightest(cgroups: Sequence[CgroupMemory]) -> tuple[int, Limit, CgroupMemory] | None:
    """The cgroup with the least room, in bytes, and its limit; of two equal ones that whose own limit it is."""
    rooms = [
        (cgroup.room_nbytes, cgroup.limit, cgroup)
        for cgroup in cgroups
        if cgroup.limit is not None and cgroup.room_nbytes is not None
    ]
    return min(rooms, key=lambda found: (found[0], found[1].inherited), default=None)


def worker_nbytes(pid: int, system: Path = Path("/")) -> int | None:
    """What one more worker like this one costs: its private memory at its peak, in bytes.

    Its private pages now (`Private_*` in `/proc/PID/smaps`, what psutil calls USS) and how far its resident memory
    was above the present once (VmHWM - VmRSS). Not its resident memory: that counts pages which it shares with the
    nursery that forked it (the interpreter, torch, the user's modules) and with the trainer (the ring), and those are
    there once, however many workers there are. A slot that nobody else has touched yet looks private, so memory files
    are left out by name; `ring_nbytes` of `workers_that_fit` is for those.

    Takes 10 ms for a process that has imported torch: for once in a worker's life.

    Returns:
        None if the process is gone, or may not be looked at.
    """
    # The status first: what the worker allocates between the two then counts twice rather than not at all.
    status = parse_kb(read(system / f"proc/{pid}/status"))
    smaps = read(system / f"proc/{pid}/smaps")
    if "VmHWM" not in status or "VmRSS" not in status or not smaps:
        return None
    return parse_private(smaps) + status["VmHWM"] - status["VmRSS"]


def workers_that_fit(
    budget_nbytes: int, per_worker_nbytes: int, ring_nbytes: int, wanted: int, headroom: float = 0.1
) -> int:
    """How many workers fit into the budget beside the ring: at most `wanted`, at least 1.

    Args:
        budget_nbytes: What all of them may take together; memory that they already have belongs to it.
        per_worker_nbytes: See `worker_nbytes`.
        ring_nbytes: Slots times the largest batch.
        wanted: How many there are to be, 1 or more.
        headroom: The part of the budget that is left free: batches differ in size, and file cache that is in use all
            the time (libraries) counts as free but isn't.
    """
    if per_worker_nbytes <= 0:
        return max(1, wanted)
    fitting = int(budget_nbytes * (1 - headroom) - ring_nbytes) // per_worker_nbytes
    return max(1, min(wanted, fitting))


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What an incident's record says about the resources of this process; None for what can't be told.

    Attributes:
        mem_available_nbytes: The machine's MemAvailable.
        cgroup: The cgroup with the least room on the way up; the process's own if no cgroup has a limit.
        cgroup_usage_nbytes: What all processes in it use.
        cgroup_cache_nbytes: The file cache in that, which the kernel takes back before it kills.
        cgroup_limit_nbytes: Its limit; None if it has none.
        free_descriptors: How many files this process may still open; None also if there is no limit.
    """

    mem_available_nbytes: int | None
    cgroup: str | None
    cgroup_usage_nbytes: int | None
    cgroup_cache_nbytes: int | None
    cgroup_limit_nbytes: int | None
    free_descriptors: int | None

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for `json.dumps`."""
        return asdict(self)


def figures(system: Path = Path("/")) -> Figures:
    """The calling process's figures, now. Reads only what the kernel makes up, so it never waits for storage.

    Args:
        system: Where `proc` and `sys` are found; tests give a recorded tree.
    """
    cgroups = memory_cgroups(system)
    found = _tightest(cgroups)
    shown = found[2] if found is not None else next((c for c in cgroups if c.usage_nbytes is not None), None)
    return Figures(
        mem_available_nbytes=parse_kb(read(system / "proc/meminfo")).get("MemAvailable"),
        cgroup=None if shown is None else str(shown.folder.path),
        cgroup_usage_nbytes=None if shown is None else shown.usage_nbytes,
        cgroup_cache_nbytes=None if shown is None else shown.cache_nbytes,
        cgroup_limit_nbytes=None if shown is None or shown.limit is None else shown.limit.nbytes,
        free_descriptors=_free_descriptors(system),
    )


def _free_descriptors(system: Path) -> int | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        with os.scandir(system / "proc/self/fd") as entries:
            used = sum(1 for _ in entries)
    except OSError:
        return None
    return None if soft == resource.RLIM_INFINITY else max(0, soft - used)


def parse_kb(text: str) -> dict[str, int]:
    """The lines `Name:  123 kB` of `/proc/meminfo`, `/proc/PID/status` and the like, in bytes (their kB are 1024)."""
    lines = (line.split() for line in text.splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if len(line) == 3 and line[2] == "kB"}


def parse_private(smaps: str) -> int:
    """The private pages in `/proc/PID/smaps` but for those of memory files, in bytes."""
    nbytes, counts = 0, True
    for line in smaps.splitlines():
        name, _, value = line.partition(" ")
        if not name.endswith(":"):  # "7f12a000-7f13a000 rw-s 00000000 00:01 1034 /memfd:safeloader (deleted)"
            counts = " /memfd:" not in line
        elif counts and name.startswith("Private_"):
            nbytes += int(value.split()[0]) * 1024
    return nbytes


def gib(nbytes: int) -> str:
    """A size for a message: "4.0 GiB"; "512 MiB" for what is less than one."""
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.0f} MiB"
