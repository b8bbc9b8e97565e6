"""Kills (or stops) data-loading workers of a running training from outside, and records each kill."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil

from safeloader.errors import SafeLoaderError

_DEATH_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Kill:
    """One worker, killed or stopped.

    Attributes:
        monotonic_s: When the signal was sent.
        signal: Its name.
        pid: The worker's process id.
    """

    monotonic_s: float
    signal: str
    pid: int


@dataclass
class Killer:
    """Sends its signals in turn to workers chosen at random.

    Attributes:
        trainer_pid: Only descendants of this process are killed.
        signals: Taken in turn.
        every_s: Time between two kills.
        limit: Largest number of kills; None is as many as there is time for.
        kills: What was done.
    """

    trainer_pid: int
    signals: Sequence[signal.Signals]
    every_s: float
    limit: int | None = None
    kills: list[Kill] = field(default_factory=list)
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def tick(self, workers: Sequence[int]) -> Kill | None:
        """Kill one of `workers` (process ids) if it is time; returns the kill."""
        if self.limit is not None and len(self.kills) >= self.limit:
            return None
        if self.kills and time.monotonic() - self.kills[-1].monotonic_s < self.every_s:
            return None
        candidates = [process for pid in workers if (process := self._living_worker(pid)) is not None]
        if not candidates:
            return None
        victim = self._random.choice(candidates)
        number = self.signals[len(self.kills) % len(self.signals)]
        kill = Kill(time.monotonic(), number.name, victim.pid)
        try:
            victim.send_signal(number)
        except psutil.NoSuchProcess:
            return None
        _wait_struck(victim)
        self.kills.append(kill)
        return kill

    def _living_worker(self, pid: int) -> psutil.Process | None:
        """The process, if it lives and descends from the trainer: a process id in a record may be an old one."""
        try:
            process = psutil.Process(pid)
            if process.status() == psutil.STATUS_ZOMBIE:
                return None
            return process if any(parent.pid == self.trainer_pid for parent in process.parents()) else None
        except psutil.NoSuchProcess:
            return None


def _wait_struck(process: psutil.Process) -> None:
    """Wait until the signal has done its work: a zombie is dead, its parent reaps it; SIGSTOP stops."""
    deadline = time.monotonic() + _DEATH_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            if process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_STOPPED):
                return
        except psutil.NoSuchProcess:
            return
        time.sleep(0.005)
    raise SafeLoaderError(f"process {process.pid} still runs {_DEATH_TIMEOUT_S:g} s after it was sent a deadly signal")
