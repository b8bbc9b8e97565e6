"""What the demo keeps: `events.csv`, from which the picture is drawn, and `results.json`."""

from __future__ import annotations

import csv
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safeloader.cli.demo.training import Run
from safeloader.report.versions import version_of

EVENTS_FILE: Final = "events.csv"
RESULTS_FILE: Final = "results.json"
_COLUMNS: Final = ("trainer", "seconds", "event", "detail")


@dataclass(frozen=True)
class Event:
    """One line of `events.csv`.

    Attributes:
        trainer: The run's title.
        seconds: Since the run's first batch.
        event: "batch" (detail: train or val), "kill" (detail: the signal) or "end" (detail: the outcome).
        detail: See `event`.
    """

    trainer: str
    seconds: float
    event: str
    detail: str


def events(run: Run) -> list[Event]:
    """Everything that was recorded of a run, in the order in which it happened."""
    if not run.steps:
        return []
    start = run.steps[0].monotonic_s
    found: list[tuple[float, str, str]] = [(step.monotonic_s, "batch", step.phase) for step in run.steps]
    found += [(kill.monotonic_s, "kill", kill.signal) for kill in run.kills]
    if run.ended_s is not None and run.outcome is not None:
        found.append((run.ended_s, "end", run.outcome.value))
    return [Event(run.plan.title, at - start, event, detail) for at, event, detail in sorted(found)]


def write_events(path: Path, runs: Sequence[Run]) -> None:
    """Write `events.csv`; seconds with three decimals."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_COLUMNS)
        for run in runs:
            writer.writerows((e.trainer, f"{e.seconds:.3f}", e.event, e.detail) for e in events(run))


def read_events(path: Path) -> list[Event]:
    """Read `events.csv`."""
    with open(path, newline="", encoding="utf-8") as file:
        return [Event(r["trainer"], float(r["seconds"]), r["event"], r["detail"]) for r in csv.DictReader(file)]


def write_results(path: Path, runs: Sequence[Run], *, device: str, seconds: float) -> None:
    """Write `results.json`: the table's numbers, the machine, the versions, and SafeLoader's report."""
    results = {
        "seconds": round(seconds, 1),
        "device": device,
        "cpus": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in ("safeloader", "nnunetv2", "batchgenerators", "torch")},
        "runs": [_summary(run) for run in runs],
    }
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def _summary(run: Run) -> dict[str, Any]:
    return {
        "title": run.plan.title,
        "trainer": run.plan.trainer,
        "outcome": None if run.outcome is None else run.outcome.value,
        "kills": len(run.kills),
        "batches_asked_for": run.length.batches,
        "batches_seen": len(run.steps),
        "batches_lost": run.lost,
        "dice": run.dice,
        "last_words": run.last_words,
        "report": run.report,
    }
