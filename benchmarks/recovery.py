"""How long a kill is felt: by a consumer with batches in store, by the pool, and by a consumer that waits.

    python -m benchmarks.recovery [--rounds 5] [--takes 1000] [--kills 20] [--workers 2] [--loads 3d_fullres,2d]

Three measurements, each a distribution:

* A full ring. Batches of 26 MB that cost no work but their transport; the consumer takes one every 50 ms, so the ring
  is always full. How long `next()` takes, without kills, and with a SIGKILL to a worker between every 10th take and the
  one before it, at a random moment.
* A replacement. A worker that is at work gets a SIGKILL; from then to the moment at which `workers()` shows its
  successor's pid (forked), and at which it is ready for work. Then its first batch, as the worker itself times it,
  beside the same ticket's (so the same random numbers and cases) in a pool without kills.
* A lost batch. The worker that makes the very batch that the consumer wants next gets a SIGKILL: how much longer than
  making it once more the consumer waits.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks import loads
from benchmarks.common import Benchmark, Size, Table
from benchmarks.peers import safeloader, stock
from benchmarks.plots import colour, tidy
from benchmarks.series import join, percentile, split
from benchmarks.transport import Constant
from benchmarks.watch import CACHED, PACE_S, Paced, Watch

_WARM_UP: Final = 30
"""Batches that the paced consumer takes first: every slot has been filled by then."""
_PACED: Final = "full ring"
_FAULT_FREE: Final = "safeloader"
_KILLS: Final = "safeloader, kills"
_STOCK: Final = "stock"
_ALLOWANCE_MS: Final = 1.0
_READY_MS: Final = 100.0
_TARGET: Final = "#cf222e"


@dataclass(frozen=True)
class Row:
    """One distribution.

    Attributes:
        quantity: what, with its unit: "next_ms", "forked_ms", "ready_ms", "late_ms", "first_batch_ms",
            "usual_batch_ms", and the ratios (see `_ratios`) "first_of_usual" and "later_of_usual".
        load: what the workers do. values: all of them, in order of time, separated by spaces.
    """

    contestant: str
    quantity: str
    load: str
    round: int
    workers: int
    kills: int
    values: str = field(repr=False)


def _ratios(made_s: Mapping[int, float], usual_s: Mapping[int, float]) -> list[float]:
    """What each ticket took, as a multiple of what the same ticket took in the pool without kills.

    A ticket's random numbers and cases are the same in both, so what differs is the worker: a new one, or a used one.
    """
    return [made_s[ticket] / usual_s[ticket] for ticket in sorted(made_s.keys() & usual_s.keys())]


class Recovery(Benchmark[Row]):
    """See the module."""

    name = "recovery"
    row = Row
    full: ClassVar[Mapping[str, Size]] = {
        "rounds": 5, "takes": 1000, "kills": 20, "workers": 2, "loads": "3d_fullres,2d",
    }  # fmt: skip
    tiny: ClassVar[Mapping[str, Size]] = {"rounds": 1, "takes": 10, "kills": 2, "loads": "burn"}

    def prepare(self, sizes: Mapping[str, Any]) -> None:
        """The datasets."""
        loads.prepare(loads.names(sizes["loads"]))

    def cases(self, sizes: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The paced consumers in turn, then each load."""
        paced = [
            {"contestant": contestant, "load": _PACED, "workers": sizes["workers"], "count": sizes["takes"]}
            for contestant in (_STOCK, _FAULT_FREE, _KILLS)
        ]
        replaced = [
            {"contestant": _KILLS, "load": load, "workers": sizes["workers"], "count": sizes["kills"]}
            for load in loads.names(sizes["loads"])
        ]
        return [*paced, *replaced]

    def measure(self, number: int, **case: Any) -> list[Row]:
        """One of the measurements."""
        torch.set_num_threads(1)
        measure = _measure_paced if case["load"] == _PACED else _measure_replacements
        found, kills = measure(case["contestant"], case["load"], case["workers"], case["count"], number)
        return [
            Row(case["contestant"], quantity, case["load"], number, case["workers"], kills, join(values))
            for quantity, values in found.items()
        ]

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """A table for each measurement."""
        return [_next_table(rows), _kill_table(rows), _first_table(rows)]

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        """The share of values that are at most so large, for each."""
        left, middle, right = figure.subplots(1, 3)
        for contestant in (_STOCK, _FAULT_FREE, _KILLS):
            line = "--" if contestant == _FAULT_FREE else "-"
            values = values_of(rows, "next_ms", contestant=contestant)
            _ecdf(left, values, contestant, complementary=True, color=colour(contestant), ls=line)
        left.set(xscale="log", yscale="log", xlabel="ms for next(), the ring is full", ylabel="share that takes longer")
        left.xaxis.set_minor_formatter(NullFormatter())  # between 1 and 10 the labels would lie on each other
        for quantity, label in _AFTER_KILL.items():
            _ecdf(middle, values_of(rows, quantity), label)
        middle.set(xlabel="ms after the kill", ylabel="share that takes at most so long")
        for load in _loads(rows):
            _ecdf(right, values_of(rows, "first_of_usual", load=load), f"first batch, {loads.title(load)}")
            _ecdf(right, values_of(rows, "later_of_usual", load=load), f"later ones, {loads.title(load)}", ls=":")
        middle.axvline(_READY_MS, color=_TARGET, lw=0.8)
        right.axvline(1.5, color=_TARGET, lw=0.8)
        right.set(xlabel="time for a batch / without kills")
        for axes in (left, middle, right):
            axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(0, -0.15), frameon=False)  # below: all is full
            tidy(axes)


_AFTER_KILL: Final = {
    "forked_ms": "the next worker is forked",
    "ready_ms": "it is ready",
    "late_ms": "the lost batch comes, beyond making it",
}


def _measure_paced(contestant: str, _: str, workers: int, takes: int, seed: int) -> tuple[dict[str, list[float]], int]:
    running = stock(Constant(), workers, CACHED) if contestant == _STOCK else safeloader(Constant(), workers, CACHED)
    for _number in range(_WARM_UP):
        next(running)
    paced = Paced(running.batches, seed)
    took_ms = paced.take(takes, kill=contestant == _KILLS)
    running.close()
    return {"next_ms": took_ms}, paced.kills


def _measure_replacements(_: str, load: str, workers: int, kills: int, seed: int) -> tuple[dict[str, list[float]], int]:
    rng = random.Random(seed)
    forked_ms, ready_ms, late_ms = [], [], []
    with contextlib.closing(Watch(loads.make(load), workers, seed)) as watch:
        for kill in range(kills):
            if kill % 2:
                late = watch.lose()
                late_ms += [] if late is None else [late]
            else:
                forked, ready = watch.replace(rng)
                forked_ms.append(forked)
                ready_ms.append(ready)
        last = watch.ticket + 2 * workers  # the last replacement's first batch is among these: it was lost
        while watch.ticket < last:
            watch.take()
    with contextlib.closing(Watch(loads.make(load), workers, seed)) as usual:
        while usual.ticket < last:
            usual.take()
    found = {
        "forked_ms": forked_ms,
        "ready_ms": ready_ms,
        "late_ms": late_ms,
        "first_batch_ms": [1000 * seconds for seconds in watch.first_s.values()],
        "usual_batch_ms": [1000 * seconds for seconds in usual.later_s.values()],
        "first_of_usual": _ratios(watch.first_s, usual.later_s),
        "later_of_usual": _ratios(watch.later_s, usual.later_s),
    }
    return found, kills


def values_of(rows: Sequence[Row], quantity: str, **which: Any) -> list[float]:
    """All rounds' values."""
    chosen = [row for row in rows if all(getattr(row, name) == value for name, value in which.items())]
    return [value for row in chosen if row.quantity == quantity for value in split(row.values)]


def beyond(rows: Sequence[Row], contestant: str) -> int:
    """How many `next()` took longer than the 99th percentile of ours without kills in the same round, and 1 ms."""
    limits_ms = {
        row.round: percentile(split(row.values), 99) + _ALLOWANCE_MS
        for row in rows
        if (row.contestant, row.quantity) == (_FAULT_FREE, "next_ms")
    }
    chosen = [row for row in rows if (row.contestant, row.quantity) == (contestant, "next_ms")]
    return sum(value > limits_ms[row.round] for row in chosen for value in split(row.values))


def _loads(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.load for row in rows if row.load != _PACED))


def _next_table(rows: Sequence[Row]) -> Table:
    lines = []
    for contestant in (_STOCK, _FAULT_FREE, _KILLS):
        values = values_of(rows, "next_ms", contestant=contestant)
        kills = sum(row.kills for row in rows if (row.contestant, row.load) == (contestant, _PACED))
        figures = [f"{percentile(values, percent):.2f}" for percent in (50, 99, 99.9, 100)]
        lines.append((contestant, str(kills), str(len(values)), *figures, str(beyond(rows, contestant))))
    title = (
        f"ms for next() with a full ring. A batch is taken every {1000 * PACE_S:g} ms, {rows[0].workers} workers. "
        "Beyond: longer than the 99th percentile of safeloader without kills in the same round, and 1 ms. (The stock "
        "class ends with the first kill.)"
    )
    return Table(title, ("", "kills", "next()", "p50", "p99", "p99.9", "longest", "beyond"), tuple(lines))


def _kill_table(rows: Sequence[Row]) -> Table:
    lines = []
    for load in _loads(rows):
        for quantity, label in _AFTER_KILL.items():
            values = values_of(rows, quantity, load=load)
            figures = [f"{percentile(values, percent):.1f}" for percent in (50, 90, 99, 100)]
            in_time = f"{sum(value <= _READY_MS for value in values)} of {len(values)}"
            lines.append((loads.title(load), label, *figures, in_time))
    title = "After a SIGKILL to a worker at work: ms until"
    return Table(title, ("load", "", "p50", "p90", "p99", "longest", f"within {_READY_MS:g} ms"), tuple(lines))


def _first_table(rows: Sequence[Row]) -> Table:
    lines = []
    for load in _loads(rows):
        first, later = (values_of(rows, quantity, load=load) for quantity in ("first_of_usual", "later_of_usual"))
        first_ms, usual_ms = (values_of(rows, quantity, load=load) for quantity in ("first_batch_ms", "usual_batch_ms"))
        of_later = f"{percentile(first, 50) / percentile(later, 50):.2f} ×"
        lines += [
            (loads.title(load), "a replacement's first", *_of_usual(first_ms, first), of_later),
            (loads.title(load), "later ones", *_of_usual([], later), "1"),
            (loads.title(load), "without kills", *_of_usual(usual_ms, []), "–"),
        ]
    title = (
        "What a worker takes for a batch, by its own clock: the median in ms; and each as a multiple of what the same "
        "ticket (the same cases and random numbers) takes in a pool without kills, run afterwards. The later ones "
        "show how much faster or slower the machine itself was meanwhile; the last column is free of that"
    )
    header = ("load", "batches", "number", "ms", "of the same ticket", "p90", "largest", "of later ones")
    return Table(title, header, tuple(lines))


def _of_usual(times_ms: Sequence[float], ratios: Sequence[float]) -> tuple[str, ...]:
    """How many, the median in ms, and the ratios' percentiles; "–" for what is not known."""
    typical = f"{percentile(times_ms, 50):.0f}" if times_ms else "–"
    multiples = [f"{percentile(ratios, percent):.2f} ×" for percent in (50, 90, 100)] if ratios else ["–"] * 3
    return str(len(ratios or times_ms)), typical, *multiples


def _ecdf(axes: Axes, values: Sequence[float], label: str, **style: Any) -> None:
    """The share of the values that are at most so large; nothing of none."""
    if values:
        axes.ecdf(values, label=label, **style)


if __name__ == "__main__":
    sys.exit(Recovery().main())
