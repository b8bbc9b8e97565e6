"""How fast batches get from workers to the trainer: SafeLoader beside the stock class and plain copies.

    python -m benchmarks.transport [--rounds 5] [--batches 60] [--workers 2] [--out benchmarks/results]

The workers do no other work: each returns the same batch again, so what is measured is transport alone. A batch is
nnU-Net's for 3d_fullres: 2×1×128³ float32 and five deep-supervision targets of int16. Each measurement is a fresh
process; the contestants take turns.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter

from benchmarks.common import in_a_fresh_process, write
from safeloader import SafeAugmenter

_WARM_UP = 15
"""Batches before the clock starts: every slot has been filled once by then."""


@dataclass(frozen=True)
class Row:
    """One measurement: the CSV's columns, with units."""

    contestant: str
    round: int
    workers: int
    batches: int
    batch_mb: float
    gb_per_s: float
    trainer_cpu_ms_per_batch: float
    trainer_page_faults_per_batch: float
    first_batch_s: float


class Constant:
    """A loader whose batch is always there."""

    def __init__(self) -> None:
        sides = [128, 64, 32, 16, 8]
        self.batch: dict[str, Any] = {
            "data": torch.randn(2, 1, 128, 128, 128),
            "target": [torch.randint(0, 3, (2, 1, s, s, s), dtype=torch.int16) for s in sides],
            "keys": ["case_1", "case_2"],
        }

    def set_thread_id(self, thread_id: int) -> None:
        """The stock class asks for it."""

    def __iter__(self) -> Constant:
        return self

    def __next__(self) -> dict[str, Any]:
        # torch moves a tensor that it shares into shared memory for good; the stock class would then send the same
        # memory again and again without a copy. Real loaders return new tensors.
        return {
            "data": self.batch["data"].clone(),
            "target": [target.clone() for target in self.batch["target"]],
            "keys": self.batch["keys"],
        }

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return int(self.batch["data"].nbytes + sum(target.nbytes for target in self.batch["target"]))


def _stock(loader: Constant, workers: int) -> Any:
    return NonDetMultiThreadedAugmenter(loader, None, workers, 6, None, False, 0.002)


def _safe(loader: Constant, workers: int) -> Any:
    return SafeAugmenter(loader, None, workers, 6, None, False, 0.002)


CONTESTANTS: dict[str, Callable[[Constant, int], Any]] = {"stock": _stock, "safeloader": _safe}


def measure(contestant: str, number: int, workers: int, batches: int) -> Row:
    """One measurement, in this process."""
    torch.set_num_threads(1)
    loader = Constant()
    augmenter = CONTESTANTS[contestant](loader, workers)
    started = time.monotonic()
    next(augmenter)
    first_batch_s = time.monotonic() - started
    for _ in range(_WARM_UP):
        next(augmenter)
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.monotonic()
    for _ in range(batches):
        next(augmenter)
    seconds, after = time.monotonic() - started, resource.getrusage(resource.RUSAGE_SELF)
    augmenter._finish()
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Row(
        contestant=contestant,
        round=number,
        workers=workers,
        batches=batches,
        batch_mb=round(loader.nbytes / 1e6, 2),
        gb_per_s=round(batches * loader.nbytes / seconds / 1e9, 3),
        trainer_cpu_ms_per_batch=round(1e3 * cpu_s / batches, 3),
        trainer_page_faults_per_batch=round((after.ru_minflt - before.ru_minflt) / batches, 1),
        first_batch_s=round(first_batch_s, 3),
    )


def _copy(seconds: float, nbytes: int, rates: Any) -> None:
    source, target = np.ones(nbytes, np.uint8), np.empty(nbytes, np.uint8)
    np.copyto(target, source)
    started, copies = time.monotonic(), 0
    while time.monotonic() - started < seconds:
        np.copyto(target, source)
        copies += 1
    rates.put(copies * nbytes / (time.monotonic() - started) / 1e9)


def memcpy_gb_per_s(processes: int, nbytes: int) -> float:
    """What that many processes copy at once: the bound for anything that copies each batch once."""
    context = multiprocessing.get_context("spawn")
    rates = context.SimpleQueue()
    running = [context.Process(target=_copy, args=(1.0, nbytes, rates)) for _ in range(processes)]
    for process in running:
        process.start()
    total = sum(float(rates.get()) for _ in running)
    for process in running:
        process.join()
    return round(total, 3)


def main(argv: Sequence[str] | None = None) -> int:
    """Run all rounds, print a table, write CSV and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--one", nargs=2, metavar=("CONTESTANT", "ROUND"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        contestant, number = arguments.one
        print(json.dumps(asdict(measure(contestant, int(number), arguments.workers, arguments.batches))))
        return 0

    rows: list[Row] = []
    copies = []
    for number in range(arguments.rounds):
        for contestant in CONTESTANTS:
            options = ["--workers", str(arguments.workers), "--batches", str(arguments.batches)]
            rows.append(Row(**in_a_fresh_process("transport", "--one", contestant, str(number), *options)))
            print(rows[-1])
        copies.append(memcpy_gb_per_s(arguments.workers, Constant().nbytes))

    def median(contestant: str, column: str) -> float:
        return statistics.median(float(getattr(row, column)) for row in rows if row.contestant == contestant)

    columns = [f.name for f in fields(Row)][5:]
    print(f"\nmedian of {arguments.rounds} rounds, {arguments.workers} workers, {rows[0].batch_mb} MB a batch")
    for column in columns:
        stock, safe = (median(contestant, column) for contestant in CONTESTANTS)
        print(f"{column:32} stock {stock:10.3f}   safeloader {safe:10.3f}   ratio {safe / stock if stock else 0:6.3f}")
    print(f"{arguments.workers} processes that only copy: {statistics.median(copies):.3f} GB/s")

    write(arguments.out, "transport", rows, {"memcpy_gb_per_s": statistics.median(copies)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
