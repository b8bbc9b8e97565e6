"""Real batches through the real transforms, made by one worker: what it needs, and how many workers to take."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any, Final

import torch

from safeloader.augmenter import SafeAugmenter
from safeloader.faults.cpus import CpuBudget, available_cpus
from safeloader.faults.memory import MemoryBudget, available, worker_nbytes
from safeloader.pool.work import Work

_MOST_WORKERS: Final = 12
"""What nnU-Net takes where it does not know better."""


@dataclass(frozen=True)
class Tried:
    """What one worker needed.

    Attributes:
        batches: That were made, the first one (its files are opened, its code is warmed up) not counted.
        batch_s: Seconds for each: median, least, most.
        worker_nbytes: Memory of its own, at its peak.
        batch_nbytes: Tensors and arrays of the largest batch.
    """

    batches: int
    batch_s: tuple[float, float, float]
    worker_nbytes: int
    batch_nbytes: int


@dataclass(frozen=True)
class Advice:
    """How many workers to take for training, and what they and those for validation will need.

    Attributes:
        workers: For `nnUNet_n_proc_DA`.
        nbytes: Memory of all workers (nnU-Net takes half as many for validation) and both rings.
        per_s: Batches per second that the training workers make, if nothing else slows them.
        cpus: What the CPUs allow. memory: What may be taken, or None if it is not known.
        by_memory: Whether memory allows fewer than the CPUs.
    """

    workers: int
    nbytes: int
    per_s: float
    cpus: CpuBudget
    memory: MemoryBudget | None
    by_memory: bool


def try_batches(work: Work, batches: int) -> Tried:
    """Let one worker make so many batches, one after the other.

    Raises:
        SafeLoaderError: It can't; the error says why, and names the case.
    """
    taken: list[float] = []
    batch_nbytes = own_nbytes = 0
    with SafeAugmenter(work.loader, work.transform, 1, 1, seed=1, name="check") as augmenter:
        next(augmenter)
        for _ in range(batches):
            started = time.monotonic()
            batch = next(augmenter)  # nothing lies ready: whoever takes this quickly waits for each
            taken.append(time.monotonic() - started)
            batch_nbytes = max(batch_nbytes, _nbytes(batch))
        for worker in augmenter.workers():
            if worker.pid is not None:
                own_nbytes = max(own_nbytes, worker_nbytes(worker.pid) or 0)
    return Tried(batches, (statistics.median(taken), min(taken), max(taken)), own_nbytes, batch_nbytes)


def _nbytes(batch: Any) -> int:
    if isinstance(batch, torch.Tensor):
        return batch.nbytes
    if isinstance(batch, dict):
        return sum(map(_nbytes, batch.values()))
    if isinstance(batch, (list, tuple)):
        return sum(map(_nbytes, batch))
    return int(getattr(batch, "nbytes", 0))


def advise(tried: Tried) -> Advice:
    """How many workers to take on this machine."""
    cpus, memory = available_cpus(), available()
    wanted = min(cpus.cpus, _MOST_WORKERS)
    workers = wanted
    if memory is not None:
        while workers > 1 and _needed(workers, tried) > memory.nbytes * 0.9:
            workers -= 1
    return Advice(workers, _needed(workers, tried), workers / tried.batch_s[0], cpus, memory, workers < wanted)


def _needed(workers: int, tried: Tried) -> int:
    """Memory of both pools as nnU-Net sizes them: half as many workers for validation; slots as in `SafeAugmenter`."""
    validation = max(1, workers // 2)
    slots = workers + 2 * max(6, workers // 2) + validation + 2 * max(3, workers // 4)
    return (workers + validation) * tried.worker_nbytes + slots * tried.batch_nbytes
