"""A training's counters as a Prometheus text file, for node_exporter's textfile collector.

Format: https://prometheus.io/docs/instrumenting/exposition_formats/, text, version 0.0.4.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

_METRICS: Final = (
    ("safeloader_batches_total", "counter", "Batches given to training since it was started.", "batches"),
    ("safeloader_wait_seconds_total", "counter", "Seconds that training has waited for batches.", "wait_s"),
    ("safeloader_restarts_total", "counter", "Workers that were replaced.", "restarts"),
    ("safeloader_quarantined_cases", "gauge", "Cases that are no longer drawn.", "quarantined"),
    ("safeloader_workers_resident_bytes", "gauge", "Resident memory of all workers.", "workers_nbytes"),
)
"""Name, type, help, and the key in a loader's counts."""


def text(training: str, epoch: int, ended_s: float, loaders: Mapping[str, Mapping[str, Any]]) -> str:
    """The file's content.

    Args:
        training: Which training; its label.
        epoch: The last one that has ended.
        ended_s: When, in seconds since 1970: a training that hangs shows by its age.
        loaders: The counts of each loader, as `nnunet.history` makes them.
    """
    return "\n".join(_lines(training, epoch, ended_s, loaders)) + "\n"


def _lines(training: str, epoch: int, ended_s: float, loaders: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    label = f'training="{_escaped(training)}"'
    yield from _head("safeloader_epoch", "gauge", "The last epoch that has ended.")
    yield f"safeloader_epoch{{{label}}} {epoch}"
    yield from _head("safeloader_epoch_end_timestamp_seconds", "gauge", "When it has ended.")
    yield f"safeloader_epoch_end_timestamp_seconds{{{label}}} {ended_s:.3f}"
    for name, kind, what, key in _METRICS:
        yield from _head(name, kind, what)
        for loader, counts in loaders.items():
            yield f'{name}{{{label},loader="{_escaped(loader)}"}} {counts[key]}'
    yield from _head("safeloader_incidents_total", "counter", "Failures, by kind.")
    for loader, counts in loaders.items():
        for kind, number in counts["incidents"].items():
            yield f'safeloader_incidents_total{{{label},loader="{_escaped(loader)}",kind="{_escaped(kind)}"}} {number}'


def _head(name: str, kind: str, what: str) -> Iterator[str]:
    yield f"# HELP {name} {what}"
    yield f"# TYPE {name} {kind}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
