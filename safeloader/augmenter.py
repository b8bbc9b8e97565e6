"""`SafeAugmenter`: the stock class's interface over a pool that survives its workers.

The stock class is https://github.com/MIC-DKFZ/batchgenerators, `NonDetMultiThreadedAugmenter`. One changed import is
enough; what is beyond the stock interface is keyword-only or a method that the stock class does not have.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from numbers import Integral
from types import TracebackType
from typing import Any, Final

import torch
from batchgenerators.dataloading.data_loader import DataLoader
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from torch import distributed

from safeloader.config import Options, resolve
from safeloader.errors import ClosedError, ConfigError, ForkedError, LoaderFinishedError
from safeloader.faults.incident import Incident
from safeloader.pool import blur
from safeloader.pool.book import MAX_INCIDENTS
from safeloader.pool.pool import Pool
from safeloader.pool.seeding import root_seed
from safeloader.pool.supervisor import Supervisor, open_pool
from safeloader.pool.work import Work
from safeloader.report.stats import Report, WorkerInfo

logger = logging.getLogger("safeloader")

_FINISH_S: Final = 10.0
"""Upstream's default for how long `_finish` may take."""
_DISTRIBUTED_HANG_S: Final = 240.0
"""NCCL gives up after 600 s: time for two replacements."""


class SafeAugmenter(NonDetMultiThreadedAugmenter):  # type: ignore[misc]  # upstream has no types
    """A background loader that survives the death of its workers.

    Every batch is delivered exactly once and in order. Batch *t* depends on the root seed, the stream, *t* and the
    loader alone: not on the number of workers, on timing, or on what died.

    Args:
        data_loader: an infinite iterator of batches. Each worker has a copy; `random`, `numpy.random` and torch's
            generator are seeded for each batch on its own.
        transform: called as `transform(**batch)` in the worker, or None.
        num_processes: workers, at least 1.
        num_cached: batches kept ready beyond those in work, at least 1. The ring has
            num_processes + 2 x num_cached slots.
        seeds: None, or one seed per worker; the root seed is derived from them.
        pin_memory: copy tensors into pinned memory, where there is CUDA.
        wait_time: accepted for compatibility; nothing here polls.
        seed: the root seed, instead of `seeds` (also `SAFELOADER_SEED`).
        options: see `safeloader.config.OPTIONS`; each has an environment variable, too.

    Attributes:
        generator: the loader. transform, num_processes, num_cached, pin_memory, seeds, initialized: as upstream.
        seed: the root seed.

    Raises:
        ConfigError: an argument or environment variable that can't work.
    """

    def __init__(
        self,
        data_loader: Any,
        transform: Callable[..., Any] | None,
        num_processes: int,
        num_cached: int = 2,
        seeds: Sequence[int | None] | None = None,
        pin_memory: bool = False,
        wait_time: float = 0.02,
        *,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        # Set before anything can raise: upstream's __del__ is replaced, but a half-made object must still say so.
        self._pool: Pool | None = None
        self.initialized = False
        self.options = resolve({"seed": seed, **options})
        _check(data_loader, num_processes, num_cached, seeds)
        num_processes, num_cached = int(num_processes), int(num_cached)  # NumPy's integers are welcome
        super().__init__(data_loader, transform, num_processes, num_cached, seeds, pin_memory, wait_time)
        self._stock = not sys.platform.startswith("linux")
        if self._stock:
            _say_once_that_stock_runs(sys.platform)
        self.seed = root_seed(seeds) if self.options.seed is None else self.options.seed
        self._pid = os.getpid()
        self._supervisor: Supervisor | None = None
        self._changing = threading.Lock()  # one thread at a time starts or ends the pool
        self._closed = False
        self._first_start: float | None = None
        self._past = _Past()

    # ---- the stock interface ----

    def __next__(self) -> Any:
        """The next batch; starts the workers if they are not running.

        Raises:
            WorkerError: the loader or the transform raised; the remote traceback is the cause.
            LoaderFinishedError: the loader is finite.
            RestartLimitError: workers die again and again without delivering.
            BadCaseError: a case that can't be used, and may not be passed over.
            OutageError: storage has failed for too long.
            StartError: no worker can start with this loader.
            ClosedError: after `close()`.
            ForkedError: in a child that was forked from the process that made this.
        """
        if self._stock:
            return super().__next__()
        pool = self._running()
        batch = pool.consumer.take()
        return _pinned(batch) if self.pin_memory and torch.cuda.is_available() else batch

    def next(self) -> Any:
        """The same as `next(self)`."""
        return self.__next__()

    def _start(self) -> None:
        if self._stock:
            super()._start()
            return
        self._check_process()
        with self._changing:
            if self._closed:
                raise ClosedError(f"this augmenter ({self.options.name}) was closed: make a new one")
            if self.initialized:
                return
            if isinstance(self.generator, DataLoader):
                self.generator.was_initialized = False
            if self._first_start is None:
                self._first_start = time.monotonic()
                if blur.chooses_by_timing(self.generator, self.transform):
                    logger.info("pool %r: %s", self.options.name, blur.NOTICE)
            self._supervisor, self._pool = open_pool(
                Work(self.generator, self.transform),
                _capped(self.options),
                seed=self.seed,
                workers=self.num_processes,
                num_cached=self.num_cached,
                first_ticket=self._past.next_ticket,
                quarantined=self._past.quarantined,
            )
            self._finalizer = weakref.finalize(self, _abandon, self._supervisor, self._pool, self._pid)
            self._finalizer.atexit = False
            self.initialized = True

    def _finish(self, timeout: float = _FINISH_S, force: bool = False) -> None:  # noqa: ARG002 - upstream's signature
        """End the workers; the next `next()` starts new ones and goes on with the stream."""
        if getattr(self, "_stock", False):
            super()._finish()
            return
        if not self.initialized or os.getpid() != self._pid:
            return
        with self._changing:
            supervisor, pool = self._supervisor, self._pool
            if supervisor is None or pool is None:  # another thread was faster
                return
            if not supervisor.close(pool, timeout):
                logger.warning("pool %r did not end within %g s; it is left to the kernel", pool.name, timeout)
            self._finalizer.detach()
            pool.consumer.drop()
            self._past.add(pool)
            self._supervisor = self._pool = None
            self.initialized = False

    def restart(self) -> None:
        """End the workers and start new ones; the stream goes on."""
        if self._stock:
            super().restart()
            return
        with Supervisor.hold():
            self._finish()
            self._start()

    def __del__(self) -> None:
        """Nothing to do: a finalizer ends the pool. Upstream's destructor would do it in the middle of a collection."""
        if getattr(self, "_stock", False):
            super().__del__()

    # ---- beyond it ----

    def close(self) -> None:
        """End the workers for good."""
        self._closed = True
        self._finish()

    def __enter__(self) -> SafeAugmenter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def workers(self) -> tuple[WorkerInfo, ...]:
        """What each worker is doing; empty while none run. Any thread may ask at any time."""
        pool = self._pool
        return () if pool is None or os.getpid() != self._pid else pool.workers()

    def report(self) -> Report:
        """What this loader has done so far. Any thread may ask at any time, also after `close()`."""
        pool = self._pool if os.getpid() == self._pid else None  # in a forked child its lock may be held for ever
        past = self._past.with_pool(pool)
        return Report(
            name=self.options.name,
            batches=past.batches,
            next_ticket=past.next_ticket,
            restarts=past.restarts,
            incidents=tuple(past.incidents),
            incident_counts=dict(past.kinds),
            quarantined=tuple(past.quarantined),
            wait_s=past.wait_s,
            uptime_s=0.0 if self._first_start is None else time.monotonic() - self._first_start,
            seed=self.seed,
            stream=self.options.stream,
            workers=self.num_processes,
            start_method="forked" if past.use_fork else "clean",
            slots=None if pool is None else pool.slots(),
        )

    # ---- inside ----

    def _running(self) -> Pool:
        self._check_process()
        while (pool := self._pool) is None:  # another thread may end it at any time
            self._start()
        return pool

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedError(
                f"this augmenter ({self.options.name}) belongs to process {self._pid}, and this is process "
                f"{os.getpid()}, forked from it: make a new augmenter here."
            )


class _Past:
    """What the pools of one augmenter have done that are gone by now."""

    def __init__(self) -> None:
        self.next_ticket = 0
        self.batches = 0
        self.restarts = 0
        self.wait_s = 0.0
        self.use_fork = False
        self.incidents: deque[Incident] = deque(maxlen=MAX_INCIDENTS)
        self.kinds: Counter[str] = Counter()
        self.quarantined: dict[str, None] = {}

    def add(self, pool: Pool) -> None:
        """Count a pool in."""
        with pool.lock:
            self.next_ticket = pool.consumer.next_ticket
            self.batches += pool.consumer.batches
            self.restarts += pool.machine.restarts
            self.wait_s += pool.consumer.wait_s
            self.use_fork = pool.use_fork
            self.incidents.extend(pool.book.incidents)
            self.kinds.update(pool.book.kinds)
            self.quarantined.update(pool.machine.blame.quarantined)

    def with_pool(self, pool: Pool | None) -> _Past:
        """A copy, with the running pool counted in."""
        both = _Past()
        both.__dict__.update(self.__dict__)
        both.incidents, both.kinds = self.incidents.copy(), self.kinds.copy()
        both.quarantined = self.quarantined.copy()
        if pool is not None:
            both.add(pool)
        return both


def _check(data_loader: Any, num_processes: Any, num_cached: Any, seeds: Sequence[Any] | None) -> None:
    """Refuse what can't work, in one line each."""
    for name, value in (("num_processes", num_processes), ("num_cached", num_cached)):
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            hint = "; for no workers use batchgenerators' SingleThreadedAugmenter" if name == "num_processes" else ""
            raise ConfigError(f"{name}={value!r}: must be an integer of at least 1{hint}")
    if seeds is not None and len(seeds) != num_processes:
        raise ConfigError(f"seeds: {len(seeds)} given for num_processes={num_processes}; give one per worker, or None")
    for seed in seeds if seeds is not None else ():
        if seed is not None and (not isinstance(seed, Integral) or seed < 0):
            raise ConfigError(f"seeds: {seed!r} must be an integer of at least 0, or None")
    if isinstance(data_loader, DataLoader) and not data_loader.infinite:
        raise LoaderFinishedError(
            "data_loader is finite (infinite=False): SafeAugmenter takes infinite loaders only. Make it infinite, or "
            "use SafeMultiThreadedAugmenter."
        )


def _capped(options: Options) -> Options:
    """In distributed training, a worker must be replaced before the other ranks lose patience with this one."""
    if options.hang_timeout_max_s is not None or not (distributed.is_available() and distributed.is_initialized()):
        return options
    return dataclasses.replace(options, hang_timeout_max_s=_DISTRIBUTED_HANG_S)


_said: set[str] = set()


def _say_once_that_stock_runs(platform: str) -> None:
    if platform not in _said:
        _said.add(platform)
        logger.warning(
            "SafeLoader needs Linux, and this is %s: the stock NonDetMultiThreadedAugmenter runs instead, without "
            "protection",
            platform,
        )


def _abandon(supervisor: Supervisor, pool: Pool, pid: int) -> None:
    """The augmenter was collected without `close()`: end its pool, and don't wait for that."""
    if os.getpid() == pid:
        supervisor.mailbox.post(pool.close)


def _pinned(item: Any) -> Any:
    """The batch with every tensor in pinned memory, dicts and lists changed in place as upstream does."""
    match item:
        case torch.Tensor():
            return item.pin_memory()
        case dict():
            item.update({key: _pinned(value) for key, value in item.items()})
        case list():
            item[:] = [_pinned(value) for value in item]
        case tuple() if type(item) is tuple:
            return tuple(_pinned(value) for value in item)
    return item
