"""A pool whose ring stays full lets its workers go, and forks them again when they are needed."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import psutil
import pytest

from safeloader import SafeAugmenter
from safeloader.pool.supervisor import Supervisor
from safeloader.testing import wait_until
from tests.loaders import RandomLoader, fingerprint
from tests.processes import children

pytestmark = pytest.mark.usefixtures("warm_nursery")

WORKERS, NUM_CACHED = 3, 2
SLOTS = WORKERS + 2 * NUM_CACHED
REST_S = 0.2


class Slow(RandomLoader):
    """Its workers have something to do all the time."""

    def __next__(self) -> dict[str, Any]:
        time.sleep(0.02)
        return super().__next__()


def elastic(**options: object) -> SafeAugmenter:
    return SafeAugmenter(RandomLoader(), None, WORKERS, NUM_CACHED, seed=7, **{"rest_after_s": REST_S, **options})


def states(augmenter: SafeAugmenter) -> list[str]:
    return [worker.state for worker in augmenter.workers()]


def wait_for_rest(augmenter: SafeAugmenter) -> None:
    wait_until(lambda: states(augmenter) == ["resting"] * WORKERS, what="that all rest")


@pytest.fixture
def resting() -> Iterator[SafeAugmenter]:
    """A pool that has delivered three batches, and then nothing, until all rest."""
    with elastic() as augmenter:
        for _ in range(3):
            next(augmenter)
        wait_for_rest(augmenter)
        yield augmenter


@pytest.fixture(scope="module")
def undisturbed() -> list[object]:
    with SafeAugmenter(RandomLoader(), None, 1, 1, seed=7, rest_after_s=math.inf) as augmenter:
        return [fingerprint(next(augmenter)) for _ in range(60)]


def test_no_process_is_left_and_the_batches_stay(resting: SafeAugmenter) -> None:
    assert children("sl-loader", recursive=True) == [], "they were reaped before they counted as gone"
    report = resting.report()
    assert (report.resting, report.workers, report.restarts, report.incidents) == (WORKERS, WORKERS, 0, ())
    gc.collect()
    assert resting.report().slots == {"free": 0, "filling": 0, "ready": SLOTS, "leased": 0}
    for worker in resting.workers():
        assert (worker.pid, worker.stage, worker.ticket, worker.memory_nbytes) == (None, "idle", None, None)


@pytest.mark.parametrize("method", ["clean", "forked"])
def test_the_stream_is_that_of_a_pool_that_never_rests(undisturbed: list[object], method: str) -> None:
    batches = []
    with elastic(start_method=method) as augmenter:
        for number in range(60):
            if number % 15 == 3:
                wait_for_rest(augmenter)
            batches.append(fingerprint(next(augmenter)))
        report = augmenter.report()
        assert all(worker.incarnation >= 1 for worker in augmenter.workers()[:1]), "it has come and gone"
    assert batches == undisturbed
    assert (report.restarts, report.incident_counts) == (0, {})


def test_what_is_ready_needs_nobody(resting: SafeAugmenter) -> None:
    """The first slot comes back when its batch is let go: so all that lie ready are had at once."""
    batch = next(resting)
    assert states(resting) == ["resting"] * WORKERS, "it is still in use"
    del batch
    wait_until(lambda: resting.workers()[0].state == "ready")
    assert states(resting)[1:] == ["resting"] * (WORKERS - 1), "one slot is one worker's work"


def test_a_pool_that_is_drained_keeps_its_workers() -> None:
    """It is asked for batches as fast as they are made, for several times as long as an idle worker may stay."""
    with SafeAugmenter(Slow(), None, WORKERS, NUM_CACHED, seed=7, rest_after_s=1.0) as augmenter:
        next(augmenter)
        wait_until(lambda: states(augmenter) == ["ready"] * WORKERS)
        pids = [worker.pid for worker in augmenter.workers()]
        for _ in range(500):
            next(augmenter)
        assert [worker.pid for worker in augmenter.workers()] == pids
        assert (augmenter.report().resting, states(augmenter)) == (0, ["ready"] * WORKERS)
        wait_for_rest(augmenter)  # and then it does


def test_a_worker_that_is_killed_while_the_others_rest(resting: SafeAugmenter, undisturbed: list[object]) -> None:
    batches = []
    for _ in range(40):
        for worker in resting.workers():
            if worker.pid is not None and worker.state == "ready" and len(batches) % 4 == 0:
                with contextlib.suppress(ProcessLookupError):  # it has just left
                    os.kill(worker.pid, signal.SIGKILL)
        batches.append(fingerprint(next(resting)))
    assert batches == undisturbed[3:43]
    assert resting.report().restarts > 0


def test_close_while_all_rest(resting: SafeAugmenter) -> None:
    resting.close()
    assert (resting.workers(), children("sl-loader", recursive=True)) == ((), [])
    assert resting.report().batches == 3


def test_close_while_they_leave() -> None:
    """At any moment of it: whoever is asked to leave when the pool ends is ended."""
    for _ in range(5):
        with elastic(rest_after_s=0.05) as augmenter:
            next(augmenter)
            wait_until(lambda held=augmenter: "resting" in states(held) or None in {w.pid for w in held.workers()})
        assert children("sl-loader", recursive=True) == []


def test_restart_while_all_rest(resting: SafeAugmenter, undisturbed: list[object]) -> None:
    resting.restart()
    assert [fingerprint(next(resting)) for _ in range(40)] == undisturbed[3:43]
    assert resting.report().incidents == ()


def test_it_is_said_once_and_quietly(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "safeloader"), elastic() as augmenter:
        for _ in range(2):
            for _ in range(SLOTS):
                next(augmenter)
            wait_for_rest(augmenter)
    (said,) = [record for record in caplog.records if "workers rest" in record.getMessage()]
    assert (said.levelname, said.getMessage()) == (
        "INFO",
        "pool 'loader': 3 of 3 workers rest, since they had nothing to do for 0.2 s (rest_after_s); they are started "
        "again when they are needed",
    )


def test_switched_off(undisturbed: list[object]) -> None:
    """Beside a pool that rests, one that does not: all of its workers stay."""
    with elastic() as augmenter, elastic(rest_after_s=math.inf, name="awake") as awake:
        assert fingerprint(next(awake)) == fingerprint(next(augmenter)) == undisturbed[0]
        wait_for_rest(augmenter)
        assert states(awake) == ["ready"] * WORKERS
        assert len(children("sl-awake", recursive=True)) == WORKERS
        assert Supervisor.current is not None


class Wasteful(RandomLoader):
    """Needs a lot of memory for each batch, in blocks that the C library keeps when they are freed."""

    BLOCKS, BLOCK_NBYTES = 100, 1 << 20

    def __next__(self) -> dict[str, Any]:
        batch = super().__next__()
        blocks = [b"x" * self.BLOCK_NBYTES for _ in range(self.BLOCKS)]
        batch["nbytes"] = sum(map(len, blocks))
        del blocks
        return {**batch, "private": psutil.Process().memory_full_info().uss}


def test_a_worker_that_waits_gives_freed_memory_back() -> None:
    with SafeAugmenter(Wasteful(), None, 1, 1, seed=7, rest_after_s=math.inf) as augmenter:
        at_work = next(augmenter)["private"]
        pid = augmenter.workers()[0].pid
        assert pid is not None
        kept = 0.5 * Wasteful.BLOCKS * Wasteful.BLOCK_NBYTES
        wait_until(lambda: psutil.Process(pid).memory_full_info().uss < at_work - kept, what="that memory comes back")
        assert augmenter.workers()[0].pid == pid, "it is the same worker"
