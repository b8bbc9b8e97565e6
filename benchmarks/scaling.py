"""How many batches more workers make, from one to all cores: SafeLoader beside the stock class.

    python -m benchmarks.scaling [--rounds 5] [--each 12] [--data full] [--configurations 3d_fullres,2d]

nnU-Net's own loader, transforms included, and a consumer that takes batches as fast as it gets them. Workers: powers of
two, and as many as there are cores for this process. Each makes `each` batches while the clock runs, so a measurement
takes as long with many workers as with one. Before that, as many batches are dropped as are made until all slots have
been filled once, with one worker as with all.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure

from benchmarks import brain
from benchmarks.common import Benchmark, Size, Table, median, times
from benchmarks.peers import PEERS, chosen
from benchmarks.plots import colour, tidy

_CACHED = 2
"""Few: what is made ahead is not to count as speed."""


@dataclass(frozen=True)
class Row:
    """One measurement. The trainer's CPU is not of interest here: it only drops batches."""

    contestant: str
    round: int
    configuration: str
    workers: int
    batches: int
    batches_per_s: float


def worker_counts(cores: int) -> list[int]:
    """1, 2, 4, ... and all cores."""
    powers = [1 << power for power in range(cores.bit_length()) if 1 << power <= cores]
    return sorted({*powers, cores})


class Scaling(Benchmark[Row]):
    """See the module."""

    name = "scaling"
    row = Row
    full: ClassVar[Mapping[str, Size]] = {
        "rounds": 5,
        "contestants": "stock,safeloader",
        "each": 12,
        "data": "full",
        "configurations": ",".join(brain.CONFIGURATIONS["full"]),
        "most": 1024,
    }
    tiny: ClassVar[Mapping[str, Size]] = {
        "rounds": 1,
        "each": 3,
        "data": "tiny",
        "configurations": ",".join(brain.CONFIGURATIONS["tiny"]),
        "most": 1,
    }

    def prepare(self, sizes: Mapping[str, Any]) -> None:
        """The dataset."""
        brain.workspace(sizes["data"])

    def cases(self, sizes: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Both with each number of workers, `most` at most."""
        cores = min(len(os.sched_getaffinity(0)), sizes["most"])
        same = {"data": sizes["data"], "each": sizes["each"]}
        return [
            {"contestant": contestant, "configuration": configuration, "workers": workers, **same}
            for configuration in sizes["configurations"].split(",")
            for workers in worker_counts(cores)
            for contestant in chosen(sizes["contestants"])
        ]

    def measure(self, number: int, **case: Any) -> list[Row]:
        """Take batches as fast as they come."""
        torch.set_num_threads(1)
        workers, batches = case["workers"], case["workers"] * case["each"]
        loader = brain.loader(case["data"], case["configuration"])
        running = PEERS[case["contestant"]](loader, workers, _CACHED)
        for _ in range(workers + 2 * _CACHED):
            next(running)
        started = time.monotonic()
        for _ in range(batches):
            next(running)
        per_s = batches / (time.monotonic() - started)
        running.close()
        return [Row(case["contestant"], number, case["configuration"], workers, batches, round(per_s, 4))]

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """A table for each configuration: a line for each number of workers."""
        tables = []
        names = list(dict.fromkeys(row.contestant for row in rows))
        for configuration in dict.fromkeys(row.configuration for row in rows):
            lines = []
            for workers in sorted({row.workers for row in rows}):
                cells = []
                for name in names:
                    of = {"configuration": configuration, "workers": workers}
                    rate = median(rows, "batches_per_s", contestant=name, **of)
                    alone = median(rows, "batches_per_s", contestant=name, configuration=configuration, workers=1)
                    cells += [f"{rate:.2f}", f"{rate / (alone * workers):.0%}"]
                    if name != "stock":
                        cells.append(times(rate, median(rows, "batches_per_s", contestant="stock", **of)))
                lines.append((str(workers), *cells))
            header = ["workers"]
            for name in names:
                header += [f"{name}, batches/s", "of ideal", *(["of stock"] if name != "stock" else [])]
            title = f"nnU-Net's {configuration} loader (median; ideal: as many times its own rate with one worker)"
            tables.append(Table(title, tuple(header), tuple(lines)))
        return tables

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        """A line for each contestant, and the ideal one of the stock class."""
        configurations = list(dict.fromkeys(row.configuration for row in rows))
        counts = sorted({row.workers for row in rows})
        for axes, configuration in zip(
            figure.subplots(1, len(configurations), squeeze=False)[0], configurations, strict=True
        ):
            for name in dict.fromkeys(row.contestant for row in rows):
                own = [row for row in rows if (row.contestant, row.configuration) == (name, configuration)]
                medians = [median(own, "batches_per_s", workers=workers) for workers in counts]
                axes.plot(counts, medians, color=colour(name), label=name)
                axes.plot(
                    [row.workers for row in own], [row.batches_per_s for row in own], "o", color=colour(name), ms=3
                )
                if name == "stock":
                    ideal = [medians[0] * workers for workers in counts]
                    axes.plot(counts, ideal, ":", color="#1b1f24", label="ideal, from stock's one worker")
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_xticks(counts, [str(workers) for workers in counts])
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_xlabel("workers")
            axes.set_ylabel("batches/s")
            axes.set_title(configuration, fontsize=9)
            axes.legend(frameon=False)
            tidy(axes)
        figure.suptitle("nnU-Net's own loader with more workers (more is better)")


if __name__ == "__main__":
    sys.exit(Scaling().main())
