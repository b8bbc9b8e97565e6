"""nnU-Net's own batches, where the CPU is the limit: SafeLoader beside the stock class and its peers.

    python -m benchmarks.nnunet [--rounds 5] [--seconds 20] [--workers CORES] [--out benchmarks/results]

The loader is the one that nnU-Net's trainer builds, with all its transforms, for 3d_fullres and 2d of the brain. The
trainer takes the batches and drops them: it always waits for the workers, and what they cost is all there is.

CPU time and page faults are those of all processes below the trainer (stock: the workers; ours: the workers and the
nursery; "single process": the trainer, which makes the batches itself), between two deliveries in the middle of the
stream. So nothing counts that is paid once: importing, starting, the first batches, and, in the stock class, most of
the timing of FFT against direct convolution that each worker does for its first blurs (ours never does it).

The last column is the proof that nothing was saved on the augmentation: the first batches that SafeLoader delivers are
made once more, by nnU-Net's plain loader in a fresh process of its own, and are compared bit for bit.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from matplotlib.figure import Figure
from threadpoolctl import threadpool_limits

from benchmarks import brain
from benchmarks.common import Benchmark, Size, Table, median, times
from benchmarks.peers import PEERS, Running, chosen, installed
from benchmarks.plots import bars, by_contestant
from benchmarks.processes import Used, used_below, used_by
from safeloader.faults.cpus import available_cpus
from safeloader.pool.blur import always_convolve_directly
from safeloader.pool.owned import OwnedGenerators
from safeloader.pool.seeding import seed_everything
from safeloader.ring.digest import checksum

_CACHED = 6
_ALONE = "single process"


@dataclass(frozen=True)
class Row:
    """One measurement.

    Of `compared` batches `same_bits` were those that one process makes alone; None where tickets have no seed.
    """

    contestant: str
    configuration: str
    round: int
    workers: int
    batch_size: int
    batches: int
    batches_per_s: float
    worker_cpu_s_per_batch: float
    worker_page_faults_per_batch: float
    compared: float | None
    same_bits: float | None


def _made_alone(data: str, configuration: str, seed: int, tickets: int) -> list[str]:
    """Run in a fresh process: the first batches by the plain loader, with one thread and seeded as a worker is."""
    torch.set_num_threads(1)
    loader = brain.loader(data, configuration)
    always_convolve_directly(loader)
    with threadpool_limits(limits=1, user_api=None):
        return [checksum(batch) for batch in _seeded(loader, seed, tickets)]


def _seeded(loader: Any, seed: int, tickets: int) -> Iterator[Any]:
    owned = OwnedGenerators(loader)
    for ticket in range(tickets):
        seed_everything(seed, 0, ticket)
        owned.seed(seed, 0, ticket, 0)
        yield next(loader)


def made_alone(data: str, configuration: str, seed: int, tickets: int) -> list[str]:
    """The checksums of a stream's first batches, as one process makes them that knows nothing of pools."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(_made_alone, data, configuration, seed, tickets).result()


def _timed(running: Running, seconds: float, *, alone: bool) -> tuple[int, float, Used]:
    """From one delivery to another, at least `seconds` later: batches, seconds, and what who makes them has used."""
    used = functools.partial(used_by, os.getpid()) if alone else used_below
    before, started, batches = used(), time.monotonic(), 0
    while time.monotonic() < started + seconds:
        next(running)
        batches += 1
    return batches, time.monotonic() - started, used().since(before)


class NnUNet(Benchmark[Row]):
    """See the module."""

    name = "nnunet"
    row = Row
    full: ClassVar[Mapping[str, Size]] = {
        "rounds": 5,
        "seconds": 20.0,
        "workers": available_cpus().cpus,
        "warmup": 8,
        "compared": 4,
        "data": "full",
        "contestants": ",".join(PEERS),
    }
    tiny: ClassVar[Mapping[str, Size]] = {
        "rounds": 1,
        "seconds": 0.5,
        "warmup": 2,
        "data": "tiny",
        "contestants": "stock,safeloader",
    }

    def missing(self) -> str | None:
        """It needs nnU-Net, and the brain."""
        missing = [module for module in ("nnunetv2", "nilearn") if not installed(module)]
        return f"{' and '.join(missing)} not installed" if missing else None

    def prepare(self, sizes: Mapping[str, Any]) -> None:
        """The dataset, if it is not there yet."""
        brain.workspace(sizes["data"])

    def cases(self, sizes: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Everybody, with each configuration; the number of warm-up batches is per worker."""
        own = {name: sizes[name] for name in ("seconds", "workers", "compared", "data")}
        return [
            {"contestant": contestant, "configuration": configuration, "warmup": sizes["warmup"], **own}
            for configuration in brain.CONFIGURATIONS[sizes["data"]]
            for contestant in chosen(sizes["contestants"])
        ]

    def measure(self, number: int, **case: Any) -> list[Row]:
        """Warm up, take batches for a while, and have the first ones made again."""
        contestant, configuration, data = case["contestant"], case["configuration"], case["data"]
        ours, alone = contestant == "safeloader", contestant == _ALONE
        workers = 0 if alone else case["workers"]
        torch.set_num_threads(1)
        # Workers that are forked from here begin with these states: another one in each round.
        torch.manual_seed(number)
        np.random.seed(number)
        os.environ["SAFELOADER_SEED"] = str(number)
        loader = brain.loader(data, configuration)
        running = PEERS[contestant](loader, workers, _CACHED)
        compared = case["compared"] if ours else 0
        delivered = [checksum(next(running)) for _ in range(compared)]
        for _ in range(max(1, case["warmup"] * max(1, workers) - compared)):
            next(running)
        batches, seconds, used = _timed(running, case["seconds"], alone=alone)
        running.close()
        expected = made_alone(data, configuration, number, compared) if ours else []
        return [
            Row(
                contestant=contestant,
                configuration=configuration,
                round=number,
                workers=workers,
                batch_size=int(loader.batch_size),
                batches=batches,
                batches_per_s=round(batches / seconds, 4),
                worker_cpu_s_per_batch=round(used.cpu_s / batches, 4),
                worker_page_faults_per_batch=round(used.page_faults / batches, 1),
                compared=float(compared) if ours else None,
                same_bits=float(sum(a == b for a, b in zip(delivered, expected, strict=True))) if ours else None,
            )
        ]

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """One for each configuration, all contestants beside the stock class."""
        return [
            _table(configuration, [row for row in rows if row.configuration == configuration])
            for configuration in dict.fromkeys(row.configuration for row in rows)
        ]

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        """Rates and CPU, a line of two panels for each configuration."""
        configurations = list(dict.fromkeys(row.configuration for row in rows))
        panels = figure.subplots(len(configurations), 2, squeeze=False)
        for (left, right), configuration in zip(panels, configurations, strict=True):
            rates = by_contestant(rows, "batches_per_s", configuration=configuration)
            bars(left, rates, f"{configuration}: batches/s (more is better)")
            cpu = by_contestant(rows, "worker_cpu_s_per_batch", configuration=configuration)
            bars(right, cpu, f"{configuration}: CPU, s/batch (less is better)")
        workers = max(row.workers for row in rows)
        figure.suptitle(f"nnU-Net's batches, augmented by {workers} workers")


def _table(configuration: str, rows: Sequence[Row]) -> Table:
    stock_rate, stock_cpu = (
        median(rows, column, contestant="stock") for column in ("batches_per_s", "worker_cpu_s_per_batch")
    )
    lines = []
    for contestant in dict.fromkeys(row.contestant for row in rows):
        own = [row for row in rows if row.contestant == contestant]
        rates = [row.batches_per_s for row in own]
        columns = ("batches_per_s", "worker_cpu_s_per_batch", "worker_page_faults_per_batch")
        rate, cpu_s, faults = (median(own, column) for column in columns)
        lines.append(
            (
                contestant,
                f"{rate:.3g} ({min(rates):.3g} to {max(rates):.3g})",
                times(rate, stock_rate),
                f"{cpu_s:.3g}",
                times(cpu_s, stock_cpu),
                f"{faults:,.0f}",
                _same_bits(own),
            )
        )
    title = (
        f"nnU-Net's {configuration}, batches of {rows[0].batch_size}, {max(row.workers for row in rows)} workers "
        f"(median of {len({row.round for row in rows})} rounds)"
    )
    header = ("", "batches/s (range)", "of stock", "CPU s/batch", "of stock", "page faults/batch", "same bits")
    return Table(title, header, tuple(lines))


def _same_bits(rows: Sequence[Row]) -> str:
    compared = [row.compared for row in rows if row.compared is not None]
    same = [row.same_bits for row in rows if row.same_bits is not None]
    return f"{sum(same):.0f} of {sum(compared):.0f}" if compared else "–"


if __name__ == "__main__":
    sys.exit(NnUNet().main())
