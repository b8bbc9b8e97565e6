"""How fast batches get from workers to the trainer: SafeLoader beside the stock class, its peers and plain copies.

    python -m benchmarks.transport [--rounds 5] [--warm_up 60] [--batches 300] [--workers 2]

The workers do no other work: each has its batch at hand, so what is measured is transport alone. A batch is nnU-Net's
for 3d_fullres: 2×1×128³ float32 and five deep-supervision targets of int16. The bound is what as many processes can
copy at once, each within its own memory: whoever copies each batch once can't be faster. The clock starts after
`warm_up` batches: every slot has been filled once by then.
"""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from matplotlib.figure import Figure

from benchmarks.common import Benchmark, Size, Table, median, times
from benchmarks.peers import OPTIONAL, PEERS, chosen
from benchmarks.plots import bars, by_contestant

_CACHED = 6
_READ = 20
"""Batches that are then read, a byte of each page, for the page faults that this costs."""
_PAGE_NBYTES = 4096
_NO_TRANSPORT = "single process"
_BOUND = "memcpy"


@dataclass(frozen=True)
class Row:
    """One measurement. CPU and page faults are the trainer's, all its threads together.

    Rate and CPU are of batches that are taken and dropped, page faults of further ones that are read.
    """

    contestant: str
    round: int
    workers: int
    batches: int
    batch_mb: float
    gb_per_s: float
    trainer_cpu_ms_per_batch: float
    trainer_page_faults_per_batch: float


class Constant:
    """A loader whose batch is always there, in new tensors over the same memory.

    torch moves the storage of a tensor that it shares into shared memory for good, so a loader that returned the same
    tensors again would have the stock class send the same memory again, without a copy. Each of these has a storage of
    its own, which is copied each time.
    """

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        sides = (128, 64, 32, 16, 8)
        self._data = rng.standard_normal((2, 1, 128, 128, 128), dtype=np.float32)
        self._target = [rng.integers(0, 3, (2, 1, side, side, side), dtype=np.int16) for side in sides]
        self.nbytes = self._data.nbytes + sum(target.nbytes for target in self._target)

    def set_thread_id(self, thread_id: int) -> None:
        """The stock class asks for it."""

    def __iter__(self) -> Constant:
        return self

    def __next__(self) -> dict[str, Any]:
        return {
            "data": torch.from_numpy(self._data),
            "target": [torch.from_numpy(target) for target in self._target],
            "keys": ["case_1", "case_2"],
        }


def _read(batch: dict[str, Any]) -> int:
    """A byte of each page of the batch."""
    tensors = (batch["data"], *batch["target"])
    return sum(int(tensor.numpy().reshape(-1).view(np.uint8)[::_PAGE_NBYTES].sum()) for tensor in tensors)


def _copy(seconds: float, nbytes: int, rates: Any) -> None:
    source, target = np.ones(nbytes, np.uint8), np.empty(nbytes, np.uint8)
    np.copyto(target, source)
    started, copies = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        np.copyto(target, source)
        copies += 1
    rates.put(copies * nbytes / (time.monotonic() - started) / 1e9)


def memcpy_gb_per_s(processes: int, nbytes: int) -> float:
    """What that many processes copy at once, in one second."""
    context = multiprocessing.get_context("spawn")
    rates = context.SimpleQueue()
    running = [context.Process(target=_copy, args=(1.0, nbytes, rates)) for _ in range(processes)]
    for process in running:
        process.start()
    total = sum(float(rates.get()) for _ in running)
    for process in running:
        process.join()
    return total


class Transport(Benchmark[Row]):
    """See the module."""

    name = "transport"
    row = Row
    full: ClassVar[Mapping[str, Size]] = {
        "rounds": 5,
        "contestants": ",".join(name for name in {**PEERS, **OPTIONAL, _BOUND: None} if name != _NO_TRANSPORT),
        "warm_up": 60,
        "batches": 300,
        "workers": 2,
    }
    tiny: ClassVar[Mapping[str, Size]] = {
        "rounds": 1,
        "contestants": f"stock,safeloader,SPDL segment pool,{_BOUND}",
        "warm_up": 5,
        "batches": 3,
    }

    def cases(self, sizes: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Everybody who has something to transport, and the bound."""
        same = {name: sizes[name] for name in ("warm_up", "batches", "workers")}
        return [{"contestant": name, **same} for name in chosen(sizes["contestants"], _BOUND)]

    def measure(self, number: int, **case: Any) -> list[Row]:
        """Take the batches and drop them."""
        contestant, workers, batches = case["contestant"], case["workers"], case["batches"]
        torch.set_num_threads(1)
        loader = Constant()
        batch_mb = round(loader.nbytes / 1e6, 2)
        if contestant == _BOUND:
            return [
                Row(contestant, number, workers, 0, batch_mb, round(memcpy_gb_per_s(workers, loader.nbytes), 3), 0, 0)
            ]
        running = PEERS[contestant](loader, workers, _CACHED)
        for _ in range(case["warm_up"]):
            _read(next(running))
        before, started = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
        for _ in range(batches):
            next(running)
        seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF)
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(_READ):
            _read(next(running))
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults
        running.close()
        cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return [
            Row(
                contestant=contestant,
                round=number,
                workers=workers,
                batches=batches,
                batch_mb=batch_mb,
                gb_per_s=round(batches * loader.nbytes / seconds / 1e9, 3),
                trainer_cpu_ms_per_batch=round(1e3 * cpu_s / batches, 3),
                trainer_page_faults_per_batch=round(faults / _READ, 1),
            )
        ]

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """All contestants beside the stock class."""
        stock = median(rows, "gb_per_s", contestant="stock")
        bound = median(rows, "gb_per_s", contestant=_BOUND)
        lines = []
        for contestant in dict.fromkeys(row.contestant for row in rows):
            rate = median(rows, "gb_per_s", contestant=contestant)
            cpu_ms, faults = (
                median(rows, column, contestant=contestant)
                for column in ("trainer_cpu_ms_per_batch", "trainer_page_faults_per_batch")
            )
            own = ("–", "–") if contestant == _BOUND else (f"{cpu_ms:.2f}", f"{faults:.0f}")
            lines.append((contestant, f"{rate:.2f}", times(rate, stock), f"{rate / bound:.0%}", *own))
        title = f"Transport of {rows[0].batch_mb} MB batches, {rows[0].workers} workers that do no other work (median)"
        header = ("", "GB/s", "of stock", "of memcpy", "trainer's CPU, ms/batch", "trainer's page faults/batch")
        return [Table(title, header, tuple(lines))]

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        """Rates and the trainer's CPU, each round a dot."""
        left, right = figure.subplots(1, 2)
        bars(left, by_contestant(rows, "gb_per_s"), "GB/s (more is better)")
        cpu = by_contestant(rows, "trainer_cpu_ms_per_batch")
        cpu.pop(_BOUND, None)
        bars(right, cpu, "trainer's CPU, ms/batch (less is better)")
        figure.suptitle(f"Transport of {rows[0].batch_mb} MB batches, {rows[0].workers} workers")


if __name__ == "__main__":
    sys.exit(Transport().main())
