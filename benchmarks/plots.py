"""What the pictures have in common: the contestants' colours, and bars with every round's value on them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

from matplotlib.axes import Axes

COLOURS: Final = {"safeloader": "#0969da", "stock": "#57606a"}
_OTHER: Final = "#afb8c1"


def colour(contestant: str) -> str:
    """Ours and the stock class's are the same in every picture, also of a variant: "safeloader, kills"."""
    return COLOURS.get(contestant.partition(",")[0], _OTHER)


def bars(axes: Axes, values: Mapping[str, Sequence[float]], label: str) -> None:
    """A horizontal bar for each contestant (the median), and a dot for each round.

    Args:
        axes: where.
        values: each round's value by contestant, from the top.
        label: of the values, with its unit.
    """
    names = list(values)
    medians = [statistics.median(values[name]) for name in names]
    axes.barh(range(len(names)), medians, color=[colour(name) for name in names], alpha=0.85)
    for at, name in enumerate(names):
        axes.plot(values[name], [at] * len(values[name]), "o", color="#1b1f24", markersize=3)
        value = f"{medians[at]:,.0f}" if medians[at] >= 1000 else f"{medians[at]:.3g}"
        axes.annotate(f" {value}", (medians[at], at), va="bottom", fontsize=8)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    axes.margins(x=0.12)
    tidy(axes)


def tidy(axes: Axes) -> None:
    """No more ink than needed."""
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def by_contestant(rows: Sequence[Any], column: str, **which: Any) -> dict[str, list[float]]:
    """Each contestant's values of a column, in the order of the rows."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if all(getattr(row, name) == value for name, value in which.items()) and getattr(row, column) is not None:
            found.setdefault(row.contestant, []).append(float(getattr(row, column)))
    return found
