"""The fault table, part two: ways to make no progress × the stage in which it happens.

Each strikes once. The watchdog takes the worker's stacks, ends it, and its replacement makes the same batches.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from safeloader import SafeAugmenter, note_case
from safeloader.testing import wait_until
from tests import loaders
from tests.loaders import RandomLoader, Saboteur, fingerprint

pytestmark = pytest.mark.usefixtures("warm_nursery")

BATCHES = 20
DEADLINE_S = 0.5
FAST = {"hang_timeout_s": DEADLINE_S, "hang_timeout_first_s": 2.0}


@dataclass(frozen=True)
class Hang:
    """One way to hang: what is done, the function that the stacks must name, the state that the message must."""

    deed: Callable[[], object]
    function: str
    state: str


HANGS = {
    "stopped": Hang(
        functools.partial(loaders.send_self, int(signal.SIGSTOP)), "send_self", r"stopped by a signal \(SIGSTOP\)"
    ),
    "asleep": Hang(loaders.sleep_for_ever, "sleep_for_ever", "sleeping"),
    "an endless loop in Python": Hang(loaders.spin_for_ever, "spin_for_ever", "running"),
    "native code with the interpreter's lock": Hang(
        loaders.hold_the_interpreter_lock_for_ever, "hold_the_interpreter_lock_for_ever", "sleeping"
    ),
    "a native deadlock": Hang(loaders.lock_twice, "lock_twice", "sleeping"),
    "stalled storage": Hang(loaders.read_from_stalled_storage, "read_from_stalled_storage", "sleeping"),
}
STAGES = ("starting", "loading", "transforming", "encoding")


@pytest.fixture(scope="module")
def undisturbed(warm_nursery: None) -> list[object]:
    with SafeAugmenter(RandomLoader(), None, 1, 2, seed=7) as augmenter:
        return [fingerprint(next(augmenter)) for _ in range(BATCHES)]


def _sabotaged(deed: Callable[[], object], stage: str, folder: Path, **options: float) -> SafeAugmenter:
    saboteur = Saboteur(deed, stage, folder / "struck")
    return SafeAugmenter(saboteur, Saboteur.transform, 2, 2, seed=7, **{**FAST, **options})


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", HANGS)
def test_a_hang_costs_no_batch(name: str, stage: str, tmp_path: Path, undisturbed: list[object]) -> None:
    hang = HANGS[name]
    with _sabotaged(hang.deed, stage, tmp_path, hang_timeout_first_s=DEADLINE_S) as augmenter:
        batches = [fingerprint(next(augmenter)) for _ in range(BATCHES)]
        wait_until(lambda: augmenter.report().restarts > 0)
        report = augmenter.report()
    assert batches == undisturbed
    (incident,) = report.incidents
    assert (incident.kind, incident.stage) == ("worker-hang", stage)
    assert (incident.ticket is None) == (stage == "starting")
    assert incident.stacks is not None and f"in {hang.function}" in incident.stacks
    expected = (
        rf"worker loader-{incident.worker} \(pid {incident.pid}\) made no progress for 0\.[5-9] s \(allowed: "
        rf"0\.5 s, it "
        rf"was {hang.state}.*, in \w+ \(\w+\.py:\d+\)\) and was killed while {stage}.*: replaced at once.*"
    )
    assert re.match(expected, incident.message), incident.message


def test_an_uninterruptible_sleep_that_can_be_killed(tmp_path: Path, undisturbed: list[object]) -> None:
    with _sabotaged(loaders.sleep_uninterruptibly, "loading", tmp_path) as augmenter:
        assert [fingerprint(next(augmenter)) for _ in range(BATCHES)] == undisturbed
        (incident,) = augmenter.report().incidents
    assert incident.kind == "worker-hang"
    assert "uninterruptible sleep (state D)" in incident.message


@pytest.fixture
def freezer() -> Iterator[Path]:
    cgroup = Path("/sys/fs/cgroup/freezer") / f"safeloader-test-{os.getpid()}"
    try:
        cgroup.mkdir()
    except OSError as error:
        pytest.skip(f"needs a freezer cgroup (v1) that this user may create: {error}")
    yield cgroup
    (cgroup / "freezer.state").write_text("THAWED")
    wait_until(lambda: not (cgroup / "cgroup.procs").read_text())
    cgroup.rmdir()


def test_a_worker_that_cannot_be_killed_is_abandoned(freezer: Path, tmp_path: Path, undisturbed: list[object]) -> None:
    with _sabotaged(functools.partial(loaders.be_frozen, freezer), "loading", tmp_path) as augmenter:
        assert [fingerprint(next(augmenter)) for _ in range(BATCHES)] == undisturbed
        report = augmenter.report()
        (incident,) = report.incidents
        assert incident.pid is not None
        assert psutil.pid_exists(incident.pid), "the kernel does not end it"
        (freezer / "freezer.state").write_text("THAWED")
        wait_until(lambda: not (freezer / "cgroup.procs").read_text(), what="its end, once the kernel lets it")
    assert (incident.kind, report.restarts) == ("worker-hang", 1)
    assert "can't be killed and is abandoned" in incident.message


def test_an_idle_worker_that_was_stopped(undisturbed: list[object]) -> None:
    with SafeAugmenter(RandomLoader(), None, 2, 2, seed=7, **FAST) as augmenter:
        batches = [fingerprint(next(augmenter)) for _ in range(5)]
        wait_until(lambda: augmenter.report().slots == {"free": 0, "filling": 0, "ready": 6, "leased": 0})
        wait_until(lambda: all(worker.stage == "idle" for worker in augmenter.workers()))
        victim = augmenter.workers()[0]
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGSTOP)
        batches += [fingerprint(next(augmenter)) for _ in range(BATCHES - 5)]
        (incident,) = augmenter.report().incidents
    assert batches == undisturbed
    assert (incident.kind, incident.pid, incident.stage) == ("worker-hang", victim.pid, "idle")
    assert "stopped by a signal (SIGSTOP)" in incident.message


def test_all_workers_stopped_at_once(undisturbed: list[object]) -> None:
    with SafeAugmenter(RandomLoader(), None, 4, 2, seed=7, **FAST) as augmenter:
        batches = [fingerprint(next(augmenter))]
        wait_until(lambda: all(worker.state == "ready" for worker in augmenter.workers()))
        for worker in augmenter.workers():
            assert worker.pid is not None
            os.kill(worker.pid, signal.SIGSTOP)
        batches += [fingerprint(next(augmenter)) for _ in range(BATCHES - 1)]
    assert batches == undisturbed


def test_a_nursery_that_was_stopped_is_replaced(undisturbed: list[object]) -> None:
    with SafeAugmenter(RandomLoader(), None, 2, 2, seed=7, start_method="forked") as augmenter:
        batches = [fingerprint(next(augmenter))]
        wait_until(lambda: all(worker.state == "ready" for worker in augmenter.workers()))
        pids = [worker.pid for worker in augmenter.workers() if worker.pid is not None]
        nursery = psutil.Process(pids[0]).parent()
        assert nursery is not None
        nursery.suspend()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        batches += [fingerprint(next(augmenter)) for _ in range(BATCHES - 1)]
        kinds = augmenter.report().incident_counts
    assert batches == undisturbed
    assert kinds["nursery-death"] == 1


# ---- slow is not hung ----


class Slow(RandomLoader):
    """Its second batch takes its time, and shows progress."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.made = 0

    def __next__(self) -> dict[str, object]:
        self.made += 1
        if self.made == 2:
            until = time.monotonic() + self.seconds
            while time.monotonic() < until:
                note_case("brain_slow")
                time.sleep(0.01)
        return super().__next__()


def test_a_long_wait_is_said_once_and_names_who_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    with SafeAugmenter(Slow(1.0), None, 1, 1, seed=7, slow_warning_s=0.3, **FAST) as augmenter:
        next(augmenter)
        caplog.clear()  # to start may take as long, too
        with caplog.at_level(logging.WARNING, "safeloader"):
            next(augmenter)
        assert augmenter.report().incidents == ()
    (line,) = [record.getMessage() for record in caplog.records]
    assert re.match(
        r"SafeLoader: training has waited 0 s for the batch of ticket 1 of pool 'loader': worker loader-0 \(pid "
        r"\d+\) is "
        r"loading the batch of ticket 1 \(case brain_slow\) for 0\.\d s\. Slow is not hung: ",
        line,
    )
