"""What is known about memory: how many workers fit, who grows without end, and who the OOM killer has killed.

Memory that is plentiful is not measured: with `CAREFREE_NBYTES` for each worker all start at once. Else one starts,
makes a batch and is measured, and then as many start as fit.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from safeloader.faults import memory
from safeloader.faults.cgroups import read
from safeloader.pool.life import Life

CAREFREE_NBYTES: Final = 4 << 30
"""More than a worker of nnU-Net takes with any usual patch."""
_LOOK_EVERY_S: Final = 10.0
_BASELINE_BATCHES: Final = 8
"""Batches after which a worker's memory is expected not to grow any more."""
_SAMPLE_EVERY_S: Final = 1.0
_RECENTLY_S: Final = 2.0
"""A kill that was counted at most so long ago may be about the worker that has just ended."""
_LONG_AGO_S: Final = 10.0
"""A count older than this is mentioned: whoever was killed since may have been killed a long time ago."""


@dataclass
class _Rise:
    """Kills that one look at the counters showed, and that no death was put down to yet."""

    seen: float
    before: memory.OomCounters
    after: memory.OomCounters
    unclaimed: int
    gap_s: float  # since the look before


class OomWatch:
    """The kernel's counts of OOM kills, for all pools of the process: each kill explains one death."""

    def __init__(self) -> None:
        self._latest = memory.OomCounters.read()
        self._looked_at = time.monotonic()
        self._rises: deque[_Rise] = deque()

    def sample(self) -> None:
        """Look at the counters, once a second at most, so that a rise can be dated."""
        if time.monotonic() - self._looked_at >= _SAMPLE_EVERY_S:
            self._look()

    def claim(self) -> tuple[str | None, bool]:
        """A process of ours was just killed: what shows that the OOM killer did it, or None.

        Returns:
            Also whether the kernel would have told.
        """
        self._look()
        while self._rises and (self._rises[0].unclaimed == 0 or self._looked_at - self._rises[0].seen > _RECENTLY_S):
            self._rises.popleft()
        if not self._rises:
            return None, self._latest.readable
        rise = self._rises[0]
        rise.unclaimed -= 1
        evidence = rise.after.risen_since(rise.before)
        if evidence is not None and rise.gap_s > _LONG_AGO_S:
            evidence += f"; it was read {rise.gap_s:.0f} s before that"
        return evidence, self._latest.readable

    def _look(self) -> None:
        before, gap_s = self._latest, time.monotonic() - self._looked_at
        self._latest = memory.OomCounters.read()
        self._looked_at = time.monotonic()
        kills = _kills(before, self._latest)
        if kills:
            self._rises.append(_Rise(self._looked_at, before, self._latest, kills, gap_s))


def _kills(before: memory.OomCounters, after: memory.OomCounters) -> int:
    """How many kills lie between two counts, as far as they may have been of our processes."""
    if not after.killed_since(before):
        return 0
    counted = {counter.file: counter.kills for counter in before.cgroups}
    known = [counter for counter in after.cgroups if counter.file in counted]
    counters = [counter for counter in known if counter.own] or known
    rises = [counter.kills - counted[counter.file] for counter in counters]
    if not any(rise > 0 for rise in rises) and after.machine is not None and before.machine is not None:
        rises.append(after.machine - before.machine)
    return max(0, *rises)


@dataclass(frozen=True)
class Ring:
    """A pool's slots: what they take now, and what they will with all of them as large as the largest.

    Attributes:
        slot_nbytes: the largest one. full_nbytes: all, without the reserve.
    """

    now_nbytes: int
    slot_nbytes: int
    full_nbytes: int


class Fit(NamedTuple):
    """How many workers fit beside the ring, how many slots of the reserve beside all of them, and why."""

    workers: int
    reserve: int
    reason: str


def fit(pid: int, ring: Ring, wanted: int, reserve: int) -> Fit | None:
    """How many workers like this one fit, and slots of the reserve; None if that can't be told: it is gone, perhaps.

    It may block: `smaps` takes the lock of the process's address space, which one that waits for storage may hold.
    """
    each_nbytes, own_nbytes = memory.worker_nbytes(pid), memory.parse_private(read(Path(f"/proc/{pid}/smaps")))
    budget = memory.available()
    if budget is None or each_nbytes is None or own_nbytes == 0:
        return None
    left_nbytes = budget.nbytes + own_nbytes + ring.now_nbytes  # what is taken already belongs to it
    workers = memory.workers_that_fit(left_nbytes, each_nbytes, ring.full_nbytes, wanted)
    # Half of what is left: other loaders ask for it at the same time, those of validation first of all.
    spare_nbytes = (left_nbytes - workers * each_nbytes - ring.full_nbytes) // 2
    spare = max(0, min(reserve, spare_nbytes // max(1, ring.slot_nbytes)))
    sizes = f"a worker takes {each_nbytes / 2**30:.2f} GiB and the ring {ring.full_nbytes / 2**30:.2f} GiB"
    return Fit(workers, spare, f"{sizes}, and {budget.reason}")


class MemoryWatch:
    """One pool's."""

    def __init__(self, workers: int, growth_nbytes: int) -> None:
        self._workers = workers
        self.growth_nbytes = growth_nbytes
        self._look_at = 0.0

    def begin_with(self) -> int | None:
        """How many workers to start before one was measured; None is all."""
        budget = memory.available()
        plenty = budget is None or budget.nbytes >= self._workers * CAREFREE_NBYTES
        return None if plenty or self._workers == 1 else 1

    def grown(self, lives: Iterable[Life]) -> Life | None:
        """A worker that has grown too much since its first batches; looks every few seconds only."""
        now = time.monotonic()
        if now < self._look_at:
            return None
        self._look_at = now + _LOOK_EVERY_S
        worst: Life | None = None
        for life in lives:
            nbytes = None if life.pid is None else _own_nbytes(life.pid)
            if nbytes is None:
                continue
            life.memory_nbytes = nbytes
            if life.baseline_nbytes is None and life.page.read().batches >= _BASELINE_BATCHES:
                life.baseline_nbytes = nbytes
            if growth_nbytes(life) > max(self.growth_nbytes, 0 if worst is None else growth_nbytes(worst)):
                worst = life
        return worst


def growth_nbytes(life: Life) -> int:
    """By how much the worker has grown since its first batches."""
    if life.memory_nbytes is None or life.baseline_nbytes is None:
        return 0
    return life.memory_nbytes - life.baseline_nbytes


def _own_nbytes(pid: int) -> int | None:
    """Its resident memory but for files and slots, which it sees more of the longer it lives; None if it is gone.

    `statm` takes no lock, so it never waits for a process that waits for storage.
    """
    fields = read(Path(f"/proc/{pid}/statm")).split()
    if len(fields) < 3 or fields[1] == "0":
        return None
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGE_SIZE")
