"""The drop-in classes: the stock interface over a pool that survives its workers.

The stock classes are those of https://github.com/MIC-DKFZ/batchgenerators, `NonDetMultiThreadedAugmenter` and
`MultiThreadedAugmenter`. One changed import is enough; what is beyond the stock interface is keyword-only or a method
that the stock class does not have.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any, Final

from batchgenerators.dataloading.data_loader import DataLoader
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter

from safeloader.config import resolve
from safeloader.errors import ConfigError, LoaderFinishedError
from safeloader.faults.incident import Incident
from safeloader.pool.pool import Pool
from safeloader.pool.seeding import root_seed
from safeloader.pool.supervisor import Supervisor, open_pool
from safeloader.pool.work import EpochEnd, Work
from safeloader.runner import FINISH_S, PoolRunner, capped

logger = logging.getLogger("safeloader")

_STATE_VERSION: Final = 1


class SafeAugmenter(PoolRunner, NonDetMultiThreadedAugmenter):  # type: ignore[misc]  # upstream has no types
    """A background loader that survives the death of its workers.

    Every batch is delivered exactly once and in order. Batch *t* depends on the root seed, the stream, *t* and the
    loader alone: not on the number of workers, on timing, or on what died.

    Args:
        data_loader: an infinite iterator of batches. Each worker has a copy; `random`, `numpy.random` and torch's
            generator are seeded for each batch on its own.
        transform: called as `transform(**batch)` in the worker, or None.
        num_processes: workers, at least 1.
        num_cached: batches kept ready beyond those in work, at least 1. The ring has
            num_processes + 2 x num_cached slots, and up to 2 x num_processes more once a slow batch has held up others.
        seeds: None, or one seed per worker; the root seed is derived from them.
        pin_memory: tensors arrive in pinned memory, where there is CUDA; see the option `pin`.
        wait_time: accepted for compatibility; nothing here polls.
        seed: the root seed, instead of `seeds` (also `SAFELOADER_SEED`).
        on_incident: called with an `Incident` for each failure, in a thread of its own: training never waits for it.
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
        on_incident: Callable[[Incident], None] | None = None,
        **options: Any,
    ) -> None:
        # Set before anything can raise: upstream's __del__ is replaced, but a half-made object must still say so.
        PoolRunner.__init__(self, on_incident)
        self.initialized = False
        self.options = resolve({"seed": seed, **options})
        _check(num_processes, seeds, num_cached=num_cached)
        _check_infinite(data_loader)
        num_processes, num_cached = int(num_processes), int(num_cached)  # NumPy's integers are welcome
        NonDetMultiThreadedAugmenter.__init__(
            self, data_loader, transform, num_processes, num_cached, seeds, pin_memory, wait_time
        )
        self._stock = not sys.platform.startswith("linux")
        if self._stock:
            _say_once_that_stock_runs(NonDetMultiThreadedAugmenter)
        self.seed = root_seed(seeds) if self.options.seed is None else self.options.seed

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
            return NonDetMultiThreadedAugmenter.__next__(self)
        pool = self._running()
        return self._delivered(pool.consumer.take())

    def next(self) -> Any:
        """The same as `next(self)`."""
        return self.__next__()

    def _start(self) -> None:
        if self._stock:
            NonDetMultiThreadedAugmenter._start(self)
            return
        self._start_pool()
        self.initialized = True

    def _open_pool(self) -> tuple[Supervisor, Pool]:
        if isinstance(self.generator, DataLoader):
            self.generator.was_initialized = False
        return open_pool(
            Work(self.generator, self.transform),
            capped(self.options),
            seed=self.seed,
            workers=self.num_processes,
            num_cached=self.num_cached,
            first_ticket=self._past.next_ticket,
            quarantined=self._past.quarantined,
            pinning=self._pinning(),
            on_incident=self.on_incident,
        )

    def _finish(self, timeout: float = FINISH_S, force: bool = False) -> None:  # noqa: ARG002 - upstream's signature
        """End the workers; the next `next()` starts new ones and goes on with the stream."""
        if getattr(self, "_stock", False):
            NonDetMultiThreadedAugmenter._finish(self)
            return
        self._end_pool(timeout)
        self.initialized = self._pool is not None

    def restart(self) -> None:
        """End the workers and start new ones; the stream goes on."""
        if self._stock:
            NonDetMultiThreadedAugmenter.restart(self)
            return
        with Supervisor.hold():
            self._finish()
            self._start()

    # ---- beyond it ----

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, ready for `json.dumps` or a checkpoint: under 1 KB but for quarantined cases.

        Returns:
            `seed` (root seed), `stream`, `next_ticket` (the first one that was not delivered), `quarantined` (cases
            that are not drawn), and `version`, of this dictionary.
        """
        report = self.report()
        return {
            "version": _STATE_VERSION,
            "seed": report.seed,
            "stream": report.stream,
            "next_ticket": report.next_ticket,
            "quarantined": list(report.quarantined),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where another augmenter of this loader stood, with any number of workers.

        Workers that run are ended. The root seed becomes the state's.

        Raises:
            ConfigError: it is no such state, or of another stream.
        """
        seed, stream, ticket, quarantined = _checked(state)
        if stream != self.options.stream:
            raise ConfigError(
                f"load_state_dict: the state is of stream {stream}, and this augmenter makes stream "
                f"{self.options.stream}: give it stream={stream}, or the state of its own stream"
            )
        self._finish()
        self.seed = seed
        self._past.next_ticket = ticket
        self._past.quarantined = dict.fromkeys(quarantined)

    def __del__(self) -> None:
        """Nothing to do: a finalizer ends the pool. Upstream's destructor would do it in the middle of a collection."""
        if getattr(self, "_stock", False):
            NonDetMultiThreadedAugmenter.__del__(self)


class SafeMultiThreadedAugmenter(PoolRunner, MultiThreadedAugmenter):  # type: ignore[misc]  # upstream has no types
    """`MultiThreadedAugmenter` over workers that may die: for finite loaders, and for those that count on their order.

    Each worker goes on from batch to batch with its own copy of the loader, and the batches come in turn: one of each
    worker, without those whose epoch has ended. When all have, `StopIteration` is raised, and the next call begins
    the next epoch. That is the stock class's order, for workers whose epochs differ by at most one batch, as those of
    batchgenerators' `DataLoader` do; where they differ by more, the stock class mixes the next epoch's batches in.

    A worker that is replaced takes up its place: no batch is lost, none comes twice, and all are bit for bit those of
    an undisturbed run. See `pool.course` for how, and for what it takes.

    Args:
        data_loader: an iterator of batches, finite or not. Each worker has a copy, with its `thread_id`.
        transform: called as `transform(**batch)` in the worker, or None.
        num_processes: workers, at least 1.
        num_cached_per_queue: batches kept ready of each worker, at least 1. The ring has
            num_processes x (1 + 2 x num_cached_per_queue) slots.
        seeds: None, or one seed per worker, with which it seeds `numpy.random` once, as the stock class does. (`random`
            and torch's generator, which the stock class leaves alone, are then seeded from all of them.)
        pin_memory: tensors arrive in pinned memory, where there is CUDA; see the option `pin`.
        timeout: a wait of so many seconds gets a line in the log: for whom, whether it lives, and what it is doing. (A
            worker that does not live is replaced, and that needs no time-out.)
        wait_time: accepted for compatibility; nothing here polls.
        seed: the root seed, for what `seeds` does not give (default: from `seeds`, or drawn; also `SAFELOADER_SEED`).
        options: see `safeloader.config.OPTIONS`; each has an environment variable, too.

    Attributes:
        generator: the loader. transform, num_processes, num_cached_per_queue, pin_memory, seeds, timeout,
            was_initialized: as upstream.
        seed: the root seed.

    Raises:
        ConfigError: an argument or environment variable that can't work.
    """

    def __init__(
        self,
        data_loader: Any,
        transform: Callable[..., Any] | None,
        num_processes: int,
        num_cached_per_queue: int = 2,
        seeds: Sequence[int | None] | None = None,
        pin_memory: bool = False,
        timeout: float = 10,
        wait_time: float = 0.02,
        *,
        seed: int | None = None,
        on_incident: Callable[[Incident], None] | None = None,
        **options: Any,
    ) -> None:
        PoolRunner.__init__(self, on_incident)
        self._stock: MultiThreadedAugmenter | None = None
        self.was_initialized = False
        self.options = resolve({"seed": seed, "slow_warning_s": timeout, **options})
        _check(num_processes, seeds, num_cached_per_queue=num_cached_per_queue)
        # Not upstream's __init__: it makes events that would be shared with the workers.
        self.generator, self.transform = data_loader, transform
        self.num_processes, self.num_cached_per_queue = int(num_processes), int(num_cached_per_queue)
        self.seeds = [None] * self.num_processes if seeds is None else seeds
        self.pin_memory, self.timeout, self.wait_time = pin_memory, timeout, wait_time
        if not sys.platform.startswith("linux"):
            _say_once_that_stock_runs(MultiThreadedAugmenter)
            self._stock = MultiThreadedAugmenter(
                data_loader, transform, num_processes, num_cached_per_queue, seeds, pin_memory, timeout, wait_time
            )
        self.seed = root_seed(seeds) if self.options.seed is None else self.options.seed
        self._starts = 0
        self._turn = 0
        self._ended: set[int] = set()  # workers whose epoch has ended

    def __next__(self) -> Any:
        """The next batch; starts the workers if they are not running.

        Raises:
            StopIteration: the epoch has ended; the next call begins the next one.
            SafeLoaderError: as `SafeAugmenter`.
        """
        if self._stock is not None:
            return next(self._stock)
        pool = self._running()
        while len(self._ended) < self.num_processes:
            worker, self._turn = self._turn, (self._turn + 1) % self.num_processes
            if worker in self._ended:
                continue
            batch = pool.consumer.take(worker)
            if not isinstance(batch, EpochEnd):
                return self._delivered(batch)
            self._ended.add(worker)
        self._begin_epoch()
        raise StopIteration

    def next(self) -> Any:
        """The same as `next(self)`."""
        return self.__next__()

    def _begin_epoch(self) -> None:
        self._turn = 0
        self._ended.clear()

    def _start(self) -> None:
        if self._stock is not None:
            self._stock._start()
            return
        self._start_pool()
        self.was_initialized = True

    def _open_pool(self) -> tuple[Supervisor, Pool]:
        if hasattr(self.generator, "was_initialized"):
            self.generator.was_initialized = False
        self._begin_epoch()
        # The stock class begins anew with each start: the same with `seeds`, another stream without.
        start, self._starts = self._starts, self._starts + (None in self.seeds)
        return open_pool(
            Work(self.generator, self.transform),
            capped(self.options),
            seed=root_seed([self.seed, start]) if start else self.seed,
            workers=self.num_processes,
            num_cached=self.num_cached_per_queue,
            first_ticket=0,
            quarantined=self._past.quarantined,
            numpy_seeds=self.seeds,
            pinning=self._pinning(),
            on_incident=self.on_incident,
        )

    def _finish(self, timeout: float = FINISH_S, force: bool = False) -> None:  # noqa: ARG002 - upstream's signature
        """End the workers; the next `next()` starts new ones, at the beginning of an epoch."""
        if self._stock is not None:
            self._stock._finish()
            return
        self._end_pool(timeout)
        self.was_initialized = self._pool is not None

    def restart(self) -> None:
        """End the workers and start new ones, at the beginning of an epoch."""
        if self._stock is not None:
            self._stock.restart()
            return
        with Supervisor.hold():
            self._finish()
            self._start()

    def __del__(self) -> None:
        """Nothing to do: a finalizer ends the pool."""


def _check(num_processes: Any, seeds: Sequence[Any] | None, **sizes: Any) -> None:
    """Refuse what can't work, in one line each."""
    for name, value in {"num_processes": num_processes, **sizes}.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
            hint = "; for no workers use batchgenerators' SingleThreadedAugmenter" if name == "num_processes" else ""
            raise ConfigError(f"{name}={value!r}: must be an integer of at least 1{hint}")
    if seeds is not None and len(seeds) != num_processes:
        raise ConfigError(f"seeds: {len(seeds)} given for num_processes={num_processes}; give one per worker, or None")
    for seed in seeds if seeds is not None else ():
        if seed is not None and (not isinstance(seed, Integral) or seed < 0):
            raise ConfigError(f"seeds: {seed!r} must be an integer of at least 0, or None")


def _checked(state: Mapping[str, Any]) -> tuple[int, int, int, list[str]]:
    """What a state says: seed, stream, next ticket and quarantined cases."""
    try:
        version, numbers = state["version"], [state[name] for name in ("seed", "stream", "next_ticket")]
        quarantined = state["quarantined"]
    except (KeyError, TypeError) as error:
        raise ConfigError(f"load_state_dict: this is no state of a SafeAugmenter: {error} is missing") from None
    if version != _STATE_VERSION:
        raise ConfigError(f"load_state_dict: the state is of version {version!r}; this is version {_STATE_VERSION}")
    valid = all(isinstance(number, int) and number >= 0 for number in numbers)
    if not valid or not isinstance(quarantined, list) or not all(isinstance(case, str) for case in quarantined):
        raise ConfigError(f"load_state_dict: this is no state of a SafeAugmenter: {dict(state)!r:.200}")
    seed, stream, ticket = numbers
    return seed, stream, ticket, quarantined


def _check_infinite(data_loader: Any) -> None:
    if isinstance(data_loader, DataLoader) and not data_loader.infinite:
        raise LoaderFinishedError(
            "data_loader is finite (infinite=False): SafeAugmenter takes infinite loaders only. Make it infinite, or "
            "use SafeMultiThreadedAugmenter."
        )


_said: set[type] = set()


def _say_once_that_stock_runs(stock: type) -> None:
    if stock not in _said:
        _said.add(stock)
        logger.warning(
            "SafeLoader needs Linux, and this is %s: the stock %s runs instead, without protection",
            sys.platform,
            stock.__name__,
        )
