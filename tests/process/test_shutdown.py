"""However the trainer ends, nothing of it stays; whatever ends beside it, training goes on."""

from __future__ import annotations

import contextlib
import gc
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from safeloader import SafeAugmenter
from safeloader.pool.supervisor import Supervisor
from safeloader.testing import wait_until
from tests import scripts
from tests.interrupts import InterruptError, interrupts
from tests.loaders import RandomLoader, fingerprint
from tests.processes import children, lives

GONE_WITHIN_S = 2.0

IDLE = """
augmenter = SafeAugmenter(RandomLoader(), None, 2, 2, start_method="{method}")
for _ in range(5):
    next(augmenter)
while not all(worker.stage == "idle" for worker in augmenter.workers()):
    time.sleep(0.01)
print("in position", flush=True)
signal.pause()
"""

SPINNING = """
class Spin(RandomLoader):
    # One worker never leaves C (and holds the interpreter's lock), the other never leaves Python.
    def __next__(self):
        if self.thread_id:
            sum(range(10**15))
        while True:
            pass

augmenter = SafeAugmenter(Spin(), None, 2, 2, start_method="{method}")
augmenter._start()
while not all(worker.stage == "loading" for worker in augmenter.workers()):
    time.sleep(0.01)
print("in position", flush=True)
signal.pause()
"""

STARTING = """
augmenter = SafeAugmenter(RandomLoader(), None, 2, 2)
augmenter._start()
me = os.getpid()
while not open(f"/proc/{{me}}/task/{{me}}/children").read() and not any(
    open(f"/proc/{{me}}/task/{{task}}/children").read() for task in os.listdir(f"/proc/{{me}}/task")
):
    pass
print("in position", flush=True)
signal.pause()
"""


@contextlib.contextmanager
def _in_position(folder: Path, source: str, method: str = "clean") -> Iterator[scripts.Trainer]:
    with scripts.Trainer(folder, source.format(method=method)) as trainer:
        trainer.until("in position")
        yield trainer


def _leaves_nothing(trainer: scripts.Trainer) -> None:
    wait_until(trainer.gone, timeout_s=GONE_WITHIN_S, what=f"the end of {trainer.processes()}")
    assert trainer.traces() == []


# ---- the trainer is killed ----


@pytest.mark.parametrize(
    ("what", "method"), [(IDLE, "clean"), (SPINNING, "clean"), (SPINNING, "forked")], ids=["idle", "busy", "forked"]
)
def test_kill_9_of_the_trainer_leaves_no_process(tmp_path: Path, what: str, method: str) -> None:
    with _in_position(tmp_path, what, method) as trainer:
        assert len(trainer.helpers("sl-")) == 3
        trainer.kill()
        _leaves_nothing(trainer)


def test_kill_9_while_the_nursery_starts_leaves_no_process(tmp_path: Path) -> None:
    with _in_position(tmp_path, STARTING) as trainer:
        assert trainer.helpers("sl-nursery") == [], "it has not come so far yet"
        assert len(trainer.processes()) == 2
        trainer.kill()
        _leaves_nothing(trainer)


def test_kill_9_of_the_process_group_leaves_no_process(tmp_path: Path) -> None:
    with _in_position(tmp_path, SPINNING) as trainer:
        trainer.kill_group()
        _leaves_nothing(trainer)


@pytest.mark.parametrize("method", ["clean", "forked"])
def test_a_stopped_nursery_and_spinning_workers_go_with_the_trainer(tmp_path: Path, method: str) -> None:
    with _in_position(tmp_path, SPINNING, method) as trainer:
        (nursery,) = trainer.helpers("sl-nursery")
        nursery.suspend()
        wait_until(lambda: nursery.status() == psutil.STATUS_STOPPED)
        trainer.kill()
        _leaves_nothing(trainer)


def test_stopped_workers_go_with_the_trainer(tmp_path: Path) -> None:
    with _in_position(tmp_path, IDLE) as trainer:
        for worker in trainer.helpers("sl-loader"):
            worker.suspend()
        trainer.kill()
        _leaves_nothing(trainer)


def test_sigterm_of_the_trainer_leaves_no_process(tmp_path: Path) -> None:
    with _in_position(tmp_path, SPINNING) as trainer:
        trainer.kill(signal.SIGTERM)
        _leaves_nothing(trainer)
        ended = trainer.end()
    assert (ended.code, ended.out, ended.err) == (-signal.SIGTERM, "", "")


def test_kill_9_of_a_stock_trainer_leaves_its_workers(tmp_path: Path) -> None:
    source = """
    from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter

    augmenter = NonDetMultiThreadedAugmenter(RandomLoader(), None, 2, 2)
    for _ in range(5):
        next(augmenter)
    print("in position", flush=True)
    signal.pause()
    """
    with _in_position(tmp_path, source) as trainer:
        trainer.kill()
        with pytest.raises(TimeoutError):
            wait_until(trainer.gone, timeout_s=GONE_WITHIN_S)
        assert len(trainer.processes()) == 2, "the two workers, for ever"


# ---- the trainer ends by itself ----


def test_a_script_without_close_ends_promptly_and_says_nothing(tmp_path: Path) -> None:
    source = """
    train, val = SafeAugmenter(RandomLoader(), None, 2, 2), SafeAugmenter(RandomLoader(), None, 1, 2, name="val")
    batches = [next(train), next(val)]
    print(time.monotonic())
    """
    ended = scripts.run(tmp_path, source)
    took_s = time.monotonic() - float(ended.out)
    assert (ended.code, ended.err) == (0, "")
    assert took_s < GONE_WITHIN_S


def test_a_script_that_ends_while_the_nursery_starts_ends_promptly(tmp_path: Path) -> None:
    source = """
    augmenter = SafeAugmenter(RandomLoader(), None, 2, 2)
    augmenter._start()
    print(time.monotonic())
    """
    ended = scripts.run(tmp_path, source)
    took_s = time.monotonic() - float(ended.out)
    assert (ended.code, ended.err) == (0, "")
    assert took_s < GONE_WITHIN_S


def test_a_script_that_ends_in_a_hanging_load_ends_promptly(tmp_path: Path) -> None:
    source = """
    class Stuck:
        def __init__(self):
            self.parent = os.getpid()
        def __setstate__(self, state):
            while True:
                pass

    augmenter = SafeAugmenter(Stuck(), None, 1, 2)
    augmenter._start()
    while not any(open(f"/proc/self/task/{t}/children").read() for t in os.listdir("/proc/self/task")):
        pass
    print(time.monotonic())
    """
    ended = scripts.run(tmp_path, source)
    assert (ended.code, ended.err) == (0, "")
    assert time.monotonic() - float(ended.out) < 5


def test_an_exception_in_the_training_loop_stands_last(tmp_path: Path) -> None:
    source = """
    augmenter = SafeAugmenter(RandomLoader(), None, 2, 2)
    for number, batch in enumerate(augmenter):
        if number == 3:
            raise ValueError("labels out of range")
    """
    ended = scripts.run(tmp_path, source)
    assert ended.code == 1
    assert ended.last_line == "ValueError: labels out of range"
    assert ended.err.count("Traceback") == 1
    assert ended.err.startswith("Traceback")


def test_a_trainer_without_standard_streams(tmp_path: Path) -> None:
    """A daemon's: closed, not redirected."""
    source = f"""
    os.closerange(0, 3)
    augmenter = SafeAugmenter(RandomLoader(), None, 1, 2)
    batches = [next(augmenter)["draw"] for _ in range(5)]
    augmenter.close()
    open({str(tmp_path / "done")!r}, "w").write(repr(batches))
    """
    ended = scripts.run(tmp_path, source)
    assert ended.code == 0
    assert len(eval((tmp_path / "done").read_text())) == 5


# ---- Ctrl-C ----


def _interrupted_in_a_terminal(folder: Path, source: str, when: Callable[[bytes], bool]) -> tuple[int, str]:
    """Run a script in a terminal of its own, press Ctrl-C there, and return (exit code, what is on the screen)."""
    mark = uuid.uuid4().hex
    script = folder / "train.py"
    script.write_text(scripts.HEADER + source)
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(sys.executable, [sys.executable, str(script)], scripts.environment(mark, folder))
    screen, pressed = b"", False
    deadline = time.monotonic() + 60.0
    try:
        while True:
            if not select.select([terminal], [], [], max(0.0, deadline - time.monotonic()))[0]:
                pytest.fail(f"the script has not ended; on its screen: {screen.decode()}")
            try:
                said = os.read(terminal, 4096)
            except OSError:  # nobody holds the terminal any more
                break
            if not said:
                break
            screen += said
            if when(screen) and not pressed:
                os.write(terminal, b"\x03")
                pressed = True
        _, status = os.waitpid(pid, 0)
        wait_until(lambda: not list(scripts.marked(mark)), timeout_s=GONE_WITHIN_S)
    finally:
        os.close(terminal)
        for process in scripts.marked(mark):
            process.kill()
    return os.waitstatus_to_exitcode(status), screen.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("method", ["clean", "forked"])
def test_ctrl_c_prints_one_traceback(tmp_path: Path, method: str) -> None:
    """While next() waits, one worker is busy and the other idle."""
    source = f"""
class Slow(RandomLoader):
    def __next__(self):
        if self.thread_id:
            print("in position", flush=True)
            time.sleep(1000)
        return super().__next__()

for batch in SafeAugmenter(Slow(), None, 2, 2, start_method="{method}"):
    pass
"""
    code, screen = _interrupted_in_a_terminal(tmp_path, source, lambda screen: b"in position" in screen)
    assert code == -signal.SIGINT
    assert screen.count("Traceback") == 1
    assert screen.rstrip().endswith("KeyboardInterrupt")
    assert screen.replace("\n", "").startswith("in position^CTraceback (most recent call last):")


def test_ctrl_c_while_the_nursery_starts_prints_one_traceback(tmp_path: Path) -> None:
    source = """
augmenter = SafeAugmenter(RandomLoader(), None, 2, 2)
augmenter._start()
while not any(open(f"/proc/self/task/{t}/children").read() for t in os.listdir("/proc/self/task")):
    pass
print("in position", flush=True)
next(augmenter)
signal.pause()
"""
    code, screen = _interrupted_in_a_terminal(tmp_path, source, lambda screen: b"in position" in screen)
    assert code == -signal.SIGINT
    assert screen.count("Traceback") == 1
    assert screen.replace("\n", "").startswith("in position^CTraceback (most recent call last):")


def test_an_interrupted_next_can_be_called_again() -> None:
    """As in a notebook: interrupts at random moments lose no later batch and hang nothing."""

    with SafeAugmenter(RandomLoader((1, 1)), None, 1, 2, seed=7) as augmenter:
        next(augmenter)
        got, caught = [], 0
        with interrupts(0.0003) as signals:
            while caught < 100:
                try:
                    signals.armed = True
                    batch = next(augmenter)
                    signals.armed = False
                    got.append(fingerprint(batch))
                except InterruptError:
                    caught += 1
        end = augmenter.report().next_ticket
        assert caught == signals.raised, "each has come through"
        got.append(fingerprint(next(augmenter)))
        del batch
        wait_until(lambda: augmenter.report().slots["leased"] <= 1, what="the release of all slots but one")
    with SafeAugmenter(RandomLoader((1, 1)), None, 1, 2, seed=7) as undisturbed:
        expected = [fingerprint(next(undisturbed)) for _ in range(end + 1)]
    assert got[-1] == expected[-1], "the stream stands where the report says"
    assert [batch for batch in expected if batch in got] == got, "in order, none twice"


# ---- the nursery is killed ----


@pytest.fixture(scope="module")
def undisturbed() -> list[object]:
    with SafeAugmenter(RandomLoader(), None, 1, 2, seed=7) as augmenter:
        return [fingerprint(next(augmenter)) for _ in range(100)]


def _nurseries() -> list[psutil.Process]:
    """The trainer's direct children: nothing else is started by these tests."""
    return [child for child in children() if lives(child)]


def _kill_nursery() -> int:
    (nursery,) = _nurseries()
    nursery.kill()
    return nursery.pid


@pytest.mark.parametrize("method", ["clean", "forked"])
def test_training_goes_on_with_a_new_nursery(undisturbed: list[object], method: str) -> None:
    with SafeAugmenter(RandomLoader(), None, 3, 2, seed=7, start_method=method) as augmenter:
        batches = [fingerprint(next(augmenter)) for _ in range(30)]
        pid = _kill_nursery()
        wait_until(lambda: "nursery-death" in augmenter.report().incident_counts)
        batches += [fingerprint(next(augmenter)) for _ in range(70)]
        wait_until(lambda: augmenter.report().restarts == 3)
        report = augmenter.report()
    assert batches == undisturbed
    assert report.restarts == 3
    assert report.incident_counts == {"nursery-death": 1, "worker-death": 3}
    nursery_death, *workers = report.incidents
    assert re.fullmatch(
        rf"the nursery of pool 'loader' \(pid {pid}\) was killed by SIGKILL: another one is started, and its workers "
        r"with it\. SIGKILL: .*dmesg.*",
        nursery_death.message,
    )
    for incident in workers:
        assert f"went down with its nursery (pid {pid}), which was killed by SIGKILL" in incident.message
        assert incident.signal is None, "nobody saw what killed the worker"


@pytest.mark.parametrize("method", ["clean", "forked"])
def test_a_nursery_that_dies_while_all_workers_rest(undisturbed: list[object], method: str) -> None:
    """No worker goes down with it, so there is nothing to mourn; another one is started when it is needed."""
    with SafeAugmenter(RandomLoader(), None, 3, 2, seed=7, start_method=method, rest_after_s=0.2) as augmenter:
        batches = [fingerprint(next(augmenter)) for _ in range(3)]
        wait_until(lambda: augmenter.report().resting == 3)
        pid = _kill_nursery()
        wait_until(lambda: not psutil.pid_exists(pid), what="that the supervisor has reaped it")
        assert augmenter.report().resting == 3
        batches += [fingerprint(next(augmenter)) for _ in range(97)]
        assert _nurseries()[0].pid != pid
        report = augmenter.report()
    assert batches == undisturbed
    assert (report.restarts, report.incidents) == (0, ())


@pytest.mark.parametrize("workers", [1, 3, 6])
def test_nurseries_killed_in_a_row_while_they_start(undisturbed: list[object], workers: int) -> None:
    """A nursery's death is one death, however many workers go down with it."""
    with SafeAugmenter(RandomLoader(), None, workers, 2, seed=7) as augmenter:
        augmenter._start()
        killed: set[int] = set()
        while len(killed) < 3:
            # The moments differ: at once, and wherever the imports are by then.
            wait_until(lambda: any(nursery.pid not in killed for nursery in _nurseries()))
            killed.add(_kill_nursery())
        assert [fingerprint(next(augmenter)) for _ in range(100)] == undisturbed
        assert augmenter.report().incident_counts["nursery-death"] == 3


def test_nurseries_killed_in_the_middle_of_things(undisturbed: list[object]) -> None:
    """Whatever it does then; the pool delivers in between, so it is never given up."""
    with SafeAugmenter(RandomLoader(), None, 2, 2, seed=7, start_method="forked", max_restarts=2) as augmenter:
        batches = []
        for number in range(100):
            if number % 10 == 5:
                with contextlib.suppress(ValueError, psutil.Error):  # just now there is none
                    _kill_nursery()
            batches.append(fingerprint(next(augmenter)))
    assert batches == undisturbed


def test_a_nursery_and_its_workers_killed_at_once(undisturbed: list[object]) -> None:
    with SafeAugmenter(RandomLoader(), None, 2, 2, seed=7, start_method="forked") as augmenter:
        batches = [fingerprint(next(augmenter)) for _ in range(50)]
        for process in psutil.Process().children(recursive=True):
            process.kill()
        wait_until(lambda: "nursery-death" in augmenter.report().incident_counts)
        batches += [fingerprint(next(augmenter)) for _ in range(50)]
    assert batches == undisturbed


def test_the_death_of_one_pools_nursery_does_not_stall_another_pool() -> None:
    """A nursery forked while the other one's workers are requested must not hold their sockets open."""
    with (
        SafeAugmenter(RandomLoader(), None, 2, 2, name="clean", start_method="clean") as clean,
        SafeAugmenter(RandomLoader(), None, 2, 2, name="forked", start_method="forked") as forked,
    ):
        clean._start()  # its nursery imports torch for seconds; the requests wait
        next(forked)
        next(clean)
        (spawned,) = [child for child in _nurseries() if "-c" in child.cmdline()]
        spawned.kill()
        wait_until(lambda: clean.report().incident_counts.get("worker-death") == 2, timeout_s=1.5)
        next(clean)
        next(forked)


# ---- augmenters come and go ----


def test_a_collected_augmenter_leaves_nothing() -> None:
    augmenter = SafeAugmenter(RandomLoader(), None, 2, 2, start_method="forked")
    next(augmenter)
    del augmenter
    gc.collect()
    wait_until(lambda: not psutil.Process().children(recursive=True), timeout_s=5)


def test_train_and_validation_share_one_nursery() -> None:
    train = SafeAugmenter(RandomLoader(), None, 2, 2, name="train", seed=1)
    val = SafeAugmenter(RandomLoader(), None, 1, 2, name="val", seed=1)
    with train, val:
        assert fingerprint(next(train)) == fingerprint(next(val)), "the same seed and stream"
        (nursery,) = _nurseries()
        assert len(nursery.children()) == 3
        train.close()
        wait_until(lambda: len(nursery.children()) == 1)
        next(val)
        assert [child.pid for child in _nurseries()] == [nursery.pid]
    assert _nurseries() == []


def test_close_and_finish_do_nothing_twice() -> None:
    augmenter = SafeAugmenter(RandomLoader(), None, 1, 2, start_method="forked")
    augmenter.close()
    augmenter._finish()
    augmenter.close()
    assert subprocess.run(["true"], check=False).returncode == 0


def test_a_nursery_that_starts_when_its_pool_ends_is_kept_for_the_next(capfd: pytest.CaptureFixture[str]) -> None:
    """As after Ctrl-C in the first seconds of a command that holds the supervisor: it does not count as hanging."""
    with Supervisor.hold():
        first = SafeAugmenter(RandomLoader(), None, 1, 1)
        first._start()
        wait_until(lambda: bool(psutil.Process().children()), what="the nursery")
        (nursery,) = psutil.Process().children()
        first.close()
        wait_until(lambda: nursery.name() == "sl-nursery", timeout_s=60, what="the nursery's readiness")
        with SafeAugmenter(RandomLoader(), None, 1, 1) as second:
            next(second)
            assert psutil.Process().children() == [nursery]
    assert "most recent call first" not in capfd.readouterr().err
