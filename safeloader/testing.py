"""Faults to order: for our tests, for the demo, and for users who want to see what their pipeline survives.

with SafeAugmenter(loader, None, 4, on_bad_case="retry") as batches:  # chance is nobody's fault
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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from safeloader.runner import PoolRunner

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
    """Kills workers of one augmenter (of either class), at moments and in ways that follow from a seed.

    Attributes:
        kills: what was done: (pid, signal), oldest first.
    """

    def __init__(
        self, augmenter: PoolRunner, *, seed: int, signals: Sequence[signal.Signals] = (signal.SIGKILL,)
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


class Orders:
    """Deeds that a test orders and a worker does, in a stage of its work: for what no signal can cause from outside.

    The loader (or transform) has a copy and calls `obey` where it may be struck. An order is a file in a folder, and
    who can remove it has to obey: so each is obeyed once, whoever dies of it.

    Args:
        folder: where the orders lie; it is made.
        deeds: what can be ordered, by name.
    """

    def __init__(self, folder: str | Path, deeds: Mapping[str, Callable[[], object]]) -> None:
        self.folder = Path(folder)
        self.deeds = dict(deeds)
        self._given = 0
        self.folder.mkdir(parents=True, exist_ok=True)

    def give(self, deed: str, stage: str) -> None:
        """Whoever next calls `obey` with this stage does the deed."""
        if deed not in self.deeds:
            raise KeyError(f"no deed {deed!r}: there are {', '.join(sorted(self.deeds))}")
        self._given += 1
        (self.folder / f"{stage}:{deed}:{self._given}").touch()

    def obey(self, stage: str) -> None:
        """Do what is ordered for this stage and nobody has done, if there is something."""
        for name in os.listdir(self.folder):
            ordered, deed, _ = name.split(":")
            if ordered != stage:
                continue
            try:
                (self.folder / name).unlink()
            except FileNotFoundError:  # another worker was faster
                continue
            self.deeds[deed]()

    def withdraw(self, deed: str = "*") -> None:
        """Take back what nobody has obeyed yet."""
        for order in list(self.folder.glob(f"*:{deed}:*")):
            order.unlink(missing_ok=True)
