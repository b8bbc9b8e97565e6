"""What a batch asks of a CPU, as the worker that makes it measures it itself.

How much of a CPU it gets says little where many want one: of twelve workers on two cores each gets a sixth, whether it
computes all the time or waits for storage half of it. So the time during which it could have run, but had no CPU, is
left out: the kernel counts it.
"""

from __future__ import annotations

import os
import time
from typing import Final

from safeloader.pool.crowd import Effort

_SCHEDSTAT: Final = "/proc/self/schedstat"
"""Of the process's first thread: ns on a CPU, ns in the queue for one, how often it had one."""


class Stopwatch:
    """Measures one batch after the other, in the process that makes it. CPU time is that of all its threads.

    Attributes:
        works: whether the kernel tells; not all do, nor does gVisor.
    """

    def __init__(self) -> None:
        self._from = (0.0, 0.0, 0.0)
        try:
            _queued_s()
            self.works = True
        except (OSError, ValueError, IndexError):
            self.works = False

    def start(self) -> None:
        """Begin with a batch."""
        if self.works:
            self._from = (time.monotonic(), time.process_time(), _queued_s())

    def stop(self) -> Effort | None:
        """What it took, since `start`; None if the kernel does not tell."""
        if not self.works:
            return None
        began, cpu, queued = self._from
        queued_s, lasted_s = _queued_s() - queued, time.monotonic() - began
        return Effort(time.process_time() - cpu, max(0.0, lasted_s - queued_s))


def _queued_s() -> float:
    with open(_SCHEDSTAT, "rb", buffering=0) as file:
        return int(file.read(100).split()[1]) / 1e9


def cpus_of_this_process() -> int:
    """The CPUs that it may run on, as bits."""
    return sum(1 << cpu for cpu in os.sched_getaffinity(0))
