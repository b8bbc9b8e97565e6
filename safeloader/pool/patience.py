"""How long a worker may show no progress before it counts as hung. Pure.

Twenty times the 99th percentile of the pool's latest batches, and at least two minutes: a batch may well take a
hundred times longer than the one before it. A start and a worker's first batch get longer: they import, open and
compile.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

_REMEMBERED: Final = 1000
"""Batches that the percentile is taken over."""
_TYPICAL: Final = 50
"""Batches over which `typical_s` is a (fading) mean."""
_FACTOR: Final = 20.0
_LEAST_S: Final = 120.0


@dataclass(frozen=True)
class HangLimits:
    """What the user may set, in seconds.

    Attributes:
        fixed_s: the deadline, or None for the adaptive one; `math.inf` switches the watchdog off.
        first_s: the least for a start and for a worker's first batch.
        most_s: no deadline is longer, whatever else is said.
    """

    fixed_s: float | None = None
    first_s: float = 300.0
    most_s: float = math.inf


class Patience:
    """The deadline of one pool.

    Attributes:
        typical_s: how long a batch takes; 0 before there was one.
    """

    def __init__(self, limits: HangLimits) -> None:
        self._limits = limits
        self._took: deque[float] = deque(maxlen=_REMEMBERED)
        self._percentile_s = 0.0
        self._stale = 0
        self._usual_s, self._first_s = self._allowed()
        self.typical_s = 0.0

    def took(self, seconds: float) -> None:
        """A batch was made in so many seconds."""
        self._took.append(seconds)
        self.typical_s += (seconds - self.typical_s) / min(len(self._took), _TYPICAL)
        self._stale += 1
        if seconds > self._percentile_s or self._stale >= _REMEMBERED // 10:
            self._stale = 0
            self._percentile_s = sorted(self._took)[math.ceil(0.99 * len(self._took)) - 1]
            self._usual_s, self._first_s = self._allowed()

    def allowed_s(self, *, first: bool) -> float:
        """How long a worker may make no progress; `first`: at its start and on its first batch."""
        return self._first_s if first else self._usual_s

    def _allowed(self) -> tuple[float, float]:
        limits = self._limits
        usual_s = max(_LEAST_S, _FACTOR * self._percentile_s) if limits.fixed_s is None else limits.fixed_s
        return min(limits.most_s, usual_s), min(limits.most_s, max(usual_s, limits.first_s))
