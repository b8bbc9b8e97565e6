"""Kills a worker that is at work, every so many seconds, and notes when, and how much work that threw away."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from typing import Any, Final, NamedTuple

from safeloader import SafeAugmenter

_LOOK_EVERY_S: Final = 0.02
_UNKNOWN: Final = -1
"""The ticket of a worker that does not say which it has."""


class Kill(NamedTuple):
    """One kill.

    Attributes:
        at_s: when, on `time.monotonic`'s clock.
        lost_s: how long its worker had been at its batch, to within 0.02 s; 0 for the stock class, which does not say.
    """

    at_s: float
    lost_s: float


class Killer(threading.Thread):
    """Sends SIGKILL to a worker at work, chosen at random, every `every_s` seconds; or only watches.

    It looks at the workers all the time, also where it kills nobody: so that it costs all contestants the same.

    Args:
        augmenter: whose workers, `SafeAugmenter`'s or the stock class's.
        every_s: the time between two kills, and before the first; 0 kills nobody.
        seed: of the choice.

    Attributes:
        kills: what was done, oldest first.
    """

    def __init__(self, augmenter: Any, *, every_s: float, seed: int) -> None:
        super().__init__(name="killer", daemon=True)
        self.kills: list[Kill] = []
        self._augmenter = augmenter
        self._every_s = every_s
        self._random = random.Random(seed)
        self._ended = threading.Event()
        self._at_work: dict[tuple[int, int], float] = {}  # (pid, ticket): since when

    def run(self) -> None:
        """Until `end`."""
        due_s = time.monotonic() + self._every_s
        while not self._ended.wait(_LOOK_EVERY_S):
            self._look()
            if self._every_s and time.monotonic() >= due_s and self._strike():
                due_s += self._every_s

    def end(self) -> None:
        """Kill nobody from here on."""
        self._ended.set()
        self.join()

    def _look(self) -> None:
        now = time.monotonic()
        self._at_work = {maker: self._at_work.get(maker, now) for maker in makers(self._augmenter)}

    def _strike(self) -> bool:
        if not self._at_work:
            return False
        victim = self._random.choice(sorted(self._at_work))
        now = time.monotonic()
        with contextlib.suppress(ProcessLookupError):  # the stock class has ended it
            os.kill(victim[0], signal.SIGKILL)
            self.kills.append(Kill(now, 0.0 if victim[1] == _UNKNOWN else now - self._at_work[victim]))
        return True


def makers(augmenter: Any) -> list[tuple[int, int]]:
    """Pid and ticket of the workers that make a batch now. Of the stock class, which does not say: of all."""
    if isinstance(augmenter, SafeAugmenter):
        return [
            (worker.pid, worker.ticket)
            for worker in augmenter.workers()
            if worker.pid is not None and worker.ticket is not None and worker.state == "ready"
        ]
    return [(process.pid, _UNKNOWN) for process in list(augmenter._processes) if process.is_alive()]
