"""The fault table, part six: what a worker last says is part of its incident, and reaches the terminal in order."""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest

from safeloader import SafeAugmenter
from safeloader.testing import wait_until
from tests import loaders, scripts
from tests.loaders import RandomLoader, Saboteur, fingerprint


class Floods(RandomLoader):
    """Writes 8 MiB to stderr with its third batch."""

    def __next__(self) -> dict[str, object]:
        self.made = getattr(self, "made", 0) + 1
        if self.made == 3:
            for number in range(100_000):
                sys.stderr.write(f"line {number:06d} " + 70 * "x" + "\n")
        return super().__next__()


class Prints(RandomLoader):
    """Says what it draws."""

    def __next__(self) -> dict[str, object]:
        self.made = getattr(self, "made", 0) + 1
        print(f"batch {self.made} of worker {self.thread_id}", file=sys.stderr)
        return super().__next__()


class ShowsProgress(RandomLoader):
    """A progress bar, and then a crash."""

    def __next__(self) -> dict[str, object]:
        if not Path(self.marker).exists():
            Path(self.marker).touch()
            for percent in range(0, 70, 10):
                sys.stderr.write(f"\rreading {percent:3d} %|###")
            sys.stderr.flush()
            os.abort()
        return super().__next__()

    def __init__(self, marker: Path) -> None:
        super().__init__()
        self.marker = str(marker)


@pytest.mark.usefixtures("warm_nursery")
def test_what_glibc_says_is_in_the_incident(tmp_path: Path) -> None:
    saboteur = Saboteur(loaders.free_twice, "loading", tmp_path / "struck")
    with SafeAugmenter(saboteur, Saboteur.transform, 2, 2, seed=7) as augmenter:
        for _ in range(20):
            next(augmenter)
        (incident,) = augmenter.report().incidents
    assert incident.signal == "SIGABRT"
    assert incident.stderr_tail is not None
    assert "free(): double free detected in tcache 2" in incident.stderr_tail
    assert incident.stacks is not None and "in free_twice" in incident.stacks


@pytest.mark.usefixtures("warm_nursery")
@pytest.mark.parametrize("stage", ["starting", "loading", "transforming", "encoding"])
def test_the_stacks_of_a_crash_are_in_the_incident(stage: str, tmp_path: Path) -> None:
    saboteur = Saboteur(loaders.read_null, stage, tmp_path / "struck")
    with SafeAugmenter(saboteur, Saboteur.transform, 2, 2, seed=7) as augmenter:
        for _ in range(20):
            next(augmenter)
        wait_until(lambda: augmenter.report().incidents != ())
        (incident,) = augmenter.report().incidents
    assert incident.stacks is not None
    assert incident.stacks.startswith("Fatal Python error: Segmentation fault")
    assert re.search(r'File ".*loaders\.py", line \d+ in read_null', incident.stacks)


@pytest.mark.usefixtures("warm_nursery")
def test_a_progress_bar_is_kept_in_its_last_state(tmp_path: Path) -> None:
    with SafeAugmenter(ShowsProgress(tmp_path / "struck"), None, 1, 2, seed=7) as augmenter:
        next(augmenter)
        (incident,) = augmenter.report().incidents
    assert incident.stderr_tail == "reading  60 %|###"


ON_SCREEN = """
import logging
from pathlib import Path
from safeloader.testing import wait_until
from tests import loaders
from tests.loaders import Saboteur
logging.basicConfig(format="%(message)s")
saboteur = Saboteur(loaders.free_twice, "loading", Path({folder!r}) / "struck")
with SafeAugmenter(saboteur, Saboteur.transform, 1, 2, seed=7) as augmenter:
    for _ in range(10):
        next(augmenter)
"""


def test_last_words_stand_above_the_line_that_is_about_them(tmp_path: Path) -> None:
    ended = scripts.run(tmp_path, ON_SCREEN.format(folder=str(tmp_path)))
    assert ended.code == 0, ended.err
    words, line = ended.err.splitlines()[-2:]
    assert words == "free(): double free detected in tcache 2"
    assert line.startswith("SafeLoader: worker loader-0 (pid ")


FLOODED = """
from tests.faults.test_last_words import Floods, Prints
started = time.monotonic()
with SafeAugmenter({loader}(), None, 1, 2, seed=7) as augmenter:
    print([next(augmenter)["draw"] for _ in range(10)])
    assert augmenter.report().incidents == ()
"""


def test_a_worker_that_floods_stderr(tmp_path: Path) -> None:
    """What the screen takes is in order and in whole lines, and it says where something was left out."""
    ended = scripts.run(tmp_path, FLOODED.format(loader="Floods"))
    assert ended.code == 0, ended.err
    numbers = [int(line.split()[1]) for line in ended.err.splitlines() if re.fullmatch(r"line \d{6} x{70}", line)]
    assert numbers == sorted(numbers)
    assert numbers[-1] == 99_999
    others = {re.sub(r"\d+", "N", line) for line in ended.err.splitlines() if not line.startswith("line ")}
    assert others <= {"[… N bytes of worker output left out]"}


def test_what_workers_print_reaches_the_terminal_in_order(tmp_path: Path) -> None:
    ended = scripts.run(tmp_path, FLOODED.format(loader="Prints"))
    lines = ended.err.splitlines()
    assert lines[:10] == [f"batch {number} of worker 0" for number in range(1, 11)]


# ---- a screen that does not take anything ----

STALLED = """
import json, logging, tempfile
from safeloader.testing import wait_until
logging.basicConfig(format="%(message)s")
reading, writing = os.pipe()
os.dup2(writing, 2)
os.set_blocking(2, False)
try:
    while True:
        os.write(2, b"x" * 4096)
except BlockingIOError:
    os.set_blocking(2, True)
with SafeAugmenter(RandomLoader(), None, 2, 2, seed=7) as augmenter:
    draws = [next(augmenter)["draw"] for _ in range(3)]
    for death in range(4):
        wait_until(lambda: all(worker.state == "ready" for worker in augmenter.workers()))
        os.kill(augmenter.workers()[0].pid, signal.SIGKILL)
        wait_until(lambda: augmenter.report().restarts == death + 1)
        draws += [next(augmenter)["draw"] for _ in range(3)]
    started = time.monotonic()
    print(draws)
print(time.monotonic() - started, flush=True)
held = os.read(reading, 1 << 20)
while held.count(b"SafeLoader: worker") < 4:
    held += os.read(reading, 1 << 20)
print(held.decode().strip("x").count("SafeLoader: worker loader-0 (pid "), flush=True)
"""


def test_a_screen_that_takes_nothing_stops_nobody(tmp_path: Path) -> None:
    """Ctrl-S, or a full pipe: the log waits, and the workers are replaced; then it shows every line."""
    with SafeAugmenter(RandomLoader(), None, 1, 2, seed=7) as augmenter:
        undisturbed = [next(augmenter)["draw"] for _ in range(15)]
    ended = scripts.run(tmp_path, STALLED)
    assert ended.code == 0
    draws, seconds, lines = ended.out.splitlines()
    assert draws == str(undisturbed)
    assert float(seconds) < 5, "close() gives the log a moment only"
    assert lines == "4"


# ---- nothing of ours where it is not wanted ----


@pytest.mark.usefixtures("warm_nursery")
def test_the_trainer_has_no_signal_handler_of_ours(tmp_path: Path) -> None:
    before = {number: signal.getsignal(number) for number in signal.valid_signals()}
    masked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    saboteur = Saboteur(functools.partial(loaders.send_self, int(signal.SIGKILL)), "loading", tmp_path / "struck")
    with SafeAugmenter(saboteur, Saboteur.transform, 2, 2, seed=7, start_method="forked") as augmenter:
        for _ in range(10):
            next(augmenter)
        assert {number: signal.getsignal(number) for number in signal.valid_signals()} == before
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == masked
        assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.usefixtures("warm_nursery")
def test_an_idle_pool_takes_no_time_of_the_trainers() -> None:
    with SafeAugmenter(RandomLoader(), None, 2, 2, seed=7) as augmenter:
        next(augmenter)
        wait_until(lambda: augmenter.report().slots == {"free": 0, "filling": 0, "ready": 6, "leased": 0}, timeout_s=5)
        (supervisor,) = [t for t in threading.enumerate() if t.name == "safeloader-supervisor"]
        assert supervisor.native_id is not None
        before = _cpu_s_and_switches(supervisor.native_id)
        time.sleep(2)
        after = _cpu_s_and_switches(supervisor.native_id)
    assert after[0] - before[0] <= 0.02
    assert after[1] - before[1] <= 3, "wakes"


def _cpu_s_and_switches(thread: int) -> tuple[float, int]:
    (times,) = [t for t in psutil.Process().threads() if t.id == thread]
    status = Path(f"/proc/self/task/{thread}/status").read_text()
    return times.user_time + times.system_time, int(re.findall(r"^voluntary_ctxt_switches:\s+(\d+)", status, re.M)[0])


@pytest.mark.usefixtures("warm_nursery")
@pytest.mark.parametrize("hang", [loaders.sleep_for_ever, loaders.hold_the_interpreter_lock_for_ever])
def test_close_is_quick_while_workers_hang(hang: object) -> None:
    with SafeAugmenter(loaders.Deadly(hang, "loading"), None, 3, 2) as augmenter:
        augmenter._start()
        wait_until(lambda: all(worker.stage == "loading" for worker in augmenter.workers()))
        started = time.monotonic()
        augmenter.close()
        assert time.monotonic() - started < 0.5


def generate(raise_at: int) -> object:
    loader = RandomLoader()
    made = 0
    while True:
        made += 1
        if made == raise_at:
            raise ValueError("once a life")
        yield next(loader)


def test_each_exception_of_a_generator_costs_a_life_and_no_batch() -> None:
    """A generator that has raised is at its end. Its worker leaves, and that is no restart."""
    with SafeAugmenter(generate(0), None, 1, 2, seed=7) as augmenter:
        undisturbed = [fingerprint(next(augmenter)) for _ in range(20)]
    with SafeAugmenter(generate(4), None, 1, 2, seed=7, on_bad_case="retry") as augmenter:
        assert [fingerprint(next(augmenter)) for _ in range(20)] == undisturbed
        report = augmenter.report()
        assert augmenter.workers()[0].incarnation >= 5
    assert report.restarts == 0
    assert set(report.incident_counts) == {"worker-error"}


class RaisesTwiceAtOnce(RandomLoader):
    """Two batches of one worker fail at the same time, as in an outage."""

    def __init__(self, flag: Path) -> None:
        super().__init__()
        self.flag = flag

    def __next__(self) -> dict[str, object]:
        if self.flag.exists():
            raise OSError(5, "Input/output error")
        return super().__next__()


@pytest.mark.usefixtures("warm_nursery")
def test_several_failures_of_one_worker_are_heard_at_once(tmp_path: Path) -> None:
    with SafeAugmenter(RaisesTwiceAtOnce(tmp_path / "down"), None, 1, 3, seed=7) as augmenter:
        next(augmenter)
        wait_until(lambda: augmenter.report().slots["ready"] == 7)  # type: ignore[index]
        assert augmenter._pool is not None
        (tmp_path / "down").touch()
        with augmenter._pool.lock:  # the supervisor hears nothing meanwhile
            for _ in range(4):
                augmenter._pool.consumer.take()
            time.sleep(0.3)
        wait_until(lambda: augmenter.report().incident_counts.get("worker-error", 0) >= 2)
        (tmp_path / "down").unlink()
        for _ in range(10):
            next(augmenter)
