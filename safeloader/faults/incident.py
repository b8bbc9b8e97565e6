"""The record of one failure: what a person, a log line and a report need, and nothing that can't be JSON."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Incident:
    """One failure and what was done about it.

    Attributes:
        at: wall-clock time, ISO 8601 with time zone.
        pool: the pool's name.
        kind: "worker-death", "worker-error", "start-failed" or "nursery-death".
        worker: the worker's index, or None if it was the nursery.
        pid: the process id, or None if no process came into being.
        incarnation: which life of the worker.
        signal: name of the signal that ended it, or None.
        exit_code: its exit code, or None.
        cause: what is known where the kernel tells neither, for example that it could not be forked.
        stage: what it was doing, in the glossary's words.
        ticket: the ticket it was working on, or None.
        case: the sample's identifier, or None where it is not known.
        stage_s: seconds in that stage, or None.
        action: what SafeLoader did about it.
        message: all of it in one line.
    """

    at: str
    pool: str
    kind: str
    worker: int | None
    pid: int | None
    incarnation: int
    signal: str | None = None
    exit_code: int | None = None
    cause: str | None = None
    stage: str
    ticket: int | None = None
    case: str | None = None
    stage_s: float | None = None
    action: str
    message: str

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for `json.dumps`."""
        return asdict(self)
