"""From the host's memory to the device: how fast batches of 26 MB get there, from memory of each kind.

On the CPU "the device" is other memory, and the clock is another one: that shows that this runs, and nothing else.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter

from benchmarks.peers import Running
from benchmarks.transport import Constant
from safeloader import SafeAugmenter

PAGEABLE: Final = "pageable memory"
PINNED: Final = "pinned memory"
STOCK: Final = "stock"
COPIED: Final = "safeloader, copy"
REGISTERED: Final = "safeloader, register"
ON_CUDA: Final = (PAGEABLE, PINNED, STOCK, COPIED, REGISTERED)
ON_CPU: Final = (PAGEABLE, STOCK, COPIED)

_CACHED: Final = 6
_WARM_UP: Final = 60
"""Batches before the clock starts: every slot has been filled, and registered, by then."""


@dataclass(frozen=True)
class Copied:
    """What was found of one source.

    Attributes:
        batch_mb: size. pinned: share of the tensors that torch takes for pinned.
        gb_per_s: of the copies alone, from the first one's start to the last one's end on the device's own clock.
        all_gb_per_s: by the wall clock, with taking the batch out of the loader.
        cpu_ms: the trainer's CPU time, all its threads, for a batch that is taken and dropped: with pinning, without
            the copy to the device, during which CUDA may spin.
    """

    batch_mb: float
    pinned: float
    gb_per_s: float
    all_gb_per_s: float
    cpu_ms: float


def measure(source: str, device: torch.device, batches: int, workers: int) -> Copied:
    """Copy so many batches, each with `non_blocking=True` and one wait at its end.

    Raises:
        RuntimeError: what arrived is not what was sent.
    """
    running = _source(source, device, workers)
    for _ in range(_WARM_UP if batches > _WARM_UP else batches):
        tensors = _tensors(next(running))
    nbytes = sum(tensor.nbytes for tensor in tensors)
    there = [torch.empty_like(tensor, device=device) for tensor in tensors]
    _copy(tensors, there, device)  # the device's own first time
    before = _cpu_s()
    for _ in range(batches):
        tensors = _tensors(next(running))
    cpu_s = _cpu_s() - before
    copying_s, begun_s = 0.0, time.monotonic()
    for _ in range(batches):
        tensors = _tensors(next(running))
        copying_s += _copy(tensors, there, device)
    all_s = time.monotonic() - begun_s
    if not all(torch.equal(arrived.cpu(), sent) for arrived, sent in zip(there, tensors, strict=True)):
        raise RuntimeError(f"{source}: what arrived on {device} is not what was sent")
    pinned = [device.type == "cuda" and tensor.is_pinned() for tensor in tensors]
    del tensors
    running.close()
    return Copied(
        batch_mb=nbytes / 1e6,
        pinned=sum(pinned) / len(pinned),
        gb_per_s=batches * nbytes / copying_s / 1e9,
        all_gb_per_s=batches * nbytes / all_s / 1e9,
        cpu_ms=1000 * cpu_s / batches,
    )


def _source(source: str, device: torch.device, workers: int) -> Running:
    loader = Constant()
    if source == STOCK:
        stock = NonDetMultiThreadedAugmenter(loader, None, workers, _CACHED, None, device.type == "cuda", 0.002)
        return Running(stock, stock._finish)
    if source in (COPIED, REGISTERED):
        # Without CUDA nothing is pinned, in whatever way.
        how: dict[str, Any] = {"pin": "copy" if source == COPIED else "register"} if device.type == "cuda" else {}
        ours = SafeAugmenter(loader, None, workers, _CACHED, None, device.type == "cuda", 0.002, **how)
        return Running(ours, ours.close)
    batch = next(loader)
    if source == PINNED:
        batch = {"data": batch["data"].pin_memory(), "target": [target.pin_memory() for target in batch["target"]]}
    return Running(iter(lambda: batch, None), lambda: None)


def _tensors(batch: dict[str, Any]) -> list[torch.Tensor]:
    return [batch["data"], *batch["target"]]


def _copy(here: Sequence[torch.Tensor], there: Sequence[torch.Tensor], device: torch.device) -> float:
    """Copy all of them and wait; returns the seconds."""

    def copy() -> None:
        for source, target in zip(here, there, strict=True):
            target.copy_(source, non_blocking=True)

    return _on_cuda_s(copy) if device.type == "cuda" else _on_cpu_s(copy)


def _on_cuda_s(work: Callable[[], None]) -> float:
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1000


def _on_cpu_s(work: Callable[[], None]) -> float:
    begun_s = time.monotonic()
    work()
    return time.monotonic() - begun_s


def _cpu_s() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
