"""The loaders that stand beside ours: one constructor each, all with the same workers and the same loader.

`stock` is batchgenerators' `NonDetMultiThreadedAugmenter`, which nnU-Net trains with. Whoever is not installed is left
out, and the tables say so by not having it.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import logging
import os
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import psutil
import torch
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter

from safeloader import SafeAugmenter

_RAY_TICKETS: Final = 1000
"""Of one pass over Ray's dataset, which must be finite; then the next one begins."""


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


def spdl(loader: Any, workers: int, cached: int) -> Running:
    """SPDL's pool of shared-memory segments: a subprocess for each worker, whose batches are taken in turn.

    A segment must hold the largest batch: its size is that of one batch, made here, and an eighth more.
    """
    from spdl.pipeline import SharedMemorySegmentPool, iterate_in_subprocess

    largest_nbytes = _nbytes(next(iter(loader))) * 9 // 8 + (1 << 20)
    segments = -(-(workers + 2 * cached) // workers)
    running = [
        iterate_in_subprocess(
            functools.partial(_worker_loader, loader, number),
            buffer_size=segments,
            mp_context="fork",
            daemon=True,
            arena=SharedMemorySegmentPool(largest_nbytes, segments),
        )
        for number in range(workers)
    ]
    iterators = [iter(one) for one in running]
    batches = (next(one) for one in itertools.cycle(iterators))

    def close() -> None:
        batches.close()
        for one in iterators:
            one.close()
        iterators.clear()
        running.clear()

    return Running(batches, close)


def ray_data(loader: Any, workers: int, cached: int) -> Running:
    """Ray Data: actors that each have the loader, over a dataset of ticket numbers; a batch is a block of its own.

    A local cluster, one CPU for each actor and one for the tasks that number the tickets. Batches must be tables there:
    a tensor is a column, one of a list is `NAME/PLACE`, and a row is a sample. They come back as views on Ray's store.
    """
    import ray
    import ray.data

    ray.init(num_cpus=workers + 1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    samples = _samples(next(iter(loader)))
    tickets = ray.data.range(_RAY_TICKETS, override_num_blocks=_RAY_TICKETS)
    made = tickets.map_batches(
        _RayActor,
        fn_constructor_args=(loader,),
        batch_size=1,
        num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
    )
    batches = _passes(made, batch_size=samples, prefetch_batches=cached, batch_format="numpy")

    def close() -> None:
        batches.close()
        _end_ray()

    return Running(batches, close)


def _passes(dataset: Any, **how: Any) -> Generator[dict[str, Any], None, None]:
    """Endless. Whoever closes it ends what the dataset runs; if that came after Ray's end, Ray would start again."""
    while True:
        yield from map(_from_columns, dataset.iter_batches(**how))


def _end_ray() -> None:
    """Ray's agents outlive `shutdown` by minutes: they would run beside the next contestant."""
    import ray

    processes = psutil.Process().children(recursive=True)
    ray.shutdown()
    _, left = psutil.wait_procs(processes, timeout=2)
    for process in left:
        process.kill()
    psutil.wait_procs(left)


class _RayActor:
    """Makes a batch for each ticket."""

    def __init__(self, loader: Any) -> None:
        self._batches = iter(_worker_loader(loader, os.getpid()))

    def __call__(self, tickets: Any) -> dict[str, Any]:  # noqa: ARG002 - Ray's
        return _to_columns(next(self._batches))


def _to_columns(batch: Mapping[str, Any]) -> dict[str, Any]:
    columns = {}
    for name, value in batch.items():
        if isinstance(value, list) and isinstance(value[0], torch.Tensor):
            columns.update({f"{name}/{place}": tensor.numpy() for place, tensor in enumerate(value)})
        else:
            columns[name] = value.numpy() if isinstance(value, torch.Tensor) else np.array(value)
    return columns


def _from_columns(columns: Mapping[str, Any]) -> dict[str, Any]:
    batch: dict[str, Any] = {}
    for name, column in columns.items():
        value = torch.from_numpy(column) if column.dtype != object else list(column)
        key, slash, _ = name.partition("/")
        if slash:
            batch.setdefault(key, []).append(value)
        else:
            batch[key] = value
    return batch


def _samples(batch: Mapping[str, Any]) -> int:
    return next(len(value) for value in batch.values() if isinstance(value, torch.Tensor))


def _worker_loader(loader: Any, number: int) -> Any:
    """In the worker: as the stock class's does it, its own number and its own random numbers."""
    np.random.seed()
    if hasattr(loader, "set_thread_id"):
        loader.set_thread_id(number)
    return loader


def _nbytes(batch: Any) -> int:
    """Of the tensors and arrays in a batch."""
    if isinstance(batch, dict):
        return sum(map(_nbytes, batch.values()))
    if isinstance(batch, list | tuple):
        return sum(map(_nbytes, batch))
    return int(batch.nbytes) if isinstance(batch, torch.Tensor | np.ndarray) else 0


def installed(module: str) -> bool:
    """Whether an optional peer can be imported."""
    return importlib.util.find_spec(module) is not None


OPTIONAL: Final[dict[str, tuple[str, Make]]] = {
    "SPDL segment pool": ("spdl", spdl),
    "Ray Data": ("ray", ray_data),
}
"""Each with what must be installed for it."""

PEERS: Final[dict[str, Make]] = {
    "stock": stock,
    "safeloader": safeloader,
    "multithreaded": multithreaded,
    "torch DataLoader": torch_dataloader,
    "single process": single,
    **{name: make for name, (module, make) in OPTIONAL.items() if installed(module)},
}
"""In the order in which they take turns."""


def chosen(names: str, *others: str) -> list[str]:
    """Those of a list with commas that can be had here: who is not installed is left out.

    Args:
        names: what was asked for.
        others: contestants that are no peers, and always there.

    Raises:
        ValueError: nobody is called that.
    """
    asked, here = names.split(","), (*PEERS, *others)
    unknown = [name for name in asked if name not in here and name not in OPTIONAL]
    if unknown:
        raise ValueError(f"there is no {', '.join(unknown)}, only {', '.join(dict.fromkeys([*here, *OPTIONAL]))}")
    return [name for name in asked if name in here]
