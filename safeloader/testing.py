"""Faults to order: for our tests, for the demo, and for users who want to see what their pipeline survives.

with SafeAugmenter(loader, None, 4) as batches:
    killer = Killer(batches, seed=1)
    for _ in range(1000):
        killer.maybe(every=50)      # about every 50th batch, one worker dies
        batch = next(batches)
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Sequence
from typing import Final

from safeloader.augmenter import SafeAugmenter

DEADLY: Final = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS)
"""What the OOM killer, a bug in native code and a truncated memory-mapped file send."""
_LOOK_EVERY_S: Final = 0.005


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 10.0, what: str = "the condition") -> None:
    """Return as soon as the condition holds.

    Raises:
        TimeoutError: it still does not hold after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come true within {timeout_s:g} s")
        time.sleep(_LOOK_EVERY_S)


class Killer:
    """Kills workers of one augmenter, at moments and in ways that follow from a seed.

    Attributes:
        kills: what was done: (pid, signal), oldest first.
    """

    def __init__(
        self, augmenter: SafeAugmenter, *, seed: int, signals: Sequence[signal.Signals] = (signal.SIGKILL,)
    ) -> None:
        self.kills: list[tuple[int, signal.Signals]] = []
        self._augmenter = augmenter
        self._random = random.Random(seed)
        self._signals = tuple(signals)

    def maybe(self, *, every: float) -> bool:
        """Kill with probability 1 / `every`; whether it did."""
        return self._random.random() < 1 / every and self.strike()

    def strike(self) -> bool:
        """Kill one of the workers that run now; False if none does, or it died by itself in this moment."""
        pids = [worker.pid for worker in self._augmenter.workers() if worker.pid is not None]
        if not pids:
            return False
        pid, deadly = self._random.choice(pids), self._random.choice(self._signals)
        try:
            os.kill(pid, deadly)
        except ProcessLookupError:
            return False
        self.kills.append((pid, deadly))
        return True
