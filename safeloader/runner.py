"""What both drop-in classes do alike: start a pool, end it, go on after it, and tell what it did."""

from __future__ import annotations

import dataclasses
import logging
import os
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, TypeVar

import torch
from torch import distributed

from safeloader.config import Options, Pin
from safeloader.errors import ClosedError, ConfigError, ForkedError
from safeloader.faults.incident import Incident
from safeloader.pool import blur
from safeloader.pool.book import MAX_INCIDENTS
from safeloader.pool.pool import Pool
from safeloader.pool.supervisor import Supervisor
from safeloader.report.stats import Report, WorkerInfo
from safeloader.ring import pinning
from safeloader.ring.pinning import Pinning

logger = logging.getLogger("safeloader")

FINISH_S: Final = 10.0
"""Upstream's default for how long `_finish` may take."""
_DISTRIBUTED_HANG_S: Final = 240.0
"""NCCL gives up after 600 s: time for two replacements."""

_Self = TypeVar("_Self", bound="PoolRunner")


class PoolRunner:
    """Mixed in before a stock class. Whoever uses it sets `options`, `seed` and `num_processes`, and opens the pool.

    Attributes:
        options: see `config.OPTIONS`. seed: the root seed. num_processes: workers. generator: the loader.
        transform: what follows it, or None. pin_memory: whether tensors are to arrive in pinned memory.
        on_incident: is told of each failure, or None.
    """

    options: Options
    seed: int
    num_processes: int
    pin_memory: bool
    generator: Any
    transform: Callable[..., Any] | None

    def __init__(self, on_incident: Callable[[Incident], None] | None) -> None:
        if on_incident is not None and not callable(on_incident):
            raise ConfigError(f"on_incident={on_incident!r}: a function that takes an Incident")
        self.on_incident = on_incident
        self._pool: Pool | None = None
        self._supervisor: Supervisor | None = None
        self._pid = os.getpid()
        self._changing = threading.Lock()  # one thread at a time starts or ends the pool
        self._closed = False
        self._first_start: float | None = None
        self._past = Past()

    def _open_pool(self) -> tuple[Supervisor, Pool]:
        """Start the class's kind of pool."""
        raise NotImplementedError

    def _start_pool(self) -> None:
        """Start the workers, if they are not running.

        Raises:
            ClosedError: after `close()`.
            ForkedError: in a forked child.
        """
        self._check_process()
        with self._changing:
            if self._closed:
                raise ClosedError(f"this augmenter ({self.options.name}) was closed: make a new one")
            if self._pool is not None:
                return
            if self._first_start is None:
                self._first_start = time.monotonic()
                self._say_what_the_stream_is()
            self._supervisor, self._pool = self._open_pool()
            self._finalizer = weakref.finalize(self, _abandon, self._supervisor, self._pool, self._pid)
            self._finalizer.atexit = False

    def _say_what_the_stream_is(self) -> None:
        logger.info("pool %r: the root seed is %d (stream %d)", self.options.name, self.seed, self.options.stream)
        if blur.chooses_by_timing(self.generator, self.transform):
            logger.info("pool %r: %s", self.options.name, blur.NOTICE)

    def _end_pool(self, timeout_s: float) -> None:
        """End the workers, if they are running."""
        if self._pool is None or os.getpid() != self._pid:
            return
        with self._changing:
            supervisor, pool = self._supervisor, self._pool
            if supervisor is None or pool is None:  # another thread was faster
                return
            if not supervisor.close(pool, timeout_s):
                logger.warning("pool %r did not end within %g s; it is left to the kernel", pool.name, timeout_s)
            self._finalizer.detach()
            pool.consumer.drop()
            slots = self._pinning()
            if slots is not None:
                slots.fence()
            self._past.add(pool)
            self._supervisor = self._pool = None

    def _running(self) -> Pool:
        self._check_process()
        while (pool := self._pool) is None:  # another thread may end it at any time
            self._start()
        return pool

    def _pinning(self) -> Pinning | None:
        """What registers the slots with CUDA, if that was asked for. Nothing of CUDA is touched yet."""
        return pinning.of_process() if self.pin_memory and self.options.pin is Pin.REGISTER else None

    def _delivered(self, batch: Any) -> Any:
        """The batch as the user gets it: in pinned memory, if that was asked for and there is CUDA."""
        return pinned(batch) if self.pin_memory and torch.cuda.is_available() else batch

    def _start(self) -> None:
        raise NotImplementedError

    def _finish(self) -> None:
        raise NotImplementedError

    def _check_process(self) -> None:
        if os.getpid() != self._pid:
            raise ForkedError(
                f"this augmenter ({self.options.name}) belongs to process {self._pid}, and this is process "
                f"{os.getpid()}, forked from it: make a new augmenter here."
            )

    # ---- beyond the stock interface ----

    def close(self) -> None:
        """End the workers for good."""
        self._closed = True
        self._finish()

    def __enter__(self: _Self) -> _Self:
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
            resting=0 if pool is None else pool.machine.resting,
            start_method="forked" if past.use_fork else "clean",
            slots=None if pool is None else pool.slots(),
        )


class Past:
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

    def with_pool(self, pool: Pool | None) -> Past:
        """A copy, with the running pool counted in."""
        both = Past()
        both.__dict__.update(self.__dict__)
        both.incidents, both.kinds = self.incidents.copy(), self.kinds.copy()
        both.quarantined = self.quarantined.copy()
        if pool is not None:
            both.add(pool)
        return both


def capped(options: Options) -> Options:
    """In distributed training, a worker must be replaced before the other ranks lose patience with this one."""
    if options.hang_timeout_max_s is not None or not (distributed.is_available() and distributed.is_initialized()):
        return options
    return dataclasses.replace(options, hang_timeout_max_s=_DISTRIBUTED_HANG_S)


def _abandon(supervisor: Supervisor, pool: Pool, pid: int) -> None:
    """The augmenter was collected without `close()`: end its pool, and don't wait for that."""
    if os.getpid() == pid:
        supervisor.mailbox.post(pool.close)


def pinned(item: Any) -> Any:
    """The batch with every tensor in pinned memory, dicts and lists changed in place as upstream does.

    A tensor that is there already, as those in registered slots are, is left as it is: so says `Tensor.pin_memory`.
    """
    match item:
        case torch.Tensor():
            return item.pin_memory()
        case dict():
            item.update({key: pinned(value) for key, value in item.items()})
        case list():
            item[:] = [pinned(value) for value in item]
        case tuple() if type(item) is tuple:
            return tuple(pinned(value) for value in item)
    return item
