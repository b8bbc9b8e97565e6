"""A batch that takes long: the workers behind it go on, beyond the usual ring, and nothing changes in the stream."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from safeloader import SafeAugmenter
from safeloader.pool.machine import QUICK_S
from safeloader.testing import wait_until

WORKERS, CACHED = 2, 1
USUAL = WORKERS + 2 * CACHED
BATCHES = 12


class FirstIsSlow:
    """The first batch of worker 0 is made when the gate is there."""

    def __init__(self, gate: Path) -> None:
        self.gate = gate
        self.waits = False

    def set_thread_id(self, thread_id: int) -> None:
        self.waits = thread_id == 0

    def __iter__(self) -> FirstIsSlow:
        return self

    def __next__(self) -> dict[str, Any]:
        if self.waits:
            wait_until(self.gate.exists, timeout_s=60)
            self.waits = False
        time.sleep(2 * QUICK_S)
        return {"data": np.random.rand(1000)}


def stream(augmenter: SafeAugmenter) -> list[bytes]:
    return [next(augmenter)["data"].tobytes() for _ in range(BATCHES)]


def test_the_others_go_on_behind_a_batch_that_takes_long(tmp_path: Path) -> None:
    open_gate, gate = tmp_path, tmp_path / "gate"
    with SafeAugmenter(FirstIsSlow(open_gate), None, WORKERS, CACHED, seed=7) as augmenter:
        expected = stream(augmenter)
    with SafeAugmenter(FirstIsSlow(gate), None, WORKERS, CACHED, seed=7) as augmenter:
        augmenter._start()
        wait_until(lambda: (augmenter.report().slots or {})["ready"] > USUAL, timeout_s=60, what="more than the ring")
        gate.touch()
        assert stream(augmenter) == expected
