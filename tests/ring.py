"""What a ring looks like from outside."""

from __future__ import annotations

from safeloader.pool.machine import RESERVE
from safeloader.runner import PoolRunner


def in_use(augmenter: PoolRunner) -> dict[str, int]:
    """How many slots are filling, ready and leased. How many are free depends on whether a batch held up others."""
    slots = dict(augmenter.report().slots or {})
    slots.pop("free", None)
    return slots


def most(workers: int, num_cached: int) -> int:
    """So many slots there may be at most, the reserve included."""
    return workers + 2 * num_cached + RESERVE * workers
