"""How many workers at work keep the CPUs busy. Pure; part of the machine.

Where workers compute, more of them than CPUs make nothing faster: each takes the memory that a batch needs while it is
made, and takes longer for it, and so does the one with the ticket that the consumer waits for. Where they wait for
storage, it needs many to keep a CPU busy. So what counts is which share of a CPU a worker wants while it works, which
it tells with each batch (see `stopwatch`). If that is all of one, it is one worker more than CPUs: then a CPU has
something to do while a worker asks for its next ticket.

Workers say on which CPUs they may run: together those that any of them has named. Pinned to one each, or to fewer
than the trainer, is all the same. Where they can't measure, nothing is known, and all may work.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

_REMEMBERED: Final = 20
"""Batches over which the share is a (fading) mean: after so many it follows what has changed."""
_SPREADS: Final = 2.0
"""How often the standard deviation: of `n` workers that want a CPU for a share `p` of their time, `n * p` want one at
a time on average, with a variance of `n * p * (1 - p)`; and now and then fewer than there are CPUs."""
_WAITS_FACTOR: Final = 5.0
_WAITS_LEAST_S: Final = 5.0


class Effort(NamedTuple):
    """What a batch took: seconds of CPU time, and seconds it would have lasted with a CPU whenever it wanted one."""

    cpu_s: float
    alone_s: float


class Crowd:
    """What is known of one pool's CPUs and of its work.

    Attributes:
        enough: so many at work keep all CPUs busy; `math.inf` if that is not known.

    Args:
        quota: the CPUs that the cgroup allows, or `math.inf`.
    """

    def __init__(self, quota: float) -> None:
        self._quota = quota
        self._cpus = 0  # as bits
        self._batches = 0
        self._cpu_s = self._alone_s = 0.0
        self.enough = math.inf

    @property
    def cpus(self) -> float:
        """How many there are for the workers; 0 if that is not known."""
        return min(self._quota, self._cpus.bit_count())

    @property
    def share(self) -> float:
        """Which share of a CPU a worker at work wants: more than 0, at most 1."""
        return min(1.0, max(self._cpu_s, 1e-6) / self._alone_s) if self._alone_s > 0 else 1.0

    def has(self, cpus: int) -> None:
        """A worker may run on these CPUs, as bits; 0 if it can't tell what its work takes."""
        self._cpus |= cpus
        self._count()

    def took(self, effort: Effort) -> None:
        """A batch was made."""
        self._batches += 1
        weight = 1 / min(self._batches, _REMEMBERED)
        self._cpu_s += (effort.cpu_s - self._cpu_s) * weight
        self._alone_s += (effort.alone_s - self._alone_s) * weight
        self._count()

    def _count(self) -> None:
        if self._cpus:
            cpus, share = self.cpus, self.share
            self.enough = math.floor((cpus + _SPREADS * math.sqrt(cpus * (1 - share))) / share + 1)


def waits_after_s(typical_s: float) -> float:
    """Who has worked on a ticket for so long waits for something, by all appearances, and keeps no CPU busy."""
    return max(_WAITS_LEAST_S, _WAITS_FACTOR * typical_s)
