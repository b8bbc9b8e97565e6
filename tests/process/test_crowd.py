"""More workers than CPUs: where they compute, the CPUs' worth of them work; where they wait, all do."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from safeloader import SafeAugmenter
from safeloader.pool.stopwatch import Stopwatch
from tests.loaders import RandomLoader, compute, fingerprint

pytestmark = [
    pytest.mark.usefixtures("warm_nursery"),
    pytest.mark.skipif(not Stopwatch().works, reason="this kernel has no /proc/self/schedstat"),
]

WORKERS, NUM_CACHED = 10, 1


class OnOneCpu(RandomLoader):
    """All of its workers share one CPU."""

    def set_thread_id(self, thread_id: int) -> None:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})


class Computes(OnOneCpu):
    def __next__(self) -> dict[str, Any]:
        compute(0.03)
        return super().__next__()


class Waits(OnOneCpu):
    def __next__(self) -> dict[str, Any]:
        time.sleep(0.1)
        return super().__next__()


def pool(loader: OnOneCpu, workers: int = WORKERS) -> SafeAugmenter:
    return SafeAugmenter(loader, None, workers, NUM_CACHED, seed=7, rest_after_s=0.5)


def train(augmenter: SafeAugmenter, seconds: float) -> list[object]:
    """As fast as batches come."""
    until, batches = time.monotonic() + seconds, []
    while time.monotonic() < until:
        batches.append(fingerprint(next(augmenter)))
    return batches


def test_where_they_compute_those_beyond_the_cpus_rest() -> None:
    """Although there is always a batch to make."""
    with pool(Computes()) as augmenter:
        batches = train(augmenter, 3.0)
        resting, incidents = augmenter.report().resting, augmenter.report().incidents
    with pool(Computes(), 1) as alone:
        assert batches == [fingerprint(next(alone)) for _ in batches]
    assert resting >= WORKERS // 2, (
        "on one CPU two are enough; a machine that has other things to do may look like more"
    )
    assert incidents == ()


def test_where_they_wait_all_work() -> None:
    with pool(Waits()) as augmenter:
        train(augmenter, 3.0)
        report, workers = augmenter.report(), augmenter.workers()
    assert report.resting == 0
    assert all(worker.incarnation == 0 and worker.batches > 0 for worker in workers)
