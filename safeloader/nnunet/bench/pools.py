"""What all workers make together: the stock class and SafeLoader in turn, with the same loader.

The batches are taken and dropped. Both classes get a loader whose blur does not time FFT against direct convolution:
SafeLoader never does, and in the stock class each worker does for its first blurs, which would be most of what a short
measurement sees.

The stock class can be silent for ever, for example in a container with a small `/dev/shm`: so it is waited for only so
long. Its workers are tied to this process, since they outlive theirs otherwise.
"""

from __future__ import annotations

import copy
import functools
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from queue import Empty
from typing import Any, Final

import psutil
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter

from safeloader.augmenter import SafeAugmenter
from safeloader.errors import ConfigError, SafeLoaderError
from safeloader.faults.cpus import available_cpus
from safeloader.nnunet.bench.measured import Pools, Shares
from safeloader.nnunet.loaders import WorkerCount
from safeloader.pool.process import die_with, leave_interrupts_to_trainer
from safeloader.pool.supervisor import Supervisor
from safeloader.report.stats import WorkerInfo

_TURNS: Final = 2
_WARM_UP: Final = 2
"""Batches per worker before the clock starts, in each turn."""
_PATIENCE_S: Final = 120.0
"""How long the stock class may be without a batch."""
_LOOK_EVERY_S: Final = 0.05

Take = Callable[[], Any]


class _StockFailedError(Exception):
    """The stock class gives no batches; the message says why."""


@dataclass
class _Tally:
    batches: int = 0
    seconds: float = 0.0

    def run(self, take: Take, warm_up: int, seconds: float) -> None:
        """Take batches, from one delivery to another that is at least so many seconds later."""
        for _ in range(warm_up):
            take()
        started = time.monotonic()
        while (elapsed := time.monotonic() - started) < seconds:
            take()
            self.batches += 1
        self.seconds += elapsed

    @property
    def per_s(self) -> float:
        return self.batches / self.seconds


@dataclass
class _Looker:
    """Looks every 50 ms at what SafeLoader's workers are doing."""

    augmenter: SafeAugmenter
    seen: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def looking(self) -> Iterator[None]:
        done = threading.Event()
        thread = threading.Thread(target=self._look_until, args=(done,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _look_until(self, done: threading.Event) -> None:
        while not done.wait(_LOOK_EVERY_S):
            self.seen.update(doing(worker) for worker in self.augmenter.workers() if worker.pid is not None)


def doing(worker: WorkerInfo) -> str:
    """Which of the `Shares` a worker's time goes into at this moment."""
    if worker.stage not in ("loading", "transforming"):
        return "handing_over"
    asleep = worker.stage == "loading" and worker.pid is not None and _is_asleep(worker.pid)
    return "storage" if asleep else "computing"


def _is_asleep(pid: int) -> bool:
    """Whether it neither runs nor waits for a CPU; False for one that was replaced in this moment."""
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_SLEEPING, psutil.STATUS_DISK_SLEEP)
    except psutil.NoSuchProcess:
        return False


def shares_of(seen: Counter[str]) -> Shares:
    """Of all looks; all computing if there was none."""
    total = sum(seen.values())
    if not total:
        return Shares(computing=1.0, storage=0.0, handing_over=0.0)
    return Shares(**{name: seen[name] / total for name in ("computing", "storage", "handing_over")})


@dataclass(frozen=True)
class Counted:
    """How many workers there are to be, how many were asked for, and how many CPUs there are."""

    workers: int
    asked: int
    cpus: int


def count_workers(wanted: int | None) -> Counted:
    """As many as are wanted; if nobody says, nnU-Net's number, lowered to the CPUs, as our trainer does.

    Raises:
        ConfigError: nnU-Net would use none.
    """
    cpus = available_cpus()
    if wanted is not None:
        return Counted(wanted, wanted, cpus.cpus)
    from nnunetv2.utilities.default_n_proc_DA import get_allowed_n_proc_DA

    try:
        asked = int(get_allowed_n_proc_DA())
    except ValueError:
        raise ConfigError("nnUNet_n_proc_DA is no number") from None
    if asked < 1:
        raise ConfigError("nnUNet_n_proc_DA is 0, so nnU-Net would use no workers: say how many with --workers")
    return Counted(WorkerCount(lambda: asked, cpus, lambda _: None)(), asked, cpus.cpus)


def measure_pools(loader: Any, counted: Counted, *, seconds: float) -> Pools:
    """Both in turn, each for about so many seconds in all, without warm-up.

    Raises:
        SafeLoaderError: SafeLoader makes no batches; the loader's own error, as a training would have it.
    """
    workers = counted.workers
    cached, warm_up = max(6, workers // 2), _WARM_UP * workers  # cached: nnU-Net's number
    stock, ours, seen, failed = _Tally(), _Tally(), Counter[str](), None
    with Supervisor.hold():
        for _ in range(_TURNS):
            if failed is None:
                try:
                    with _stock(loader, workers, cached) as take:
                        stock.run(take, warm_up, seconds / _TURNS)
                except _StockFailedError as error:
                    failed = str(error)
            with SafeAugmenter(loader, None, workers, cached, name="bench") as augmenter:
                next(augmenter)
                looker = _Looker(augmenter, seen)
                with looker.looking():
                    ours.run(augmenter.__next__, warm_up, seconds / _TURNS)
    return Pools(
        workers=workers,
        asked=counted.asked,
        cpus=counted.cpus,
        stock_per_s=None if failed is not None else stock.per_s,
        stock_failed=failed,
        ours_per_s=ours.per_s,
        shares=shares_of(seen),
    )


@contextmanager
def _stock(loader: Any, workers: int, cached: int) -> Iterator[Take]:
    augmenter = NonDetMultiThreadedAugmenter(_tied(loader), None, workers, cached, None, False, 0.002)
    with _without_its_last_words(augmenter):
        try:
            augmenter._start()
            yield functools.partial(_take_in_time, augmenter)
        finally:
            augmenter._finish()


@contextmanager
def _without_its_last_words(augmenter: Any) -> Iterator[None]:
    """Its thread may be fetching a batch of a worker that has ended: then it ends with a traceback on the screen."""
    before = threading.excepthook

    def hook(raised: threading.ExceptHookArgs, /) -> None:
        if raised.thread is None or raised.thread is not augmenter.results_loop_thread:
            before(raised)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before


def _take_in_time(augmenter: Any) -> Any:
    """The next batch of the stock class.

    Raises:
        _StockFailedError: there is none, or a worker has died.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        if augmenter.abort_event.is_set():
            raise _StockFailedError("a worker has died")
        try:
            return augmenter.results_loop_queue.get(timeout=0.05)
        except Empty:
            continue
    shm = os.statvfs("/dev/shm")
    size_mib = shm.f_blocks * shm.f_frsize // 2**20
    raise _StockFailedError(f"no batch within {_PATIENCE_S:g} s (/dev/shm has {size_mib} MiB)")


def _tied(loader: Any) -> Any:
    """A copy that ties the worker that gets it to this process: the stock class tells each its number first."""
    if not hasattr(loader, "set_thread_id"):
        raise SafeLoaderError(f"{type(loader).__name__} has no set_thread_id: the stock class can't use it")
    tied = copy.copy(loader)
    tied.set_thread_id = functools.partial(_tie, loader.set_thread_id, os.getpid())
    return tied


def _tie(set_thread_id: Callable[[int], None], trainer_pid: int, thread_id: int) -> None:
    die_with(trainer_pid)
    leave_interrupts_to_trainer()
    set_thread_id(thread_id)
