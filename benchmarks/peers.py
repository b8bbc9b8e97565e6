"""The loaders that stand beside ours: one constructor each, all with the same workers and the same loader.

`stock` is batchgenerators' `NonDetMultiThreadedAugmenter`, which nnU-Net trains with. Whoever is not installed is left
out, and the tables say so by not having it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter

from safeloader import SafeAugmenter


@dataclass(frozen=True)
class Running:
    """A loader that runs: batches, and what ends it."""

    batches: Iterator[Any]
    close: Callable[[], None]

    def __next__(self) -> Any:
        return next(self.batches)


Make = Callable[[Any, int, int], Running]


def stock(loader: Any, workers: int, cached: int) -> Running:
    """What nnU-Net trains with."""
    augmenter = NonDetMultiThreadedAugmenter(loader, None, workers, cached, None, False, 0.002)
    return Running(augmenter, augmenter._finish)


def safeloader(loader: Any, workers: int, cached: int) -> Running:
    """Ours."""
    augmenter = SafeAugmenter(loader, None, workers, cached, None, False, 0.002)
    return Running(augmenter, augmenter.close)


def multithreaded(loader: Any, workers: int, cached: int) -> Running:
    """The older class of batchgenerators; its cache is per worker."""
    augmenter = MultiThreadedAugmenter(loader, None, workers, max(1, cached // workers), None, False, 10, 0.002)
    return Running(augmenter, augmenter._finish)


class _Endless(torch.utils.data.IterableDataset[Any]):
    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loader)


def torch_dataloader(loader: Any, workers: int, cached: int) -> Running:
    """The `DataLoader` of torch, over the loader's own batches, with persistent workers."""
    factor = max(2, -(-(workers + cached) // workers))
    made = torch.utils.data.DataLoader(
        _Endless(loader), batch_size=None, num_workers=workers, prefetch_factor=factor, persistent_workers=True
    )
    batches = iter(made)
    return Running(batches, batches._shutdown_workers)  # type: ignore[attr-defined]


def single(loader: Any, workers: int, cached: int) -> Running:  # noqa: ARG001 - it has neither
    """No workers: the trainer makes the batches itself."""
    return Running(iter(loader), lambda: None)


PEERS: Final[dict[str, Make]] = {
    "stock": stock,
    "safeloader": safeloader,
    "multithreaded": multithreaded,
    "torch DataLoader": torch_dataloader,
    "single process": single,
}
"""In the order in which they take turns."""


def installed(module: str) -> bool:
    """Whether an optional peer can be imported."""
    return importlib.util.find_spec(module) is not None
