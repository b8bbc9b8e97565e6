"""What one worker needs for a batch, measured here, with one thread, as a worker has.

nnU-Net's loader transforms what it has loaded within one call. The transforms of a copy of the loader are timed; the
rest is loading. The copy is also told which cases to take: all in turn, batch after batch, so that it is known which
files are opened for the first time. The second pass has the first one's random numbers: it makes the same batches, so
what it takes less for loading is what the cache saves.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from safeloader.errors import ConfigError
from safeloader.nnunet.bench.measured import Cost, OneWorker
from safeloader.pool.seeding import seed_everything

_SEED: Final = 1


@dataclass
class _Clocks:
    """Seconds so far, on the clock and of this process's CPU time."""

    wall_s: float = 0.0
    cpu_s: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        wall_s, cpu_s = time.monotonic(), time.process_time()
        try:
            yield
        finally:
            self.wall_s += time.monotonic() - wall_s
            self.cpu_s += time.process_time() - cpu_s

    def per(self, batches: int) -> Cost:
        return Cost(wall_s=self.wall_s / batches, cpu_s=self.cpu_s / batches)

    def add(self, whole: _Clocks, less: _Clocks) -> None:
        self.wall_s += whole.wall_s - less.wall_s
        self.cpu_s += whole.cpu_s - less.cpu_s


@dataclass
class _Timed:
    """Stands before the transforms, and times them."""

    transforms: Any
    clocks: _Clocks = field(default_factory=_Clocks)

    def __call__(self, **sample: Any) -> Any:
        with self.clocks.running():
            return self.transforms(**sample)


@dataclass
class _InTurn:
    """Stands for the loader's random choice of cases."""

    cases: Sequence[Any]
    batch_size: int
    at: int = 0

    def __call__(self) -> list[Any]:
        chosen = [self.cases[(self.at + sample) % len(self.cases)] for sample in range(self.batch_size)]
        self.at += self.batch_size
        return chosen


class _Watched:
    """The copy of the loader; each batch is seeded, and split into loading and transforming."""

    def __init__(self, loader: Any) -> None:
        self._timed = _Timed(loader.transforms)
        self._loader = copy.copy(loader)
        self._loader.transforms = self._timed
        self.transforming = _Clocks()
        self.batches = 0

    def take_in_turn(self, cases: Sequence[Any]) -> None:
        self._loader.get_indices = _InTurn(cases, self._loader.batch_size)

    def make(self, seed: int, loading: _Clocks) -> None:
        """One batch; what its loading takes is added."""
        seed_everything(_SEED, 0, seed)
        whole, self._timed.clocks = _Clocks(), _Clocks()
        with whole.running():
            next(self._loader)
        loading.add(whole, self._timed.clocks)
        self.transforming.add(self._timed.clocks, _Clocks())
        self.batches += 1


def measure_one_worker(loader: Any, seconds: float) -> OneWorker:
    """Make batches for about so many seconds, at least two passes over what half of that reads.

    Raises:
        ConfigError: the loader is not made as nnU-Net's.
    """
    if getattr(loader, "transforms", None) is None or not hasattr(loader, "get_indices"):
        raise ConfigError(f"{type(loader).__name__} does not load and transform as nnU-Net's loader (2.5 and later)")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _measure(loader, seconds)
    finally:
        torch.set_num_threads(before)


def _measure(loader: Any, seconds: float) -> OneWorker:
    cases, batch_size = list(loader.indices), int(loader.batch_size)
    watched = _Watched(loader)
    watched.take_in_turn(cases[-1:])
    watched.make(0, _Clocks())  # what a process does once: its case is the only one that is known beforehand
    watched.transforming, watched.batches = _Clocks(), 0
    watched.take_in_turn(cases)
    started, first, later = time.monotonic(), _Clocks(), _Clocks()
    pass_batches = 0
    while pass_batches < math.ceil(len(cases) / batch_size):
        watched.make(pass_batches, first)
        pass_batches += 1
        if time.monotonic() > started + seconds / 2:
            break
    watched.take_in_turn(cases)
    seed = 0
    while seed < pass_batches or time.monotonic() < started + seconds:
        if seed and seed % pass_batches == 0:
            watched.take_in_turn(cases)
        watched.make(seed, later)
        seed += 1
    return OneWorker(
        cases=min(len(cases), pass_batches * batch_size),
        all_cases=len(cases),
        batches=watched.batches,
        loading_first=first.per(pass_batches),
        loading_later=later.per(seed),
        transforming=watched.transforming.per(watched.batches),
    )
