"""What a training says about its loaders: lines for nnU-Net's log, and `safeloader_report.json`.

The log gets one line per epoch in which something happened, and a summary at the end. Each replaced worker has been
reported live by the logger "safeloader" (on stderr, unless the program configures logging otherwise); the lines here
count them, they don't repeat them. The file has every incident with its evidence.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from safeloader.nnunet.resume import StreamStates
from safeloader.pool.book import INCIDENTS_FILE
from safeloader.report.atomic import write_atomically

if TYPE_CHECKING:
    from safeloader.faults.incident import Incident
    from safeloader.nnunet.loaders import Augmenter
    from safeloader.report.stats import Report

REPORT_FILE: Final = "safeloader_report.json"
_LONG: Final = ("stderr_tail", "stacks", "figures")
_FEW: Final = 10
"""Cases that are named in a line."""


def report_path(output_folder: Path, rank: int) -> Path:
    """Where a DDP rank writes its report: each rank has its own workers and its own file."""
    return output_folder / (REPORT_FILE if rank == 0 else f"safeloader_report_rank{rank}.json")


@dataclass(frozen=True)
class About:
    """Which training a report is about.

    Attributes:
        trainer: The trainer's class name.
        rank: Of the process in DDP, else 0.
        first_epoch: Where this run began: 0, or more if it continued.
        workers: Why there are as many workers as there are; what `available_cpus` said.
    """

    trainer: str
    rank: int
    first_epoch: int
    workers: str


def put_aside(file: Path) -> None:
    """A training that begins anew has no incidents, no quarantine and no audit; the earlier run's file is kept."""
    if file.exists():
        os.replace(file, file.with_suffix(f".{datetime.now():%Y%m%d-%H%M%S}.jsonl"))


class TrainingRecord:
    """The loaders of one training run, and what has been said about them."""

    def __init__(self, loaders: Mapping[str, Augmenter], path: Path, about: About) -> None:
        """Record the run of `loaders` (by name) in the file `path`."""
        self._loaders = dict(loaders)
        self._path = path
        self._about = about
        self._started = _now()
        self._told = dict.fromkeys(loaders, 0)
        self._earlier = _earlier_runs(path) if about.first_epoch > 0 else []
        self._notes: list[dict[str, Any]] = []
        self._outcome = "running"
        self.ended = False

    def states(self) -> StreamStates | None:
        """Where the streams stand; None if there are none."""
        kept = {name: loader for name, loader in self._loaders.items() if hasattr(loader, "state_dict")}
        tickets = {name: loader.report().next_ticket for name, loader in kept.items()}
        seed = next((loader.seed for loader in kept.values()), None)
        return None if seed is None else StreamStates(seed, tickets)

    def remembered(self) -> str | None:
        """One line about the cases that an earlier run has quarantined; None if there are none."""
        cases = []
        for name, loader in self._loaders.items():
            report = loader.report()
            fresh = {incident.case for incident in report.incidents if incident.kind == "quarantine"}
            cases += [f"{name}: {case}" for case in report.quarantined if case not in fresh]
        if not cases:
            return None
        return (
            f"SafeLoader: {_quarantined_cases(len(cases))} since an earlier run ({_few(cases)}): remove the lines "
            f"about them from {self._path.with_name(INCIDENTS_FILE)} to have them drawn again"
        )

    def news(self) -> str | None:
        """One line about the incidents since the last call and the quarantined cases; None if there are none."""
        fresh: list[Incident] = []
        quarantined: list[str] = []
        for name, loader in self._loaders.items():
            report = loader.report()
            quarantined += [f"{name}: {case}" for case in report.quarantined]
            happened = sum(report.incident_counts.values())
            # Counted from the end: a report keeps the latest incidents only.
            fresh += report.incidents[max(0, len(report.incidents) - (happened - self._told[name])) :]
            self._told[name] = happened
        bad = f"{_quarantined_cases(len(quarantined))} ({_few(quarantined)})" if quarantined else ""
        if not fresh:
            return f"SafeLoader: {bad}. Details: {INCIDENTS_FILE}" if bad else None
        count = "1 incident" if len(fresh) == 1 else f"{len(fresh)} incidents"
        pools = dict.fromkeys(incident.pool for incident in fresh)
        causes = "; ".join(f"{pool}: {_causes(i for i in fresh if i.pool == pool)}" for pool in pools)
        made = "unfinished batches made again" + (f"; {bad}" if bad else "")
        return f"SafeLoader: {count} ({causes}), {made}. Details: {INCIDENTS_FILE}"

    def summary(self) -> list[str]:
        """One line per loader, and one that names the file."""
        if not self._loaders:
            in_here = os.environ.get("nnUNet_n_proc_DA") == "0"  # noqa: SIM112 - nnU-Net's spelling
            way = "in the training process itself (nnUNet_n_proc_DA=0)" if in_here else "without SafeLoader's workers"
            return [f"SafeLoader: batches were made {way}"]
        lines = []
        for name, loader in self._loaders.items():
            report = loader.report()
            replaced = "1 worker replaced" if report.restarts == 1 else f"{report.restarts} workers replaced"
            causes = f" ({_causes(report.incidents)})" if report.incidents else ""
            lines.append(
                f"SafeLoader: {name}: {report.batches} batches, {replaced}{causes}, "
                f"waited {report.wait_s:.1f} s for batches, seed {report.seed}"
            )
            if report.quarantined:
                lines.append(
                    f"SafeLoader: {name}: trained without {_quarantined_cases(len(report.quarantined))}: "
                    f"{_few(report.quarantined)}"
                )
        return [*lines, f"SafeLoader: the report is {self._path}"]

    def note(self, kind: str, text: str, *, epoch: int | None = None) -> None:
        """Keep in the report that something happened to the training itself, and write it.

        Args:
            kind: What it was, for programs: "compile-failed".
            text: The same in words: the line in the log.
            epoch: When, from 0; None outside of epochs.

        Raises:
            OSError: The file can't be written.
        """
        self._notes.append({"time": _now(), "epoch": epoch, "kind": kind, "text": text})
        self.write(self._outcome)

    def close(self) -> None:
        """Stop all workers. Safe to call again."""
        for loader in self._loaders.values():
            loader.close()

    def write(self, outcome: str) -> None:
        """Replace the report file by the present state.

        Args:
            outcome: "running", "finished", or the exception that ended the training.

        Raises:
            OSError: The file can't be written.
        """
        self._outcome = outcome
        state = {
            **vars(self._about),
            "outcome": outcome,
            "started": self._started,
            "written": _now(),
            "loaders": {name: _brief(loader.report()) for name, loader in self._loaders.items()},
            "notes": self._notes,  # after the loaders, by which `safeloader explain` knows the file
            "earlier_runs": self._earlier,
        }
        write_atomically(self._path, json.dumps(state, indent=2) + "\n")


def _brief(report: Report) -> dict[str, Any]:
    """All of a report but what makes incidents long and is in their own file."""
    state = report.to_dict()
    for incident in state["incidents"]:
        for field in _LONG:
            del incident[field]
    return state


def _causes(incidents: Iterable[Incident]) -> str:
    """Incidents by cause: "2 × SIGKILL, 1 × exit code 3"."""
    counts = Counter(_cause(incident) for incident in incidents)
    return ", ".join(f"{number} × {cause}" for cause, number in counts.most_common())


def _quarantined_cases(number: int) -> str:
    return "1 quarantined case" if number == 1 else f"{number} quarantined cases"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_FEW]) + (f" and {len(names) - _FEW} more" if len(names) > _FEW else "")


def _cause(incident: Incident) -> str:
    if incident.kind in ("worker-hang", "oom-kill"):
        return {"worker-hang": "hang", "oom-kill": "OOM kill"}[incident.kind]
    if incident.signal is not None:
        return incident.signal
    if incident.exit_code is not None:
        return f"exit code {incident.exit_code}"
    return incident.kind


def _earlier_runs(path: Path) -> list[dict[str, Any]]:
    """The runs in the report that a continued training finds, oldest first; none if it can't be read."""
    try:
        last = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [*last.pop("earlier_runs", []), last] if isinstance(last, dict) else []


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
