"""SafeLoader: the data loader that nnU-Net training can't be killed by.

from safeloader import SafeAugmenter
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safeloader.augmenter import SafeAugmenter, SafeMultiThreadedAugmenter
    from safeloader.faults.incident import Incident
    from safeloader.pool.cases import note_case
    from safeloader.report.stats import Report, WorkerInfo

__all__ = ["Incident", "Report", "SafeAugmenter", "SafeMultiThreadedAugmenter", "WorkerInfo", "note_case"]

_HOME = {
    "Incident": "safeloader.faults.incident",
    "Report": "safeloader.report.stats",
    "SafeAugmenter": "safeloader.augmenter",
    "SafeMultiThreadedAugmenter": "safeloader.augmenter",
    "WorkerInfo": "safeloader.report.stats",
    "note_case": "safeloader.pool.cases",
}


def __getattr__(name: str) -> Any:
    # On demand: the command line should not wait seconds for torch.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
