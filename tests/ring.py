"""What a ring looks like from outside."""

from __future__ import annotations

from safeloader.runner import PoolRunner


def in_use(augmenter: PoolRunner) -> dict[str, int]:
    """How many slots are filling, ready and leased. How many are free depends on whether a batch held up others."""
    slots = dict(augmenter.report().slots or {})
    slots.pop("free", None)
    return slots
