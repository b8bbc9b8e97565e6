"""Many values in one cell of a CSV file, so that one row stays one measurement; and what is read off them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np


def join(values: Iterable[float], digits: int = 3) -> str:
    """As text."""
    return " ".join(f"{value:.{digits}f}" for value in values)


def split(cell: str) -> list[float]:
    """The values."""
    return [float(word) for word in cell.split()]


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that is not below `percent` % of them: always one that was measured. NaN of none."""
    if not values:
        return float("nan")
    return float(np.percentile(values, percent, method="inverted_cdf"))
