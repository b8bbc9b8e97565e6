"""What a fixed order and a seed for each batch cost, beside first come, first served.

    python -m benchmarks.ordering [--rounds 5] [--batches 500] [--workers 12] [--spreads 1,10,100] [--paces 0.9,2]

The stock class gives batches as they come; SafeLoader gives them in the order of their tickets, so one that takes long
holds up those behind it, as far as the ring does not absorb that. The workers only wait (they share no core), for times
that vary: all the same, tenfold or a hundredfold, drawn log-uniformly with the same mean. (nnU-Net's 3d_fullres batches
vary twentyfold.) The consumer trains on each batch for so long that it needs a share of what the workers can make, its
pace: at 0.9 it is the limit, and what it has waited can't be made up for; at 2 the workers are.

`of_possible` is the throughput as a part of what so many workers can make (workers / mean time) or of what the consumer
needs, whichever is less. Seeding is measured by itself, once, over the loader of a small nnU-Net kind.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from batchgenerators.dataloading.data_loader import DataLoader
from matplotlib.figure import Figure

from benchmarks.common import Benchmark, Size, Table, median, times
from benchmarks.peers import PEERS
from benchmarks.plots import colour, tidy
from safeloader.pool.owned import OwnedGenerators
from safeloader.pool.seeding import seed_everything

MEAN_S = 0.2
_CACHED = 6
_CONTESTANTS = ("stock", "safeloader")
_SEEDED = 2000


@dataclass(frozen=True)
class Row:
    """One measurement; `pace` and `of_possible` are what the module says."""

    contestant: str
    round: int
    spread: int
    pace: float
    workers: int
    batches: int
    batches_per_s: float
    of_possible: float
    longest_wait_s: float


class Uneven(DataLoader):  # type: ignore[misc]  # batchgenerators has no types
    """An infinite loader whose batches take times that vary `spread`-fold around `MEAN_S`."""

    def __init__(self, spread: int) -> None:
        super().__init__(None, 2, infinite=True)
        self.indices = [f"case_{number:03d}" for number in range(100)]
        self.spread = spread

    def generate_train_batch(self) -> dict[str, Any]:
        """Wait, and say which cases it would have been."""
        time.sleep(_seconds(self.spread, np.random.random()))
        return {"keys": self.get_indices()}


def _seconds(spread: int, chance: float) -> float:
    """Log-uniform between s and s x spread, where s makes the mean `MEAN_S`."""
    if spread == 1:
        return MEAN_S
    shortest = MEAN_S * math.log(spread) / (spread - 1)
    return shortest * math.exp(chance * math.log(spread))


def seeding_us() -> dict[str, float]:
    """Microseconds per ticket for the global generators and for the loader's (one), and per worker to find that."""
    loader = Uneven(1)
    started = time.perf_counter()
    owned = OwnedGenerators(loader, None)
    found = time.perf_counter()
    for ticket in range(_SEEDED):
        seed_everything(7, 0, ticket)
    seeded = time.perf_counter()
    for ticket in range(_SEEDED):
        owned.seed(7, 0, ticket, 0)
    ended = time.perf_counter()
    return {
        "seeding_global_us_per_ticket": round(1e6 * (seeded - found) / _SEEDED, 1),
        "seeding_owned_us_per_ticket": round(1e6 * (ended - seeded) / _SEEDED, 1),
        "finding_owned_us_per_worker": round(1e6 * (found - started), 1),
    }


def _train(running: Any, batches: int, train_s: float) -> list[float]:
    """How long each batch was waited for, in seconds, where training on one takes so long."""
    waits = []
    for _ in range(batches):
        begun = time.monotonic()
        next(running)
        waits.append(time.monotonic() - begun)
        time.sleep(train_s)
    return waits


def _spreads(rows: Sequence[Row]) -> list[int]:
    return sorted({row.spread for row in rows})


def _paces(rows: Sequence[Row]) -> list[float]:
    return sorted({row.pace for row in rows})


class Ordering(Benchmark[Row]):
    """See the module."""

    name = "ordering"
    row = Row
    full: ClassVar[Mapping[str, Size]] = {
        "rounds": 5,
        "batches": 500,
        "warm_up": 100,
        "workers": 12,
        "spreads": "1,10,100",
        "paces": "0.9,2",
    }
    tiny: ClassVar[Mapping[str, Size]] = {
        "rounds": 1, "batches": 8, "warm_up": 4, "workers": 2, "spreads": "10", "paces": "2",
    }  # fmt: skip

    def cases(self, sizes: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Both, for each pace and spread."""
        counts = {name: sizes[name] for name in ("workers", "batches", "warm_up")}
        return [
            {"contestant": name, "spread": int(spread), "pace": float(pace), **counts}
            for pace in sizes["paces"].split(",")
            for spread in sizes["spreads"].split(",")
            for name in _CONTESTANTS
        ]

    def measure(self, number: int, **case: Any) -> list[Row]:
        """Train at that pace."""
        batches, workers = case["batches"], case["workers"]
        train_s = MEAN_S / workers / case["pace"]
        running = PEERS[case["contestant"]](Uneven(case["spread"]), workers, _CACHED)
        _train(running, case["warm_up"], train_s)
        started = time.monotonic()
        waits = _train(running, batches, train_s)
        per_s = batches / (time.monotonic() - started)
        running.close()
        return [
            Row(
                contestant=case["contestant"],
                round=number,
                spread=case["spread"],
                pace=case["pace"],
                workers=workers,
                batches=batches,
                batches_per_s=round(per_s, 1),
                of_possible=round(per_s * MEAN_S / workers / min(1.0, case["pace"]), 4),
                longest_wait_s=round(max(waits), 3),
            )
        ]

    def more(self, sizes: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """What seeding costs."""
        return seeding_us()

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """A line for each pace and spread."""
        lines = []
        for pace in _paces(rows):
            for spread in _spreads(rows):
                rates, possible, waits = (
                    [median(rows, column, contestant=name, spread=spread, pace=pace) for name in _CONTESTANTS]
                    for column in ("batches_per_s", "of_possible", "longest_wait_s")
                )
                in_words = f"all {MEAN_S} s" if spread == 1 else f"vary {spread}-fold"
                shares = (f"{share:.0%}" for share in possible)
                longest = (f"{wait:.2f}" for wait in waits)
                cells = (*(f"{rate:.1f}" for rate in rates), times(rates[1], rates[0]), *shares, *longest)
                lines.append((f"{pace:.0%}", in_words, *cells))
        title = (
            f"A fixed order: {rows[0].workers} workers that wait, and a consumer that needs a share of what they can "
            "make (median). Possible: what they can make, or what it needs, if that is less"
        )
        header = (
            "needed",
            "times of batches",
            "stock, batches/s",
            "safeloader, batches/s",
            "of stock",
            "stock, of possible",
            "safeloader, of possible",
            "stock's longest wait, s",
            "safeloader's, s",
        )
        return [Table(title, header, tuple(lines))]

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        """Throughput over the spread, each round a dot; a panel for each pace."""
        paces, spreads = _paces(rows), _spreads(rows)
        panels = figure.subplots(1, len(paces), sharey=True, squeeze=False)[0]
        for axes, pace in zip(panels, paces, strict=True):
            for name in _CONTESTANTS:
                own = [row for row in rows if (row.contestant, row.pace) == (name, pace)]
                axes.plot(
                    spreads, [median(own, "of_possible", spread=s) for s in spreads], color=colour(name), label=name
                )
                axes.plot([row.spread for row in own], [row.of_possible for row in own], "o", color=colour(name), ms=3)
            axes.set_xscale("log")
            axes.set_xticks(spreads, [f"{spread} ×" for spread in spreads])
            axes.set_ylim(0, 1.1)
            axes.set_xlabel("longest by shortest time of a batch")
            axes.set_title(f"needed: {pace:.0%} of what workers can make", fontsize=9)
            tidy(axes)
        panels[0].set_ylabel("throughput, of what is possible")
        panels[0].legend(frameon=False)
        figure.suptitle(f"A fixed order beside first come, first served, {rows[0].workers} workers")


if __name__ == "__main__":
    sys.exit(Ordering().main())
