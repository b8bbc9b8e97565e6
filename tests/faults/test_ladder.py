"""The fault table, part four: one worker, then the other kind of nursery, and only then the error."""

from __future__ import annotations

import fcntl
import functools
import os
import re
import time
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from safeloader import SafeAugmenter
from safeloader.errors import RestartLimitError
from safeloader.testing import wait_until
from tests import loaders
from tests.loaders import Deadly, RandomLoader, fingerprint

pytestmark = pytest.mark.usefixtures("warm_nursery")

BATCHES = 20
FAST = {"backoff_first_s": 0.01, "backoff_max_s": 0.05, "on_bad_case": "retry"}


@pytest.fixture(scope="module")
def undisturbed(warm_nursery: None) -> list[object]:
    with SafeAugmenter(RandomLoader(), None, 1, 2, seed=7) as augmenter:
        return [fingerprint(next(augmenter)) for _ in range(BATCHES)]


class DeadlyInACleanProcess(RandomLoader):
    """Crashes wherever it is not in the process that made it, or in a copy of that."""

    here: ClassVar[set[int]] = set()  # not pickled: empty in a process that only imports this module

    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage
        self.here.add(1)

    def set_thread_id(self, thread_id: int) -> None:
        super().set_thread_id(thread_id)
        if self.stage == "starting" and not self.here:
            loaders.read_null()

    def __next__(self) -> dict[str, object]:
        if not self.here:
            loaders.read_null()
        return super().__next__()


class DeadlyInCompany(RandomLoader):
    """Crashes while another worker is there."""

    def __init__(self, lock: Path) -> None:
        super().__init__()
        self.lock = lock

    def __next__(self) -> dict[str, object]:
        if not hasattr(self, "locked"):
            self.locked = self.lock.open("w")
        try:
            fcntl.flock(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.abort()
        time.sleep(0.02)
        return super().__next__()


class DeadlyInTwoWays(RandomLoader):
    """Crashes in one way twice as often as in the other."""

    def __init__(self, counter: Path) -> None:
        super().__init__()
        self.counter = counter

    def __next__(self) -> dict[str, object]:
        with self.counter.open("a") as file:
            file.write("x")
            file.flush()
            count = os.fstat(file.fileno()).st_size
        if count % 3 == 0:
            os._exit(9)
        os.abort()


@pytest.mark.parametrize("stage", ["starting", "loading"])
def test_a_crash_in_a_clean_process_only_is_survived_by_forking_from_the_trainer(
    stage: str, undisturbed: list[object]
) -> None:
    with SafeAugmenter(DeadlyInACleanProcess(stage), None, 2, 2, seed=7, grow_back_s=0.5, **FAST) as augmenter:
        assert [fingerprint(next(augmenter)) for _ in range(BATCHES)] == undisturbed
        messages = [incident.message for incident in augmenter.report().incidents if incident.kind == "degrade"]
        wait_until(lambda: augmenter.report().incident_counts.get("recovery") == 1)
        wait_until(lambda: all(worker.state == "ready" for worker in augmenter.workers()))
        wait_until(lambda: all(worker.pid is not None for worker in augmenter.workers()))
        parents = {psutil.Process(worker.pid).ppid() for worker in augmenter.workers()}
        assert augmenter.report().start_method == "forked"
    assert len(parents) == 1
    assert len(messages) == 2
    assert messages[0].startswith("pool 'loader': 1 worker from here on, instead of 2: ")
    assert messages[1] == (
        "pool 'loader': workers die again and again without making a batch; from here on they are forked from "
        "the trainer."
    )


def test_a_crash_in_company_is_survived_by_one_worker(tmp_path: Path, undisturbed: list[object]) -> None:
    """The others die before their first batch, again and again, while one makes batches."""
    with SafeAugmenter(DeadlyInCompany(tmp_path / "lock"), None, 3, 2, seed=7, **FAST) as augmenter:
        assert [fingerprint(next(augmenter)) for _ in range(BATCHES)] == undisturbed
        report = augmenter.report()
        assert augmenter._pool is not None
        for _ in range(100):
            if augmenter._pool.machine.allowed == 1:
                break
            next(augmenter)
        assert augmenter._pool.machine.allowed == 1
        assert augmenter.report().incident_counts["degrade"] <= 2
    assert {incident.signal for incident in report.incidents if incident.kind == "worker-death"} == {"SIGABRT"}


def test_the_error_lists_all_causes_the_most_frequent_first(tmp_path: Path) -> None:
    started = time.monotonic()
    with (
        SafeAugmenter(DeadlyInTwoWays(tmp_path / "count"), None, 1, 2, max_restarts=4, **FAST) as augmenter,
        pytest.raises(RestartLimitError) as caught,
    ):
        next(augmenter)
    assert time.monotonic() - started < 10
    found = re.match(
        r"pool 'loader' is given up: (\d+) workers died without making a batch, with fewer workers and with each "
        r"way to "
        r"start them that there is: (\d+) x SIGABRT while loading; (\d+) x exit code 9 while loading\. Last: worker",
        str(caught.value),
    )
    assert found, str(caught.value)
    all_of_them, aborted, exited = (int(number) for number in found.groups())
    assert all_of_them == aborted + exited == len(caught.value.incidents) == 10
    assert aborted > exited


@pytest.mark.parametrize("stage", ["starting", "loading"])
def test_what_crashes_always_ends_within_a_stated_time_with_all_defaults(stage: str) -> None:
    """14 deaths at the start; 5 + 2 x 3 + 1 on each of three rungs while loading, each after at most 5 s."""
    started = time.monotonic()
    deadly = Deadly(functools.partial(os._exit, 9), stage)
    with SafeAugmenter(deadly, None, 3, 2) as augmenter, pytest.raises(RestartLimitError, match=r"exit code 9 while"):
        next(augmenter)
    assert time.monotonic() - started < (5 if stage == "starting" else 60)
