"""The pictures of a training: what each epoch was like, drawn from a `Story`."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from safeloader.cli.report.story import Epoch, Story

_INK, _MUTED, _GRID = "#1b1f24", "#57606a", "#d0d7de"
_BLUE, _ORANGE, _GREEN, _RED = "#0969da", "#bc4c00", "#1a7f37", "#cf222e"
_SIZE: Final = (9.0, 3.2)
_DPI: Final = 110


def pictures(story: Story) -> Mapping[str, bytes]:
    """PNGs by name; only those for which there are numbers."""
    epochs = story.epochs
    drawn: dict[str, bytes] = {}
    if any(epoch.time_s is not None for epoch in epochs) or any(epoch.wait_s for epoch in epochs):
        drawn["epochs"] = _time(epochs)
    if any(_throughput(epoch) is not None for epoch in epochs):
        drawn["throughput"] = _batches(epochs)
    if any(epoch.dice is not None for epoch in epochs):
        drawn["dice"] = _dice(epochs)
    if any(epoch.trainer_nbytes is not None for epoch in epochs):
        drawn["memory"] = _memory(epochs)
    return drawn


def _time(epochs: Sequence[Epoch]) -> bytes:
    figure, axes = _figure("seconds")
    _line(axes, epochs, [epoch.time_s for epoch in epochs], _BLUE, "epoch time (nnU-Net)")
    _line(axes, epochs, [_sum(epoch.wait_s) for epoch in epochs], _ORANGE, "of it, waiting for batches")
    _mark_restarts(axes, epochs)
    return _png(figure, axes)


def _batches(epochs: Sequence[Epoch]) -> bytes:
    figure, axes = _figure("batches per second")
    _line(axes, epochs, [_throughput(epoch) for epoch in epochs], _BLUE, "trained and validated on")
    _mark_restarts(axes, epochs)
    return _png(figure, axes)


def _throughput(epoch: Epoch) -> float | None:
    batches = _sum(epoch.batches)
    return None if batches is None or not epoch.time_s else batches / epoch.time_s


def _dice(epochs: Sequence[Epoch]) -> bytes:
    figure, axes = _figure("pseudo Dice")
    _line(axes, epochs, [epoch.dice for epoch in epochs], _GREEN, "pseudo Dice, mean of the classes (nnU-Net)")
    _mark_restarts(axes, epochs)
    axes.set_ylim(0, 1)
    return _png(figure, axes)


def _memory(epochs: Sequence[Epoch]) -> bytes:
    figure, axes = _figure("GiB")
    gib = 1 << 30
    of_trainer = [None if epoch.trainer_nbytes is None else epoch.trainer_nbytes / gib for epoch in epochs]
    of_workers = [None if epoch.workers_nbytes is None else epoch.workers_nbytes / gib for epoch in epochs]
    _line(axes, epochs, of_trainer, _BLUE, "trainer")
    _line(axes, epochs, of_workers, _ORANGE, "all workers (what they share is counted for each)")
    _mark_restarts(axes, epochs)
    return _png(figure, axes)


def _figure(unit: str) -> tuple[Figure, Any]:
    figure = Figure(figsize=_SIZE, dpi=_DPI, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set_xlabel("epoch", color=_INK)
    axes.set_ylabel(unit, color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color=_GRID, linewidth=0.6)
    axes.tick_params(colors=_MUTED)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _line(axes: Any, epochs: Sequence[Epoch], values: Sequence[float | None], color: str, label: str) -> None:
    known = [math.nan if value is None else value for value in values]
    if not all(map(math.isnan, known)):
        marker = "o" if len(epochs) <= 50 else None
        axes.plot([epoch.number for epoch in epochs], known, color=color, label=label, marker=marker, markersize=3)


def _mark_restarts(axes: Any, epochs: Sequence[Epoch]) -> None:
    """A red triangle on the axis below each epoch in which a worker was replaced, with the number."""
    hit = [(epoch.number, int(_sum(epoch.restarts) or 0)) for epoch in epochs]
    hit = [(number, restarts) for number, restarts in hit if restarts]
    if not hit:
        return
    low = axes.get_xaxis_transform()
    label = "workers replaced"
    axes.plot(
        [number for number, _ in hit], [0.02] * len(hit), "^", color=_RED, transform=low, label=label, clip_on=False
    )
    if len(hit) <= 30:
        for number, restarts in hit:
            axes.annotate(str(restarts), (number, 0.06), xycoords=low, ha="center", va="bottom", fontsize=7, color=_RED)


def _sum(values: Mapping[str, float]) -> float | None:
    return sum(values.values()) if values else None


def _png(figure: Figure, axes: Any) -> bytes:
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, 1.16), ncols=3)
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
