"""Draws the demo's picture from `events.csv`: batches per second over time, and every kill.

One panel per training with a common time axis. The line counts the batches in a window that slides over the
recorded steps; nothing is smoothed beyond that. An epoch's end shows as a peak, since validation batches need no
backward pass, and a dip, since a checkpoint is written: so epochs' ends are marked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from safeloader.cli.demo.recording import Event, read_events

WINDOW_S: Final = 3.0
_GRID_S: Final = 0.1
_INK, _MUTED, _LINE = "#1b1f24", "#57606a", "#0969da"
_GOOD, _BAD = "#1a7f37", "#cf222e"
# Told apart by shape as well as by colour.
_SIGNALS: Final = {
    "SIGKILL": ("v", "#cf222e"),
    "SIGSEGV": ("D", "#bf8700"),
    "SIGBUS": ("s", "#8250df"),
}

_EPOCH_END: Final[dict[str, Any]] = {"color": _MUTED, "linewidth": 1.2, "linestyle": (0, (2, 2))}

_Floats = npt.NDArray[np.float64]


def throughput(seconds: _Floats, end_s: float) -> tuple[_Floats, _Floats]:
    """Batches per second in a window of `WINDOW_S` around each moment.

    At both ends the window is cut to the time that was recorded, so that the rate is not too low there.

    Args:
        seconds: When each batch was done, ascending, `(n,) float64`.
        end_s: Where the record ends.

    Returns:
        Moments and rates, both `(m,) float64`.
    """
    at = np.arange(0, end_s, _GRID_S)
    low, high = np.maximum(at - WINDOW_S / 2, 0), np.minimum(at + WINDOW_S / 2, end_s)
    counts = np.searchsorted(seconds, high, side="right") - np.searchsorted(seconds, low, side="left")
    return at, counts / np.maximum(high - low, _GRID_S)


@dataclass(frozen=True)
class Caption:
    """A panel's title, and how its training ended."""

    title: str
    outcome: str


def epoch_ends(recorded: Sequence[Event]) -> list[float]:
    """When the last validation batch of each epoch but the last was done, seconds."""
    batches = [event for event in recorded if event.event == "batch"]
    return [before.seconds for before, after in pairwise(batches) if (before.detail, after.detail) == ("val", "train")]


def draw(events_file: Path, picture: Path, captions: Sequence[Caption]) -> None:
    """Draw `picture` (PNG).

    Args:
        events_file: As `recording.write_events` writes it.
        picture: Replaced if it is there.
        captions: One for each training, in the order of the file.
    """
    by_trainer: dict[str, list[Event]] = {}
    for event in read_events(events_file):
        by_trainer.setdefault(event.trainer, []).append(event)
    figure = Figure(figsize=(11, 2.5 * len(by_trainer) + 1.2), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(by_trainer), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    figure.suptitle("nnU-Net training while its data-loading workers are killed", fontsize=14, color=_INK)
    for panel, recorded, caption in zip(panels, by_trainer.values(), captions, strict=True):
        _panel(panel, recorded, caption)
    end_s = max(event.seconds for recorded in by_trainer.values() for event in recorded)
    panels[-1].set_xlim(0, end_s)
    # Room above the lines, in which the kills are marked.
    panels[-1].set_ylim(0, 1.25 * max(panel.dataLim.ymax for panel in panels))
    panels[-1].set_xlabel("seconds since the first batch", color=_MUTED)
    _legend(figure, by_trainer)
    figure.savefig(picture, dpi=150)


def _panel(panel: Any, recorded: Sequence[Event], caption: Caption) -> None:
    batches = np.array([event.seconds for event in recorded if event.event == "batch"])
    last = float(batches[-1])
    at, rate = throughput(batches, last)
    panel.fill_between(at, rate, color=_LINE, alpha=0.12, linewidth=0)
    panel.plot(at, rate, color=_LINE, linewidth=1.4)
    for end_s in epoch_ends(recorded):
        panel.axvline(end_s, **_EPOCH_END)
    for event in recorded:
        if event.event == "kill":
            _mark_kill(panel, event)
        elif event.event == "end":
            _mark_end(panel, last, event, caption)
    panel.set_title(caption.title, loc="left", fontsize=11, color=_INK, fontweight="bold")
    panel.set_ylabel("batches per second", color=_MUTED)
    panel.spines[["top", "right"]].set_visible(False)
    panel.tick_params(colors=_MUTED)
    panel.grid(axis="y", color="#d0d7de", linewidth=0.6)
    panel.set_axisbelow(True)


def _mark_kill(panel: Any, event: Event) -> None:
    marker, colour = _SIGNALS.get(event.detail, ("o", _INK))
    panel.axvline(event.seconds, color=colour, linewidth=0.8, alpha=0.35)
    panel.plot(event.seconds, 0.93, marker, color=colour, markersize=6, transform=panel.get_xaxis_transform())


def _mark_end(panel: Any, last: float, event: Event, caption: Caption) -> None:
    """What came after the last batch: the validation of a training that finished, nothing for any other."""
    in_axes = panel.get_xaxis_transform()
    if event.detail == "finished":
        panel.axvspan(last, event.seconds, color=_MUTED, alpha=0.10, linewidth=0)
        middle = (last + event.seconds) / 2
        text = panel.text(middle, 0.45, "nnU-Net's\nvalidation", transform=in_axes, color=_MUTED, fontsize=10)
        text.set(ha="center", va="center")
        panel.set_title(caption.outcome, loc="right", fontsize=11, color=_GOOD)
    else:
        panel.axvline(last, color=_BAD, linewidth=2)
        panel.text(last, 0.45, f"   {caption.outcome}", transform=in_axes, color=_BAD, fontsize=13, va="center")


def _legend(figure: Figure, by_trainer: dict[str, list[Event]]) -> None:
    seen = {event.detail for recorded in by_trainer.values() for event in recorded if event.event == "kill"}
    handles = [Line2D([], [], color=_LINE, linewidth=1.6, label=f"batches per second ({WINDOW_S:g} s window)")]
    for signal, (marker, colour) in _SIGNALS.items():
        if signal in seen:
            handles.append(
                Line2D([], [], color=colour, marker=marker, linestyle="none", label=f"worker killed by {signal}")
            )
    handles.append(Line2D([], [], label="end of an epoch", **_EPOCH_END))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9, labelcolor=_INK
    )
