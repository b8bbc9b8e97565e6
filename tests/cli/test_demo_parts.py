"""The demo's parts on processes and records of their own; its trainings are in tests/nnunet."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from safeloader.cli.demo.killing import Killer
from safeloader.cli.demo.picture import WINDOW_S, epoch_ends, throughput
from safeloader.cli.demo.processes import CommandFailedError, CommandProcess, tail
from safeloader.cli.demo.recording import Event
from safeloader.nnunet.short import STEPS_FILE, Step, read_steps
from safeloader.testing import wait_until
from tests.processes import lives

# A command with a child and a grandchild, of which one left the process group; all live for ever.
FAMILY = """
import os, subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
subprocess.Popen([sys.executable, "-c", "import os, time; os.setsid(); time.sleep(600)"])
print("ready", flush=True)
time.sleep(600)
"""


def family_of(pid: int) -> list[psutil.Process]:
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


def wait_for_line(log: Path, line: str) -> None:
    wait_until(lambda: log.exists() and line in log.read_text(), timeout_s=20)


class TestCommandProcess:
    def test_leaves_nothing_running_whatever_ends_it(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        family = []

        def interrupted() -> None:
            with CommandProcess([sys.executable, "-c", FAMILY], os.environ, log) as it:
                wait_for_line(log, "ready")
                family.extend(family_of(it.pid))
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert len(family) == 3
        assert not any(process.is_running() for process in family)

    def test_takes_what_a_command_left_behind_that_ended_by_itself(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        script = FAMILY.replace('print("ready", flush=True)\ntime.sleep(600)', "sys.exit(3)")
        with CommandProcess([sys.executable, "-c", script], os.environ, log) as it:
            wait_until(lambda: it.wait(0.1) == 3, timeout_s=20)
            session = [p for p in psutil.process_iter() if p.pid != it.pid and _group(p) == it.pid]
            assert session, "the child that stayed in the group"
        wait_until(lambda: not any(map(lives, session)))

    def test_writes_no_core_files(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        script = "import resource; print(resource.getrlimit(resource.RLIMIT_CORE)); input()"
        with CommandProcess([sys.executable, "-c", script], os.environ, log) as it:
            wait_until(lambda: it.wait(0.1) is not None, timeout_s=20)
        assert log.read_text().startswith("(0, 0)")

    def test_a_failure_names_the_command_and_shows_its_last_lines(self, tmp_path: Path) -> None:
        log = tmp_path / "log"
        with (
            pytest.raises(
                CommandFailedError, match=r"(?s)python.* failed with exit status 1; .*log ends with.*no disk"
            ),
            CommandProcess([sys.executable, "-c", "raise SystemExit('no disk')"], os.environ, log) as it,
        ):
            it.check()


def _group(process: psutil.Process) -> int:
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return -1


@pytest.fixture
def worker() -> Iterator[subprocess.Popen[bytes]]:
    """A process that stands for a worker of this process."""
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield process
    process.kill()
    process.wait()


class TestKiller:
    def test_sends_its_signals_in_turn_and_records_them(self, worker: subprocess.Popen[bytes]) -> None:
        killer = Killer(os.getpid(), (signal.SIGBUS, signal.SIGKILL), every_s=0)
        before = time.monotonic()
        kill = killer.tick([worker.pid])
        assert kill is not None
        assert (kill.signal, kill.pid) == ("SIGBUS", worker.pid)
        assert before <= kill.monotonic_s <= time.monotonic()
        assert worker.wait() == -signal.SIGBUS
        assert killer.kills == [kill]

    def test_kills_nothing_that_is_not_the_trainers(self, worker: subprocess.Popen[bytes]) -> None:
        killer = Killer(worker.pid, (signal.SIGKILL,), every_s=0)
        assert killer.tick([os.getpid(), worker.pid, 2**22 + 1]) is None
        assert worker.poll() is None

    def test_keeps_to_its_interval_and_limit(self, worker: subprocess.Popen[bytes]) -> None:
        assert Killer(os.getpid(), (signal.SIGKILL,), every_s=0, limit=0).tick([worker.pid]) is None
        slow = Killer(os.getpid(), (signal.SIGKILL,), every_s=600)
        assert slow.tick([]) is None
        assert slow.tick([worker.pid]) is not None
        assert slow.tick([worker.pid]) is None
        assert len(slow.kills) == 1


class TestThroughput:
    def test_a_steady_stream_is_a_flat_line_to_both_ends(self) -> None:
        seconds = np.arange(0, 20, 0.25)
        _, rate = throughput(seconds, end_s=20)
        assert np.all(np.abs(rate - 4) <= 2.5 / WINDOW_S)

    def test_a_pause_is_seen(self) -> None:
        seconds = np.concatenate([np.arange(0, 10, 0.25), np.arange(20, 30, 0.25)])
        at, rate = throughput(seconds, end_s=30)
        assert np.all(rate[(at > 12) & (at < 18)] == 0)

    def test_no_batches_no_line(self) -> None:
        at, _ = throughput(np.array([]), end_s=0.0)
        assert at.size == 0


def test_epochs_end_with_their_last_validation_batch() -> None:
    phases = ["train", "train", "val", "val", "train", "val"]
    recorded = [Event("a", float(second), "batch", phase) for second, phase in enumerate(phases)]
    recorded.insert(3, Event("a", 2.5, "kill", "SIGKILL"))
    assert epoch_ends(recorded) == [3.0]


class TestSteps:
    def test_a_line_that_is_still_being_written_is_left_for_later(self, tmp_path: Path) -> None:
        assert read_steps(tmp_path) == []
        (tmp_path / STEPS_FILE).write_text("1.5000,train,0,a b,7 8\n2.0000,val,0,c,\n2.5000,tra")
        assert read_steps(tmp_path) == [
            Step(1.5, "train", 0, ("a", "b"), (7, 8)),
            Step(2.0, "val", 0, ("c",), ()),
        ]
        assert read_steps(tmp_path, start=1) == [Step(2.0, "val", 0, ("c",), ())]


def test_tail_leaves_out_empty_lines(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"a\n\nb  \n\xff\n\n")
    assert tail(tmp_path / "log", 2) == ["b", "\ufffd"]
