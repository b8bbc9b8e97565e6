"""Throughput while workers are killed: SafeLoader with and without kills, and the stock class with them.

    python -m benchmarks.chaos [--rounds 5] [--seconds 60] [--kill_every_s 5] [--workers 2] [--loads 3d_fullres,burn]

The consumer takes each batch at once, so the workers' CPU is what bounds. Every so many seconds one that is at work
gets a SIGKILL, the same one in both classes as far as chance goes. What it had done of its batch is lost in any case:
that is measured, too, as a share of all the time that the workers had. It is small where batches are quick or workers
many, and half a batch for each kill on average. Loads: nnU-Net's own loader on real data (`3d_fullres`, `2d`), and
`burn`, a loop that costs 20 ms of CPU for each batch.
"""

from __future__ import annotations

import dataclasses
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import numpy as np
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks import loads
from benchmarks.common import Benchmark, Size, Table, median
from benchmarks.killing import Killer
from benchmarks.plots import bars, by_contestant, colour, tidy
from benchmarks.series import join, split
from safeloader import SafeAugmenter

_CACHED: Final = 6
_WARM_UP_PER_WORKER: Final = 2
"""Batches of each worker before the clock starts: imports and first batches are over by then."""
_HUNG_S: Final = 60.0
"""A consumer that has waited so long for a batch is taken to wait for ever."""
_FAULT_FREE: Final = "safeloader"
_KILLS: Final = "safeloader, kills"
_STOCK: Final = "stock, kills"
_FINISHED: Final = "finished"
_FEW: Final = 20.0
"""Batches per second below which the picture shows means of 10 s instead of 1 s."""


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        seconds: until the last batch.
        kills: how many. worker_time_lost: what the killed had done of their batches, of all workers' time.
        batches_after_first_kill: None without kills. outcome: "finished", the exception's name, or "hung".
        ended_after_kill_s: from the first kill to the exception; None if it finished.
        batches_in_each_s, killed_at_s: the course, separated by spaces.
    """

    contestant: str
    load: str
    round: int
    workers: int
    kill_every_s: float
    seconds: float
    batches: int
    batches_per_s: float
    kills: int
    worker_time_lost: float
    batches_after_first_kill: float | None
    outcome: str
    ended_after_kill_s: float | None
    batches_in_each_s: str = field(repr=False)
    killed_at_s: str = field(repr=False)


class _Hung(BaseException):
    """Not an `Exception`: the stock class would swallow it while it ends its workers."""


@contextmanager
def _patience() -> Iterator[None]:
    """Raise `_Hung` in a block that takes longer than `_HUNG_S`."""

    def give_up(*_: object) -> None:
        raise _Hung

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, _HUNG_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _make(contestant: str, loader: Any, workers: int, seed: int) -> Any:
    """The augmenter, with all its workers at work. Ours makes the same batches with and without kills."""
    if contestant == _STOCK:
        stock = NonDetMultiThreadedAugmenter(loader, None, workers, _CACHED, None, False, 0.002)
        for _ in range(_WARM_UP_PER_WORKER * workers):
            next(stock)
        return stock
    ours = SafeAugmenter(loader, None, workers, _CACHED, None, False, 0.002, seed=seed)
    next(ours)
    while min(worker.batches for worker in ours.workers()) < _WARM_UP_PER_WORKER:
        next(ours)
    return ours


def _take(augmenter: Any, seconds: float, arrivals_s: list[float]) -> str:
    """Take batches for so long, or until that ends by itself; says how it ended."""
    until_s = time.monotonic() + seconds
    try:
        while not arrivals_s or arrivals_s[-1] < until_s:
            with _patience():
                next(augmenter)
            arrivals_s.append(time.monotonic())
    except RuntimeError as error:
        return type(error).__name__
    except _Hung:
        return "hung"
    return _FINISHED


def _end(augmenter: Any, outcome: str) -> None:
    """End the workers; where the stock class hangs, without asking it: it would wait for what the dead one holds."""
    if isinstance(augmenter, SafeAugmenter):
        augmenter.close()
    elif outcome == "hung":
        for process in augmenter._processes:
            process.kill()
        augmenter._processes, augmenter.initialized = [], False
    else:
        augmenter._finish()


class Chaos(Benchmark[Row]):
    """See the module."""

    name = "chaos"
    row = Row
    full: ClassVar[Mapping[str, Size]] = {
        "rounds": 5, "seconds": 60.0, "kill_every_s": 5.0, "workers": 2, "loads": "3d_fullres,burn",
    }  # fmt: skip
    tiny: ClassVar[Mapping[str, Size]] = {"rounds": 1, "seconds": 1.0, "kill_every_s": 0.4, "loads": "burn"}

    def prepare(self, sizes: Mapping[str, Any]) -> None:
        """The datasets."""
        loads.prepare(loads.names(sizes["loads"]))

    def cases(self, sizes: Mapping[str, Any]) -> list[dict[str, Any]]:
        """For each load: ours without kills, ours with them, the stock class with them."""
        same = {name: sizes[name] for name in ("seconds", "kill_every_s", "workers")}
        return [
            {"contestant": contestant, "load": load, **same}
            for load in loads.names(sizes["loads"])
            for contestant in (_FAULT_FREE, _KILLS, _STOCK)
        ]

    def measure(self, number: int, **case: Any) -> list[Row]:
        """Take batches for so many seconds."""
        torch.set_num_threads(1)
        contestant, load, workers = case["contestant"], case["load"], case["workers"]
        augmenter = _make(contestant, loads.make(load), workers, seed=number)
        every_s = 0.0 if contestant == _FAULT_FREE else case["kill_every_s"]
        killer, taken_s = Killer(augmenter, every_s=every_s, seed=number), [time.monotonic()]
        killer.start()
        outcome = _take(augmenter, case["seconds"], taken_s)
        ended_s = time.monotonic()
        killer.end()
        _end(augmenter, outcome)
        begun_s, taken_s = taken_s[0], taken_s[1:]
        seconds = (taken_s or [ended_s])[-1] - begun_s
        row = Row(
            contestant=contestant,
            load=load,
            round=number,
            workers=workers,
            kill_every_s=every_s,
            seconds=round(seconds, 3),
            batches=len(taken_s),
            batches_per_s=round(len(taken_s) / seconds, 4),
            kills=len(killer.kills),
            worker_time_lost=round(sum(kill.lost_s for kill in killer.kills) / (workers * (ended_s - begun_s)), 4),
            batches_after_first_kill=None,
            outcome=outcome,
            ended_after_kill_s=None,
            batches_in_each_s=join(np.bincount([int(at - begun_s) for at in taken_s] or [0]), 0),
            killed_at_s=join((kill.at_s - begun_s for kill in killer.kills), 2),
        )
        if killer.kills:
            first_s = killer.kills[0].at_s
            row = dataclasses.replace(row, batches_after_first_kill=sum(at > first_s for at in taken_s))
            if outcome != _FINISHED:
                row = dataclasses.replace(row, ended_after_kill_s=round(ended_s - first_s, 2))
        return [row]

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """All beside ours without kills."""
        lines = []
        for load, contestant in dict.fromkeys((row.load, row.contestant) for row in rows):
            chosen = [row for row in rows if (row.load, row.contestant) == (load, contestant)]
            kills = sum(row.kills for row in chosen)
            rate = median(chosen, "batches_per_s")
            if contestant == _STOCK:
                figures = ("–", "–", "–")
            elif contestant == _KILLS:
                figures = (
                    f"{rate:.3g}",
                    f"{_of_fault_free(rows, chosen):.1%}",
                    f"{median(chosen, 'worker_time_lost'):.1%}",
                )
            else:
                figures = (f"{rate:.3g}", "100%", "–")
            lines.append((loads.title(load), contestant, str(kills), *figures, _ends(chosen)))
        every_s, workers = max(row.kill_every_s for row in rows), rows[0].workers
        rounds = len({row.round for row in rows})
        title = (
            f"Throughput while one of {workers} workers is killed every {every_s:g} s; median of {rounds} rounds of "
            f"{max(row.seconds for row in rows):.0f} s. Work lost: what the killed had done of their batches, as a "
            "share of all workers' time"
        )
        header = ("load", "", "kills", "batches/s", "of fault-free", "work lost", "rounds")
        return [Table(title, header, tuple(lines))]

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        """Left the course of the last round, right the rates of all."""
        names = list(dict.fromkeys(row.load for row in rows))
        axes = figure.subplots(len(names), 2, width_ratios=(2, 1), squeeze=False)
        for (course, rates), load in zip(axes, names, strict=True):
            of_load = [row for row in rows if row.load == load]
            _draw_course(course, [row for row in of_load if row.round == rows[-1].round])
            course.set_title(loads.title(load), fontsize=9, loc="left")
            finished = [row for row in of_load if row.contestant != _STOCK]
            bars(rates, by_contestant(finished, "batches_per_s"), "batches/s (more is better)")
        figure.suptitle(
            f"A worker is killed every {max(row.kill_every_s for row in rows):g} s, {rows[0].workers} workers"
        )


def _of_fault_free(rows: Sequence[Row], chosen: Sequence[Row]) -> float:
    """The median over the rounds of a contestant's rate as a share of the same round's without kills."""
    fault_free = {(row.load, row.round): row.batches_per_s for row in rows if row.contestant == _FAULT_FREE}
    return statistics.median(row.batches_per_s / fault_free[row.load, row.round] for row in chosen)


def _ends(chosen: Sequence[Row]) -> str:
    """How the rounds ended, as a sentence."""
    outcomes = Counter(row.outcome for row in chosen)
    if list(outcomes) == [_FINISHED]:
        return f"{len(chosen)} of {len(chosen)}: finished"
    words = ", ".join(f"{count} of {len(chosen)}: {outcome}" for outcome, count in outcomes.items())
    after, ended_s = median(chosen, "batches_after_first_kill"), median(chosen, "ended_after_kill_s")
    return f"{words}, {ended_s:.1f} s and {after:.0f} more batches after its first kill"


def _draw_course(axes: Axes, rows: Sequence[Row]) -> None:
    every_s = 1 if max(row.batches_per_s for row in rows) > _FEW else 10
    for row in rows:
        edges_s, rates = _course(row, every_s)
        style = "--" if row.contestant == _FAULT_FREE else "-"
        axes.stairs(rates, edges_s, baseline=None, ls=style, color=colour(row.contestant), label=row.contestant)
        if row.outcome != _FINISHED:
            axes.plot(row.seconds, 0, "x", color=colour(row.contestant), markersize=9, label=f"stock: {row.outcome}")
        elif row.kills:
            killed_s = split(row.killed_at_s)
            axes.plot(killed_s, [0] * len(killed_s), "|", color="#cf222e", markersize=9, label="a kill")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("s")
    axes.set_ylabel("batches/s" if every_s == 1 else f"batches/s (mean of {every_s} s)")
    axes.legend(fontsize=7, loc="center", ncols=2, framealpha=0.7)
    tidy(axes)


def _course(row: Row, every_s: int) -> tuple[list[float], list[float]]:
    """The rates of stretches of about `every_s` seconds, and the stretches' edges: one more."""
    in_each_s = split(row.batches_in_each_s)
    starts = list(range(0, max(1, int(row.seconds)), every_s))
    if len(starts) > 1 and row.seconds - starts[-1] < every_s:
        starts.pop()  # the last stretch is as long as the others, or longer
    ends = [*starts[1:], len(in_each_s)]
    edges_s = [*map(float, starts), max(row.seconds, 0.001)]
    counts = [sum(in_each_s[start:end]) for start, end in zip(starts, ends, strict=True)]
    return edges_s, [count / (end - start) for count, start, end in zip(counts, edges_s, edges_s[1:], strict=False)]


if __name__ == "__main__":
    sys.exit(Chaos().main())
