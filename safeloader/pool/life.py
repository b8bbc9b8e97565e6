"""One incarnation of a worker as the trainer sees it, and what is known of it when it has ended."""

from __future__ import annotations

import contextlib
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import psutil

from safeloader.faults.exits import ExitCode, ProcessExit
from safeloader.pool import events, wire
from safeloader.pool.crew import WorkerState
from safeloader.pool.events import Cause
from safeloader.pool.failure import FailureRecord
from safeloader.pool.records import End
from safeloader.pool.relay import Relay
from safeloader.report.stats import WorkerInfo
from safeloader.ring.status_page import Stage, StatusPage

if TYPE_CHECKING:
    from safeloader.pool.pool import Pool

_FROM_OUTSIDE: Final = {
    name.name for name in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGXCPU)
}
"""Signals that a process does not get for what it does itself."""
_BY_AGREEMENT: Final = (ExitCode.RETIRED, ExitCode.SPENT)
_STATES: Final = {
    psutil.STATUS_STOPPED: "it was stopped by a signal (SIGSTOP)",
    psutil.STATUS_TRACING_STOP: "a debugger had stopped it",
    psutil.STATUS_DISK_SLEEP: "it was in an uninterruptible sleep (state D)",
    psutil.STATUS_SLEEPING: "it was sleeping",
    psutil.STATUS_RUNNING: "it was running",
}


@dataclass
class Life:
    """One incarnation of a worker, from the request to fork it to its end.

    Attributes:
        nursery: whose nursery it comes from: a pool's number, or None for the clean one.
        words: what is known of its end where the kernel says nothing.
        oom: what shows that the OOM killer killed it, or None. oom_known: whether the kernel would have told.
        condemned: the watchdog's reason to kill it. state: what it was doing then.
        memory_nbytes: its own memory when it was last looked at; baseline_nbytes: after its first batches.
        silent: its end of the socket is closed: it has ended, or is about to.
        killed: its nursery was asked to end it.
    """

    pool: Pool
    worker: int
    incarnation: int
    channel: wire.Channel
    page: StatusPage
    relay: Relay
    nursery: int | None
    pid: int | None = None
    known_slots: set[int] = field(default_factory=set)
    failures: dict[int, FailureRecord] = field(default_factory=dict)  # by ticket
    exit: ProcessExit = field(default_factory=ProcessExit)
    words: str | None = None
    oom: str | None = None
    oom_known: bool = False
    condemned: events.Condemn | None = None
    state: str | None = None
    memory_nbytes: int | None = None
    baseline_nbytes: int | None = None
    silent: bool = False
    killed: bool = False
    watched: bool = False
    buried: bool = False

    @property
    def title(self) -> str:
        """What `ps` calls it, and messages."""
        return f"{self.pool.name}-{self.worker}"

    def condemn(self, action: events.Condemn) -> None:
        """It will be killed: note what it is doing now."""
        self.condemned = action
        if self.pid is None:
            return
        with contextlib.suppress(psutil.Error):
            status = psutil.Process(self.pid).status()
            self.state = _STATES.get(status, status)
            with contextlib.suppress(OSError):
                wchan = Path(f"/proc/{self.pid}/wchan").read_text()
                if wchan not in ("", "0") and status in (psutil.STATUS_SLEEPING, psutil.STATUS_DISK_SLEEP):
                    self.state += f" in the kernel's {wchan}"

    def cause(self) -> Cause:
        """Why it ended."""
        how = self.exit
        if self.oom is not None:
            return Cause.MEMORY
        if how.signal in _FROM_OUTSIDE or (how.signal or "").startswith("signal "):
            return Cause.OUTSIDE
        if how.signal == "SIGBUS":
            return Cause.READING
        if how.code in _BY_AGREEMENT:
            return Cause.SPENT
        if not how.known or how.code in (ExitCode.ORPHANED, ExitCode.CHANNEL_LOST):
            return Cause.NURSERY
        return Cause.ITSELF

    def end(self, figures: dict[str, Any]) -> End:
        """Everything that is known of its end; its last words are read first."""
        self.relay.drain()
        condemned = self.condemned
        return End(
            pid=self.pid,
            how=self.exit,
            status=self.page.read(),
            words=self.words,
            oom=self.oom,
            oom_known=self.oom_known,
            idle_s=None if condemned is None else condemned.idle_s,
            allowed_s=0.0 if condemned is None else condemned.allowed_s,
            state=self.state,
            abandoned=condemned is not None and not self.exit.known,
            stderr_tail=self.relay.tail() or None,
            stacks=self.page.stacks(),
            figures=figures,
            memory_nbytes=self.memory_nbytes,
        )

    def info(self, state: str) -> WorkerInfo:
        """What it is doing now."""
        status = self.page.read()
        memory_nbytes = None
        if self.pid is not None:
            with contextlib.suppress(psutil.Error):
                memory_nbytes = psutil.Process(self.pid).memory_info().rss
        return WorkerInfo(
            worker=self.worker,
            pid=self.pid,
            incarnation=self.incarnation,
            state=state,
            stage=status.stage.word,
            ticket=status.ticket,
            case=status.case,
            since_s=max(0.0, time.monotonic() - status.since),
            batches=status.batches,
            memory_nbytes=memory_nbytes,
        )

    def close(self) -> None:
        """Let go of what this side holds of it."""
        self.channel.close()
        self.page.close()
        self.relay.close()


def absent(worker: int, incarnation: int, state: str) -> WorkerInfo:
    """A worker that is not running: it rests, or its start is to come."""
    return WorkerInfo(
        worker=worker,
        pid=None,
        incarnation=max(0, incarnation),
        state=state,
        stage=(Stage.IDLE if state == WorkerState.RESTING.value else Stage.STARTING).word,
        ticket=None,
        case=None,
        since_s=0.0,
        batches=0,
        memory_nbytes=None,
    )
