"""Consumers that kill workers and watch what follows: one has a pace and a full ring, one takes all there is."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

from benchmarks.loads import TIMING, Timed, Timing
from safeloader import SafeAugmenter
from safeloader.report.stats import WorkerInfo

CACHED: Final = 6
PACE_S: Final = 0.05
_KILL_EVERY: Final = 10
"""Takes of the paced consumer from one kill to the next."""
_LOOK_EVERY_S: Final = 0.0005
"""Between two looks at `workers()`: without a pause, looking would keep the interpreter's lock from the supervisor."""
_PATIENCE_S: Final = 300.0
_BATCHES_BEFORE: Final = 2
"""Batches that a worker has made in its life before it is killed: for a life without any there would be a back-off."""

_Found = TypeVar("_Found")


class Paced:
    """A consumer that takes a batch every `PACE_S`, slower than the workers make them."""

    def __init__(self, batches: Any, seed: int) -> None:
        self.kills = 0
        self._batches = batches
        self._random = random.Random(seed)

    def take(self, takes: int, *, kill: bool) -> list[float]:
        """How long each `next()` took, in ms."""
        took_ms = []
        due_s = time.monotonic() + PACE_S
        for number in range(takes):
            if isinstance(self._batches, SafeAugmenter) and number % _KILL_EVERY == _KILL_EVERY - 1:
                self._strike(due_s - self._random.random() * PACE_S, kill=kill)
            _sleep_until(due_s)
            begun_s = time.monotonic()
            next(self._batches)
            took_ms.append(1000 * (time.monotonic() - begun_s))
            due_s += PACE_S
        return took_ms

    def _strike(self, at_s: float, *, kill: bool) -> None:
        """Kill a worker if the ring is full; without `kill`, look at them all the same."""
        _sleep_until(at_s)
        slots = self._batches.report().slots
        pids = [worker.pid for worker in self._batches.workers() if worker.pid is not None and worker.state == "ready"]
        full = slots is not None and not slots["free"]
        if kill and full and pids:
            os.kill(self._random.choice(pids), signal.SIGKILL)
            self.kills += 1


def _sleep_until(at_s: float) -> None:
    time.sleep(max(0.0, at_s - time.monotonic()))


class Watch:
    """Takes batches of a pool whose workers time them, and kills workers in between.

    Attributes:
        first_s, later_s: what the worker took for a batch, by ticket: for the first of a replacement, and for those
            that are not the first of their worker.
        ticket: the next one.
    """

    def __init__(self, loader: Any, workers: int, seed: int) -> None:
        self.first_s: dict[int, float] = {}
        self.later_s: dict[int, float] = {}
        self.ticket = 0
        self._augmenter = SafeAugmenter(Timed(loader), None, workers, CACHED, seed=seed)
        self._initial: set[int | None] = set()
        self.take()
        self._until(lambda: len(self._experienced()) == workers or None, self.take)
        self._initial = {worker.pid for worker in self._augmenter.workers()}
        self.first_s.clear()

    def close(self) -> None:
        """End the workers."""
        self._augmenter.close()

    def take(self) -> Timing:
        """The next batch's times."""
        timing = Timing(*next(self._augmenter)[TIMING])
        if timing.number:
            self.later_s[self.ticket] = timing.seconds
        elif timing.pid not in self._initial:
            self.first_s[self.ticket] = timing.seconds
        self.ticket += 1
        return timing

    def replace(self, rng: random.Random) -> tuple[float, float]:
        """Kill a worker at work; returns the milliseconds until the next one is forked, and until it is ready."""
        victim = rng.choice(self._until(self._at_work, self.take))
        killed_s = _kill(victim)
        self._until(lambda: self._successor(victim).pid, _pause)
        forked_s = time.monotonic()
        self._until(lambda: self._successor(victim).state == "ready" or None, _pause)
        return 1000 * (forked_s - killed_s), 1000 * (time.monotonic() - killed_s)

    def lose(self) -> float | None:
        """Kill the worker that makes the next batch; returns how many ms later than it took to make it again it came.

        None if the batch had just left its worker.
        """
        victim = self._until(self._maker, self.take)
        killed_s = _kill(victim)
        timing = self.take()
        late_s = time.monotonic() - killed_s - timing.seconds
        return None if timing.pid == victim.pid else 1000 * late_s

    def _experienced(self) -> list[WorkerInfo]:
        workers = self._augmenter.workers()
        return [worker for worker in workers if worker.state == "ready" and worker.batches >= _BATCHES_BEFORE]

    def _at_work(self) -> list[WorkerInfo] | None:
        return [worker for worker in self._experienced() if worker.ticket is not None] or None

    def _maker(self) -> WorkerInfo | None:
        return next((worker for worker in self._experienced() if worker.ticket == self.ticket), None)

    def _successor(self, victim: WorkerInfo) -> WorkerInfo:
        """The worker's next life; until it begins, one that is down."""
        now = self._augmenter.workers()[victim.worker]
        return now if now.incarnation > victim.incarnation else dataclasses.replace(now, pid=None, state="down")

    def _until(self, find: Callable[[], _Found | None], meanwhile: Callable[[], object]) -> _Found:
        """Look until something is found.

        Raises:
            TimeoutError: nothing was within `_PATIENCE_S`.
        """
        give_up_s = time.monotonic() + _PATIENCE_S
        while (found := find()) is None:
            if time.monotonic() > give_up_s:
                raise TimeoutError(f"not seen within {_PATIENCE_S:g} s: {self._augmenter.workers()}")
            meanwhile()
        return found


def _pause() -> None:
    time.sleep(_LOOK_EVERY_S)


def _kill(victim: WorkerInfo) -> float:
    """Kill it; returns when that was."""
    assert victim.pid is not None, "it is at work"
    killed_s = time.monotonic()
    os.kill(victim.pid, signal.SIGKILL)
    return killed_s
