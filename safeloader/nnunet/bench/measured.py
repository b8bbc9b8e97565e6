"""The numbers of one `safeloader bench`: plain frozen data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What something takes one worker, in seconds per batch: on the clock, and of CPU."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True, kw_only=True)
class OneWorker:
    """A loader on its own, with one thread.

    Attributes:
        cases: that were read, of `all_cases` in the training set.
        batches: that were made.
        loading_first: reading, decompressing, cropping and putting together, where each file is opened for the first
            time: perhaps from storage.
        loading_later: the same patches of the same cases once more, and others of them: from memory, if that suffices.
        transforming: the augmentation.
    """

    cases: int
    all_cases: int
    batches: int
    loading_first: Cost
    loading_later: Cost
    transforming: Cost


@dataclass(frozen=True, kw_only=True)
class Shares:
    """Of the workers' time, from 0 to 1, together 1.

    Attributes:
        computing: running, or waiting for a CPU.
        storage: asleep while a batch is loaded.
        handing_over: writing a finished batch into its slot, and waiting for the next ticket.
    """

    computing: float
    storage: float
    handing_over: float


@dataclass(frozen=True, kw_only=True)
class Pools:
    """All workers together, whose batches are taken and dropped.

    Attributes:
        workers: how many. asked: how many nnU-Net, or the user, wanted. cpus: that this process may use.
        stock_per_s: batches per second with the stock class; None if it made none. stock_failed: why, then.
        ours_per_s: batches per second with SafeLoader. shares: what its workers did meanwhile.
    """

    workers: int
    asked: int
    cpus: int
    stock_per_s: float | None
    stock_failed: str | None
    ours_per_s: float
    shares: Shares


@dataclass(frozen=True, kw_only=True)
class Network:
    """The trainer's own training step, with one batch that stays in memory.

    Attributes:
        per_s: steps per second; at most so many, if `at_most`: then no step had ended when time was up.
        steps: that were timed. device: its name. gpu: whether it is one.
    """

    per_s: float
    steps: int
    device: str
    gpu: bool
    at_most: bool = False


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All of it; `network` is None where it was not measured, and `network_missing` says why."""

    one_worker: OneWorker
    pools: Pools
    network: Network | None
    network_missing: str | None
