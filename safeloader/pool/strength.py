"""How many workers a pool may run, and when it is hopeless. Pure; part of the machine.

Intensity, as in Erlang/OTP: so many deaths in a time window without a batch in between. Beyond it the pool goes down
a ladder, with a fresh count on each rung:

    all workers ──► one worker ──► the other kind of nursery ──► given up

Deaths that take long (hangs) would never come close enough together, so twice as many exceed it in any time.

After an OOM kill, and when one worker fails to start again and again beside others that work, it goes on with one
worker less. After a quiet time, and once batches are made again, it tries one more, and waits longer each time that
this was a mistake.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

from safeloader.pool.events import GiveUp, Resize, SwitchMethod, Why

_MAX_QUIET_FACTOR: Final = 16


@dataclass(frozen=True)
class StrengthLimits:
    """The constants, times in seconds.

    Attributes:
        workers: the most that may run.
        begin_with: how many may run until a `Budget` says how many memory allows.
        max_restarts: deaths allowed in `window_s` without a batch in between.
        grow_back_s: quiet time after which one worker more is tried.
        other_method: whether there is another kind of nursery to try.
        all_or_none: each worker has work that no other can do, so it can't go on with fewer.
    """

    workers: int
    begin_with: int
    max_restarts: int
    window_s: float
    grow_back_s: float
    other_method: bool
    all_or_none: bool = False


class Strength:
    """The pool's strength.

    Attributes:
        allowed: how many workers may run now.
    """

    def __init__(self, limits: StrengthLimits) -> None:
        self._limits = limits
        self._most = limits.begin_with
        self.allowed = limits.begin_with
        self._deaths: deque[float] = deque()  # in the window, since the pool's last batch
        self._all_deaths = 0  # since the pool's last batch
        self._failed_starts = 0  # since anybody got ready or made a batch
        self._other_method = limits.other_method
        self._quiet_factor = 1
        self._grow_at = math.inf
        self._has_grown = False  # since it shrank
        self._works = True  # a batch was made since it shrank

    @property
    def max_failed_starts(self) -> int:
        """Deaths before `Ready`, with nobody getting ready in between: each worker may fail once, and two more."""
        return self.allowed + 2

    @property
    def grow_at(self) -> float:
        """When one worker more is tried; `math.inf` if that is not up to time."""
        return self._grow_at if self._works else math.inf

    def somebody_is_ready(self) -> None:
        """A worker has started."""
        self._failed_starts = 0

    def batch_was_made(self) -> None:
        """What died before it is forgotten."""
        self._works = True
        self._start_afresh()

    def died(self, now: float, *, starting: bool) -> None:
        """A worker has died, and that counts."""
        while self._deaths and self._deaths[0] < now - self._limits.window_s:
            self._deaths.popleft()
        self._deaths.append(now)
        self._all_deaths += 1
        self._failed_starts += starting

    def step_down(self, now: float) -> Resize | SwitchMethod | GiveUp | None:
        """The next rung, if the intensity is exceeded."""
        if self._failed_starts > self.max_failed_starts:
            why, deaths = Why.STARTS, self._failed_starts
        elif len(self._deaths) > self._limits.max_restarts or self._all_deaths > 2 * self._limits.max_restarts:
            why, deaths = Why.DEATHS, self._all_deaths
        else:
            return None
        self._start_afresh()
        if self._may_shrink:
            return self._resize(1, why, now)
        if self._other_method:
            self._other_method = False
            return SwitchMethod()
        return GiveUp(why, deaths)

    def one_less(self, why: Why, now: float, *, fewer: int | None = None) -> Resize | None:
        """Go on with one worker less (or with so many `fewer`), if there is more than one, and it can be done."""
        workers = self.allowed - 1 if fewer is None else max(1, min(fewer, self.allowed - 1))
        return self._resize(workers, why, now) if self._may_shrink else None

    def grow(self, now: float) -> Resize | None:
        """One worker more, if it is time."""
        if now < self.grow_at:
            return None
        before, self.allowed = self.allowed, min(self._most, self.allowed + 1)
        self._grow_at = math.inf if self.allowed == self._most else now + self._quiet_s
        self._has_grown = True
        return Resize(self.allowed, before, Why.QUIET)

    def budget(self, workers: int) -> Resize | None:
        """Memory allows so many."""
        before, self._most = self.allowed, max(1, min(workers, self._limits.workers))
        if self._grow_at == math.inf or self._most <= self.allowed:
            self.allowed, self._grow_at = self._most, math.inf
        return Resize(self.allowed, before, Why.MEMORY) if self.allowed != before else None

    @property
    def _may_shrink(self) -> bool:
        return self.allowed > 1 and not self._limits.all_or_none

    @property
    def _quiet_s(self) -> float:
        return self._limits.grow_back_s * self._quiet_factor

    def _resize(self, workers: int, why: Why, now: float) -> Resize:
        before, self.allowed = self.allowed, workers
        if self._has_grown:
            self._quiet_factor = min(_MAX_QUIET_FACTOR, 2 * self._quiet_factor)
        self._has_grown = self._works = False
        self._grow_at = now + self._quiet_s
        return Resize(workers, before, why)

    def _start_afresh(self) -> None:
        self._deaths.clear()
        self._all_deaths = self._failed_starts = 0
