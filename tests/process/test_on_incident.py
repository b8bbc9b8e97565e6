"""`on_incident`: the user's own function is told of each failure, and can neither stop nor slow the stream."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import pytest

from safeloader import Incident, SafeAugmenter, SafeMultiThreadedAugmenter
from safeloader.errors import ConfigError
from safeloader.testing import wait_until
from tests.loaders import RandomLoader

pytestmark = pytest.mark.usefixtures("warm_nursery")


def kill_one(augmenter: SafeAugmenter | SafeMultiThreadedAugmenter) -> int:
    pid = next(worker.pid for worker in augmenter.workers() if worker.pid is not None)
    os.kill(pid, signal.SIGKILL)
    return pid


@pytest.mark.parametrize("make", [SafeAugmenter, SafeMultiThreadedAugmenter])
def test_it_is_told_of_each(make: Callable[..., Any]) -> None:
    told: list[Incident] = []
    with make(RandomLoader(), None, 1, 1, on_incident=told.append) as augmenter:
        next(augmenter)
        pid = kill_one(augmenter)
        for _ in range(5):
            next(augmenter)
        wait_until(lambda: len(told) == 1)
        assert (told[0].kind, told[0].pid, told[0].signal) == ("worker-death", pid, "SIGKILL")
        assert told == list(augmenter.report().incidents)


def test_one_that_blocks_holds_up_nothing() -> None:
    told: list[Incident] = []
    go_on = threading.Event()

    def slow(incident: Incident) -> None:
        go_on.wait(30)
        told.append(incident)

    with SafeAugmenter(RandomLoader(), None, 1, 1, seed=1, on_incident=slow) as augmenter:
        next(augmenter)
        kill_one(augmenter)
        for _ in range(20):
            next(augmenter)
        assert augmenter.report().restarts == 1 and told == []
        go_on.set()
        wait_until(lambda: len(told) == 1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_one_that_raises_is_told_of_the_next_all_the_same() -> None:
    told: list[Incident] = []

    def clumsy(incident: Incident) -> None:
        told.append(incident)
        raise ValueError("no such chat room")

    with SafeAugmenter(RandomLoader(), None, 1, 1, on_incident=clumsy) as augmenter:
        for number in (1, 2):
            next(augmenter)
            kill_one(augmenter)
            for _ in range(5):
                next(augmenter)
            wait_until(lambda number=number: len(told) == number)


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^on_incident='mail': a function that takes an Incident$"):
        SafeAugmenter(RandomLoader(), None, 1, 1, on_incident="mail")  # type: ignore[arg-type]
