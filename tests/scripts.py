"""Real trainers: scripts that run in a process of their own, as a user would start them.

Every process that such a trainer leaves behind, however it was re-parented, is found by a mark in its environment.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import psutil

from safeloader.testing import wait_until
from tests.processes import lives

ROOT = Path(__file__).parents[1]
_MARK = "SAFELOADER_TEST_MARK"

HEADER = """\
import os, signal, sys, threading, time
import numpy as np
import torch
from safeloader import SafeAugmenter
from tests.loaders import RandomLoader
"""
"""What every script here begins with."""


@dataclass(frozen=True)
class Ended:
    """How a script ended, and what it left on the screen."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        """The last line of stderr."""
        return self.err.rstrip("\n").rpartition("\n")[2]


class Trainer:
    """A script in a process (and process group) of its own; its temporary folder is empty and its own.

    Attributes:
        pid: of the trainer. temp: its `tempfile.gettempdir()`.
    """

    def __init__(self, folder: Path, source: str, *, environ: Mapping[str, str] | None = None) -> None:
        self._mark = uuid.uuid4().hex
        self._temp = tempfile.TemporaryDirectory(prefix="sl-")  # short: multiprocessing's sockets lie in there
        self.temp = Path(self._temp.name)
        script = folder / f"train-{self._mark}.py"
        script.write_text(HEADER + textwrap.dedent(source))
        self._popen = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(self._mark, self.temp) | dict(environ or {}),
            start_new_session=True,
        )
        self.pid = self._popen.pid

    def __enter__(self) -> Trainer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._kill_all()
        self._popen.communicate(timeout=30)
        self._temp.cleanup()

    def _kill_all(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def until(self, line: str, *, timeout_s: float = 60.0) -> None:
        """Wait until the script has printed this line on stdout."""
        assert self._popen.stdout is not None
        seen = b""
        deadline = time.monotonic() + timeout_s
        while line.encode() not in seen.splitlines():
            ready, _, _ = select.select([self._popen.stdout], [], [], max(0.0, deadline - time.monotonic()))
            said = os.read(self._popen.stdout.fileno(), 4096) if ready else b""
            if not said:
                self._kill_all()
                _, err = self._popen.communicate(timeout=30)
                raise AssertionError(f"{line!r} did not come within {timeout_s:g} s; out {seen!r}, err {err.decode()}")
            seen += said

    def end(self, *, timeout_s: float = 60.0) -> Ended:
        """Wait for the trainer's own end, and for everybody who holds its screen to let go of it."""
        out, err = self._popen.communicate(timeout=timeout_s)
        return Ended(self._popen.returncode, out.decode(), err.decode())

    def kill(self, signal_: signal.Signals = signal.SIGKILL) -> None:
        """Send the trainer alone a signal, and wait for its end."""
        self._popen.send_signal(signal_)
        self._popen.wait(30)

    def kill_group(self) -> None:
        """SIGKILL to its whole process group."""
        os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait(30)

    def processes(self) -> list[psutil.Process]:
        """Everything alive that was started by this script, or by what it started."""
        return list(marked(self._mark))

    def helpers(self, name: str) -> list[psutil.Process]:
        """Those of its processes whose name starts like this: "sl-nursery", or a worker's."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if process.pid != self.pid and process.name().startswith(name):
                    found.append(process)
        return found

    def gone(self) -> bool:
        """Whether nothing of it lives."""
        return not self.processes()

    def traces(self) -> list[str]:
        """What it left in its temporary folder, or in `/dev/shm` under a name or process id of its own."""
        in_shm = [name for name in os.listdir("/dev/shm") if "safeloader" in name or str(self.pid) in name]
        return [*os.listdir(self.temp), *in_shm]


def environment(mark: str, temp: Path) -> dict[str, str]:
    """The environment of a script: marked, with a temporary folder of its own, able to import the tests."""
    return {**os.environ, _MARK: mark, "TMPDIR": str(temp), "PYTHONPATH": str(ROOT)}


def marked(mark: str) -> Iterator[psutil.Process]:
    """Every live process whose environment carries the mark; a process that is being started has it from exec on."""
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if lives(process) and process.environ().get(_MARK) == mark:
                yield process


def run(folder: Path, source: str, *, environ: Mapping[str, str] | None = None, timeout_s: float = 60.0) -> Ended:
    """Run a script to its end and see that nothing of it stays behind."""
    with Trainer(folder, source, environ=environ) as trainer:
        ended = trainer.end(timeout_s=timeout_s)
        wait_until(trainer.gone, timeout_s=2, what="the end of all processes")
        assert trainer.traces() == []
    return ended
