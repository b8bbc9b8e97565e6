"""How long a training waits for its first batches: SafeLoader beside the stock class and its peers.

    python -m benchmarks.startup [--rounds 5] [--train 12] [--data full] [--configuration 3d_fullres]

As nnU-Net starts: 12 train and 6 validation workers, and then a batch of each (`first_s`). When both have made all that
they may make ahead and are quiet, a third loader like the train one is started in the same process, and gives its first
batch (`second_pool_s`): SafeLoader's nursery is there already. The clock starts when the loader object is ready, so
imports and planning, which are the same for all, are not in it.

Two loaders: a small one whose batch is there at once, so that only starting is measured, and nnU-Net's own, transforms
included. On few cores the latter's first batch takes long for all: as many workers as there are make theirs at once.
SPDL's pool must be told how large a batch is: making one for that is in its time.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks import brain
from benchmarks.common import Benchmark, Size, Table, median
from benchmarks.peers import chosen
from benchmarks.plots import bars, by_contestant
from benchmarks.training import LOADER_SIZES, TINY_LOADER_SIZES, start, touch_gpu, train_pool, wait_until_quiet

_LOADERS = ("small", "nnU-Net")
_COLUMNS = {"first_s": "first batches", "second_pool_s": "another loader, same process"}


@dataclass(frozen=True)
class Row:
    """One measurement."""

    contestant: str
    round: int
    loader: str
    train_workers: int
    first_s: float
    second_pool_s: float


class Small:
    """A loader whose batch is there at once: 2×1×16³ float32."""

    def __init__(self) -> None:
        self._data = np.zeros((2, 1, 16, 16, 16), np.float32)

    def set_thread_id(self, thread_id: int) -> None:
        """The stock class asks for it."""

    def __iter__(self) -> Small:
        return self

    def __next__(self) -> dict[str, Any]:
        return {"data": torch.from_numpy(self._data), "keys": ["case_1", "case_2"]}


class Startup(Benchmark[Row]):
    """See the module."""

    name = "startup"
    row = Row
    full: ClassVar[Mapping[str, Size]] = {
        "rounds": 5,
        "contestants": "stock,safeloader,multithreaded,torch DataLoader,SPDL segment pool",
        **LOADER_SIZES,
    }
    tiny: ClassVar[Mapping[str, Size]] = {"rounds": 1, "contestants": "stock,safeloader", **TINY_LOADER_SIZES}

    def prepare(self, sizes: Mapping[str, Any]) -> None:
        """The dataset."""
        brain.workspace(sizes["data"])

    def cases(self, sizes: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Everybody, with both loaders."""
        of_loader = {name: sizes[name] for name in LOADER_SIZES}
        contestants = chosen(sizes["contestants"])
        return [{"contestant": name, "loader": loader, **of_loader} for loader in _LOADERS for name in contestants]

    def measure(self, number: int, **case: Any) -> list[Row]:
        """Start two, wait, and start a third."""
        torch.set_num_threads(1)
        contestant, workers = case["contestant"], case["train"]
        loader = Small() if case["loader"] == "small" else brain.loader(case["data"], case["configuration"])
        touch_gpu()
        started = time.monotonic()
        pools = start(contestant, loader, workers)
        first_s = time.monotonic() - started
        wait_until_quiet()
        started = time.monotonic()
        another = train_pool(contestant, loader, workers)
        next(another)
        second_pool_s = time.monotonic() - started
        another.close()
        pools.close()
        return [Row(contestant, number, case["loader"], workers, round(first_s, 3), round(second_pool_s, 3))]

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """For both loaders, each contestant and how much later than the stock class it is."""
        tables = []
        for loader in dict.fromkeys(row.loader for row in rows):
            lines = []
            for name in dict.fromkeys(row.contestant for row in rows):
                cells = []
                for column in _COLUMNS:
                    seconds = median(rows, column, contestant=name, loader=loader)
                    later = seconds - median(rows, column, contestant="stock", loader=loader)
                    cells += [f"{seconds:.2f}", "–" if math.isnan(later) else f"{later:+.2f}"]
                lines.append((name, *cells))
            header = ("", *(cell for what in _COLUMNS.values() for cell in (f"{what}, s", "beside stock, s")))
            workers = rows[0].train_workers
            title = f"Start with the {loader} loader, {workers} + {max(1, workers // 2)} workers (median)"
            tables.append(Table(title, header, tuple(lines)))
        return tables

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        """A row of two for each loader."""
        loaders = list(dict.fromkeys(row.loader for row in rows))
        grid = figure.subplots(len(loaders), 2, squeeze=False)
        for line, loader in zip(grid, loaders, strict=True):
            for axes, (column, what) in zip(line, _COLUMNS.items(), strict=True):
                bars(axes, by_contestant(rows, column, loader=loader), f"{what}, s")
                axes.set_title(f"{loader} loader", fontsize=9)
        figure.suptitle("Seconds until a training has its first batches (less is better)")


if __name__ == "__main__":
    sys.exit(Startup().main())
