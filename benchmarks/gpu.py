"""On a GPU: how fast batches get to it from memory of each kind, and what nnU-Net's epochs take.

    python -m benchmarks.gpu [--rounds 5] [--copy_rounds 5] [--epoch_rounds 5] [--workers 12] [--epochs 5]

* To the device: batches of 26 MB, copied with `non_blocking=True`. From pageable memory; from ordinary pinned memory,
  which is the bound; from the stock class, which copies each batch into pinned memory first; from SafeLoader, which
  does the same (`pin="copy"`), or has registered its slots with CUDA (`pin="register"`), so that nothing is copied.
* Epochs of real trainings on real data: nnU-Net's default trainer, and its own `nnUNetTrainerBenchmark_5epochs`, each
  with its stock loader and with SafeLoader; and `nnUNetTrainerBenchmark_5epochs_noDataLoading`, which no loader can
  beat. All with as many workers, and with nnU-Net's own lengths: 250 batches trained on, 50 validated on. `--trainers
  "stock, benchmark;safeloader, benchmark"` runs some of them only.

It uses the first GPU that torch finds, and names it. `--device cpu --tiny` trains a tiny network on the CPU instead,
only to see that it runs: a CPU is no bound for a loader.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import torch
from matplotlib.figure import Figure

from benchmarks import epochs, h2d, loads
from benchmarks.common import Benchmark, Size, Table, median, times
from benchmarks.plots import bars
from safeloader.faults.cpus import available_cpus
from safeloader.nnunet.workspace import SMALL_CONFIGURATION

_H2D: Final = "to device"
_EPOCH: Final = "epoch"
_COPY_WORKERS: Final = 2
_BOUND: Final = "no data loading"
_TRAINERS: Final[Mapping[str, Sequence[str]]] = {"cuda": tuple(epochs.TRAINERS), "cpu": epochs.ON_CPU}
_UNLIKE: Final = 1
"""Epochs at the beginning that are left out of medians: kernels are compiled and chosen in them."""


@dataclass(frozen=True)
class Row:
    """One measurement of copies, or one epoch.

    Attributes:
        part: "to device" or "epoch". device: the GPU's name. load: "26 MB batches", or the configuration.
        pinned: share of the batch's tensors that torch takes for pinned.
        gb_per_s: the copies alone. all_gb_per_s: by the wall clock, with `next()`.
        trainer_cpu_ms_per_batch: of a batch that is taken, pinned and dropped.
        epoch: from 0. epoch_s: what nnU-Net says that it took.
    """

    part: str
    contestant: str
    load: str
    round: int
    device: str
    workers: int
    pinned: float | None = None
    gb_per_s: float | None = None
    all_gb_per_s: float | None = None
    trainer_cpu_ms_per_batch: float | None = None
    epoch: float | None = None
    epoch_s: float | None = None


class Gpu(Benchmark[Row]):
    """See the module."""

    name = "gpu"
    row = Row
    full: ClassVar[Mapping[str, Size]] = {
        "rounds": 5, "device": "cuda", "copy_rounds": 5, "batches": 300, "workers": 12, "configurations": "3d_fullres",
        "epoch_rounds": 5, "trainers": "", "epochs": 5, "iterations": 250, "val_iterations": 50,
    }  # fmt: skip
    tiny: ClassVar[Mapping[str, Size]] = {
        "rounds": 1, "copy_rounds": 1, "batches": 5, "workers": 2, "configurations": SMALL_CONFIGURATION,
        "epoch_rounds": 1, "trainers": "", "epochs": 2, "iterations": 3, "val_iterations": 1,
    }  # fmt: skip
    _device = "cuda"

    def main(self, argv: Sequence[str] | None = None) -> int:
        """The device decides whether it can be run here, so it is read first."""
        parser = argparse.ArgumentParser(add_help=False)
        parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
        self._device = parser.parse_known_args(argv)[0].device
        return super().main(argv)

    def missing(self) -> str | None:
        """A GPU, unless it is not asked for."""
        return None if self._device == "cpu" or torch.cuda.is_available() else "torch finds no GPU"

    def prepare(self, sizes: Mapping[str, Any]) -> None:
        """The datasets."""
        loads.prepare(loads.names(sizes["configurations"]))

    def cases(self, sizes: Mapping[str, Any]) -> list[dict[str, Any]]:
        """All sources of copies, then all trainers."""
        device = sizes["device"]
        sources = h2d.ON_CUDA if device == "cuda" else h2d.ON_CPU
        trainers = sizes["trainers"].split(";") if sizes["trainers"] else _TRAINERS[device]
        workers = min(sizes["workers"], available_cpus().cpus)
        length = [sizes[name] for name in ("epochs", "iterations", "val_iterations")]
        copies = [
            {
                "part": _H2D,
                "contestant": source,
                "device": device,
                "workers": _COPY_WORKERS,
                "batches": sizes["batches"],
                "rounds": sizes["copy_rounds"],
            }
            for source in sources
        ]
        trainings = [
            {
                "part": _EPOCH,
                "contestant": trainer,
                "load": load,
                "device": device,
                "workers": workers,
                "length": length,
                "rounds": sizes["epoch_rounds"],
            }
            for load in loads.names(sizes["configurations"])
            for trainer in trainers
        ]
        return [*copies, *trainings]

    def measure(self, number: int, **case: Any) -> list[Row]:
        """Copy, or train."""
        device = case["device"]
        name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        if case["part"] == _H2D:
            torch.set_num_threads(1)
            found = h2d.measure(case["contestant"], torch.device(device), case["batches"], case["workers"])
            return [
                Row(
                    part=_H2D,
                    contestant=case["contestant"],
                    load=f"{found.batch_mb:.0f} MB batches",
                    round=number,
                    device=name,
                    workers=case["workers"],
                    pinned=round(found.pinned, 3),
                    gb_per_s=round(found.gb_per_s, 3),
                    all_gb_per_s=round(found.all_gb_per_s, 3),
                    trainer_cpu_ms_per_batch=round(found.cpu_ms, 3),
                )
            ]
        took_s = epochs.train(case["contestant"], case["load"], device, case["workers"], epochs.Length(*case["length"]))
        return [
            Row(_EPOCH, case["contestant"], case["load"], number, name, case["workers"], epoch=epoch, epoch_s=seconds)
            for epoch, seconds in enumerate(took_s)
        ]

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """Copies, then the epochs of each configuration with so many workers."""
        copies = [row for row in rows if row.part == _H2D]
        return [*([_copies(copies)] if copies else []), *(_epochs(rows, *panel) for panel in _panels(rows))]

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        """Rates of the copies; seconds per epoch, each round's median a dot."""
        copies = [row for row in rows if row.part == _H2D]
        contestants = dict.fromkeys(row.contestant for row in copies)
        rates = {name: [row.gb_per_s or 0.0 for row in copies if row.contestant == name] for name in contestants}
        panels = [("", "GB/s to the device (more is better)", rates)] if copies else []
        for load, workers in _panels(rows):
            title = f"nnU-Net {load}, {workers} workers"
            panels.append((title, "s per epoch (less is better)", _epoch_medians(rows, load, workers)))
        lines = -(-len(panels) // 2)
        figure.set_size_inches(9, 2.8 * lines)
        for at, (title, label, values) in enumerate(panels, start=1):
            axes = figure.add_subplot(lines, 2, at)
            bars(axes, values, label)
            axes.set_title(title, fontsize=9)
        figure.suptitle(rows[0].device)


def _copies(rows: Sequence[Row]) -> Table:
    bound = median(rows, "gb_per_s", contestant=h2d.PINNED)
    lines = []
    for contestant in dict.fromkeys(row.contestant for row in rows):
        rate, all_rate, pinned, cpu_ms = (
            median(rows, column, contestant=contestant)
            for column in ("gb_per_s", "all_gb_per_s", "pinned", "trainer_cpu_ms_per_batch")
        )
        of_bound = f"{rate / bound:.0%}" if bound == bound else "–"
        memory = contestant in (h2d.PAGEABLE, h2d.PINNED)  # the same batch again and again: no loader is behind it
        taking = ("–", "–") if memory else (f"{all_rate:.2f}", f"{cpu_ms:.2f}")
        lines.append((contestant, f"{pinned:.0%}", f"{rate:.2f}", of_bound, *taking))
    title = (
        f"Copies of {rows[0].load} to {rows[0].device}, {rows[0].workers} workers (median). With next(): by the wall "
        "clock, with taking the batch from the loader. CPU: the trainer's, for a batch that is taken, pinned, dropped"
    )
    header = ("from", "pinned", "GB/s", "of pinned memory", "GB/s with next()", "CPU, ms/batch")
    return Table(title, header, tuple(lines))


def _panels(rows: Sequence[Row]) -> list[tuple[str, int]]:
    """Configurations and numbers of workers whose epochs are compared; without data loading there are no workers."""
    return list(
        dict.fromkeys((row.load, row.workers) for row in rows if row.part == _EPOCH and row.contestant != _BOUND)
    )


def _epochs_of(rows: Sequence[Row], load: str, workers: int) -> list[Row]:
    every = [row for row in rows if (row.part, row.load) == (_EPOCH, load)]
    chosen = [row for row in every if row.contestant == _BOUND or row.workers == workers]
    return sorted(chosen, key=lambda row: tuple(epochs.TRAINERS).index(row.contestant))


def _epoch_medians(rows: Sequence[Row], load: str, workers: int) -> dict[str, list[float]]:
    """By contestant, each round's median epoch, without the first."""
    chosen = _epochs_of(rows, load, workers)
    return {
        contestant: [
            median([row for row in chosen if row.epoch is not None and row.epoch >= _UNLIKE], "epoch_s",
                   contestant=contestant, round=number)
            for number in dict.fromkeys(row.round for row in chosen if row.contestant == contestant)
        ]
        for contestant in dict.fromkeys(row.contestant for row in chosen)
    }  # fmt: skip


def _epochs(rows: Sequence[Row], load: str, workers: int) -> Table:
    chosen = _epochs_of(rows, load, workers)
    later = [row for row in chosen if row.epoch is not None and row.epoch >= _UNLIKE]
    bound = median(later, "epoch_s", contestant=_BOUND)
    lines = []
    for contestant in dict.fromkeys(row.contestant for row in chosen):
        # The same trainer's with the stock loader.
        twin = contestant.replace("safeloader", "stock")
        seconds = median(later, "epoch_s", contestant=contestant)
        fastest = min(row.epoch_s for row in chosen if row.contestant == contestant and row.epoch_s is not None)
        of_stock = "–" if contestant == _BOUND else times(seconds, median(later, "epoch_s", contestant=twin))
        of_bound = times(seconds, bound) if bound == bound else "–"
        number = sum(row.contestant == contestant for row in later)
        lines.append((contestant, str(number), f"{seconds:.2f}", f"{fastest:.2f}", of_stock, of_bound))
    title = (
        f"nnU-Net {load} on {chosen[0].device}, {workers} training workers: seconds per epoch. Median: "
        "without each training's first; fastest: what nnU-Net's own benchmark reports. Benchmark: its "
        "nnUNetTrainerBenchmark_5epochs, and no data loading: that one's _noDataLoading"
    )
    header = ("", "epochs", "median", "fastest", "of the stock loader", "of no data loading")
    return Table(title, header, tuple(lines))


if __name__ == "__main__":
    sys.exit(Gpu().main())
