"""What a fixed order and a seed for each batch cost, beside first come, first served.

    python -m benchmarks.ordering [--rounds 5] [--batches 500] [--workers 12] [--out benchmarks/results]

The stock class gives batches as they come; SafeLoader gives them in the order of their tickets, so one that takes long
holds up those behind it, as far as the ring does not absorb that. The workers only wait (they share no core), for times
that vary: all the same, tenfold or a hundredfold, drawn log-uniformly with the same mean. The consumer takes batches
as fast as it gets them, which is the worst case: a training that is slower than its workers never notices.

`of_possible` is the throughput as a part of what so many workers can make: workers / mean time. Each measurement is a
fresh process; the contestants take turns. Seeding is measured by itself, over the loader of a small nnU-Net kind.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from batchgenerators.dataloading.data_loader import DataLoader
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter

from benchmarks.common import in_a_fresh_process, write
from safeloader import SafeAugmenter
from safeloader.pool.owned import OwnedGenerators
from safeloader.pool.seeding import seed_everything

MEAN_S = 0.2
SPREADS = (1, 10, 100)
CACHED = 6
_WARM_UP = 100
_SEEDED = 2000


@dataclass(frozen=True)
class Row:
    """One measurement: the CSV's columns, with units."""

    contestant: str
    round: int
    spread: int
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


CONTESTANTS: dict[str, Callable[[Any, int], Any]] = {
    "stock": lambda loader, workers: NonDetMultiThreadedAugmenter(loader, None, workers, CACHED, None, False, 0.002),
    "safeloader": lambda loader, workers: SafeAugmenter(loader, None, workers, CACHED, None, False, 0.002),
}


def measure(contestant: str, number: int, spread: int, workers: int, batches: int) -> Row:
    """One measurement, in this process."""
    augmenter = CONTESTANTS[contestant](Uneven(spread), workers)
    for _ in range(_WARM_UP):
        next(augmenter)
    waits, started = [], time.monotonic()
    for _ in range(batches):
        begun = time.monotonic()
        next(augmenter)
        waits.append(time.monotonic() - begun)
    per_s = batches / (time.monotonic() - started)
    augmenter._finish()
    return Row(
        contestant=contestant,
        round=number,
        spread=spread,
        workers=workers,
        batches=batches,
        batches_per_s=round(per_s, 1),
        of_possible=round(per_s * MEAN_S / workers, 4),
        longest_wait_s=round(max(waits), 3),
    )


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run all rounds, print a table, write CSV and JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=500)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--one", nargs=3, metavar=("CONTESTANT", "ROUND", "SPREAD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        contestant, number, spread = arguments.one
        row = measure(contestant, int(number), int(spread), arguments.workers, arguments.batches)
        print(json.dumps(asdict(row)))
        return 0

    options = ["--workers", str(arguments.workers), "--batches", str(arguments.batches)]
    rows: list[Row] = []
    for number, spread, contestant in itertools.product(range(arguments.rounds), SPREADS, CONTESTANTS):
        one = in_a_fresh_process("ordering", "--one", contestant, str(number), str(spread), *options)
        rows.append(Row(**one))
        print(rows[-1])

    def median(contestant: str, spread: int, column: str) -> float:
        chosen = [row for row in rows if (row.contestant, row.spread) == (contestant, spread)]
        return statistics.median(float(getattr(row, column)) for row in chosen)

    print(f"\nmedian of {arguments.rounds} rounds, {arguments.workers} workers, {CACHED} cached, {MEAN_S} s a batch")
    for spread in SPREADS:
        stock, safe = (median(contestant, spread, "batches_per_s") for contestant in CONTESTANTS)
        parts = (median(contestant, spread, "of_possible") for contestant in CONTESTANTS)
        waits = (median(contestant, spread, "longest_wait_s") for contestant in CONTESTANTS)
        print(
            f"times vary {spread:3}-fold: stock {stock:7.1f} batches/s, safeloader {safe:7.1f}, "
            f"ratio {safe / stock:.3f}; of what is possible {', '.join(f'{part:.3f}' for part in parts)}; "
            f"longest wait {', '.join(f'{wait:.3f} s' for wait in waits)}"
        )
    seeding = seeding_us()
    print(seeding)
    write(arguments.out, "ordering", rows, seeding)
    return 0


if __name__ == "__main__":
    sys.exit(main())
