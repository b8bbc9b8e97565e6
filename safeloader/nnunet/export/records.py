"""Deaths of export processes and final errors in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Final

from safeloader.errors import ExportError, RemoteTraceback
from safeloader.faults.exits import ProcessExit
from safeloader.faults.incident import Incident
from safeloader.faults.memory import figures

POOL: Final = "export"
"""What incidents call the pool."""
FEWER: Final = "if memory is short, fewer exports at a time take less of it (nnUNet_def_n_proc)"
_CRASHES: Final = ("SIGSEGV", "SIGBUS", "SIGABRT", "SIGILL", "SIGFPE")
_SHOWN: Final = 5


@dataclass(frozen=True)
class Death:
    """How a process ended that had a job in hand.

    Attributes:
        pid: its process id.
        exit: how it ended.
        job_s: how long it had worked at the job, in seconds.
        hung_s: the deadline that it missed, or None.
        oom: the evidence that the kernel's OOM killer was at work, or None.
        raised: the exception with which the job ended where nobody died (memory ran out), or None.
        stacks: what it left.
    """

    pid: int
    exit: ProcessExit
    job_s: float
    hung_s: float | None = None
    oom: str | None = None
    raised: str | None = None
    stacks: str | None = None

    @property
    def what(self) -> str:
        """The predicate of a sentence about the process."""
        if self.raised is not None:
            return f"ran out of memory ({self.raised})"
        if self.hung_s is not None:
            return f"had not finished after {self.hung_s:.0f} s and was ended"
        return f"{self.exit.what} after {self.job_s:.1f} s" + (f" ({self.oom})" if self.oom else "")

    @property
    def crashed(self) -> bool:
        """Whether native code crashed: it would in the trainer as well, and take that along."""
        return self.hung_s is None and self.exit.signal in _CRASHES

    def message(self, title: str, action: str) -> str:
        """All of it in one line."""
        advice = "" if self.hung_s is not None or self.crashed else f" ({FEWER})"
        return f"{title}: the process (pid {self.pid}) {self.what}; {action}{advice}."

    def incident(self, title: str, case: str, action: str) -> Incident:
        """For the run's file of incidents."""
        return Incident(
            at=datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            pool=POOL,
            kind="export-death",
            worker=None,
            pid=self.pid,
            incarnation=0,
            signal=self.exit.signal,
            exit_code=self.exit.code,
            cause=self.oom or self.raised,
            stage="exporting",
            case=case,
            stage_s=round(self.job_s, 3),
            stacks=self.stacks,
            figures=figures().to_dict(),
            action=action,
            message=self.message(title, action),
        )


@dataclass(frozen=True)
class Failed:
    """A job that can't be done: why, and the traceback of its exception if there was one."""

    title: str
    case: str
    why: str
    traceback: str | None = None


def final_error(failed: Sequence[Failed], done: int) -> ExportError:
    """What is raised once all other jobs are done; the first failure's traceback is its cause."""
    shown = "; ".join(f"{one.title}: {one.why}" for one in failed[:_SHOWN])
    more = f"; and {len(failed) - _SHOWN} more" if len(failed) > _SHOWN else ""
    error = ExportError(
        f"{len(failed)} of {len(failed) + done} jobs of the validation failed: {shown}{more}. What is done is kept: "
        "once the cause is gone, run nnUNetv2_train again with --val, which makes only what is missing",
        cases=tuple(one.case for one in failed),
    )
    text = next((one.traceback for one in failed if one.traceback), None)
    if text is not None:
        error.__cause__ = RemoteTraceback(text)
    return error
