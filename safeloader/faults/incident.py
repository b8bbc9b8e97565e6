"""The record of one failure: what a person, a log line and a report need, and nothing that can't be JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

KINDS: Final[Mapping[str, str]] = {
    "worker-death": "a worker died, or could not be started",
    "worker-hang": "a worker made no progress and was replaced",
    "oom-kill": "the kernel killed a worker because memory ran out",
    "worker-error": "a worker's batch ended in an exception and is made again",
    "nursery-death": "the process that forks the workers died or hung",
    "quarantine": "a case is no longer drawn",
    "redraw": "a batch is made of other cases, since its own can't be made and none is known to be at fault",
    "outage": "many cases can't be read at the same time",
    "outage-over": "they can again",
    "degrade": "the pool goes on with fewer workers, or with the other way to start them",
    "recovery": "the pool tries one worker more again",
    "export-death": "a process that exports or evaluates predictions of the validation died or hung",
    "recycle": "a worker whose memory had grown was replaced between two batches",
}
"""What `Incident.kind` may be."""


@dataclass(frozen=True, kw_only=True)
class Incident:
    """One failure and what was done about it.

    Attributes:
        at: wall-clock time, ISO 8601 with time zone.
        pool: the pool's name.
        kind: what kind of failure; see `KINDS`.
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
        stderr_tail: the last lines that the process wrote to stderr, or None.
        stacks: the Python stacks of all its threads at its end, or None.
        figures: memory, cgroup and descriptors at that time; see `faults.memory.Figures`.
        memory_nbytes: the worker's own memory when it was last looked at, or None.
        action: what SafeLoader did about it.
        advice: what the user may do about it; may be empty.
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
    stderr_tail: str | None = None
    stacks: str | None = None
    figures: dict[str, Any] | None = None
    memory_nbytes: int | None = None
    action: str
    advice: str = ""
    message: str

    def to_dict(self) -> dict[str, Any]:
        """All fields, ready for `json.dumps`."""
        return asdict(self)
