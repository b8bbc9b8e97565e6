"""A nursery that a signal from outside has stopped: nobody but the sender is to blame, and nothing waits for long."""

from __future__ import annotations

import time
from collections.abc import Iterator

import psutil
import pytest

from safeloader import SafeAugmenter
from safeloader.pool.supervisor import Supervisor
from safeloader.testing import wait_until
from tests.loaders import RandomLoader, fingerprint
from tests.processes import children


@pytest.fixture
def stopped_nursery() -> Iterator[tuple[SafeAugmenter, psutil.Process]]:
    """Two workers that are ready, and their nursery, stopped."""
    with Supervisor.hold(), SafeAugmenter(RandomLoader(), None, 2, 2, seed=7) as augmenter:
        next(augmenter)
        wait_until(lambda: all(worker.state == "ready" for worker in augmenter.workers()))
        (nursery,) = children("sl-nursery")
        nursery.suspend()
        yield augmenter, nursery


def test_the_end_does_not_wait_for_it(stopped_nursery: tuple[SafeAugmenter, psutil.Process]) -> None:
    augmenter, _ = stopped_nursery
    started = time.monotonic()
    augmenter._finish()
    assert time.monotonic() - started < 3


def test_the_loader_is_not_blamed_for_it(stopped_nursery: tuple[SafeAugmenter, psutil.Process]) -> None:
    """What it was asked for meanwhile, to unpickle a loader, is what it seems to hang in."""
    augmenter, nursery = stopped_nursery
    with SafeAugmenter(RandomLoader(), None, 2, 2, seed=7, name="second") as second:
        batch = fingerprint(next(second))
        report = second.report()
    assert report.start_method == "clean"
    assert report.incidents[0].kind == "nursery-death"
    assert report.incidents[0].message.startswith(
        f"the nursery of pool 'second' (pid {nursery.pid}) was stopped by a signal (SIGSTOP) and was killed: "
    )
    augmenter.restart()
    assert len(batch) == 4
