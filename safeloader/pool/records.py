"""Incidents and final errors of a pool, put into words: what happened, the evidence, what was done or is to be done.

Pure functions: from what the pool knows to what a person reads.
"""

from __future__ import annotations

import errno
import os
import re
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, Final

from safeloader.errors import (
    BadCaseError,
    OutageError,
    QuarantineLimitError,
    RemoteTraceback,
    RestartLimitError,
    SafeLoaderError,
    StartError,
)
from safeloader.faults.exits import ProcessExit
from safeloader.faults.incident import Incident
from safeloader.faults.storage import ReadFailure
from safeloader.pool import events
from safeloader.pool.events import Cause, Why
from safeloader.pool.failure import FailureRecord
from safeloader.ring.status_page import Stage, Status

_KINDS: Final = {Cause.HUNG: "worker-hang", Cause.MEMORY: "oom-kill"}
_FRAME: Final = re.compile(r'File "([^"]+)", line (\d+) in (\S+)')
_MORE_MEMORY: Final = "give the job more memory (Slurm: --mem, Docker: --memory), or lower nnUNet_n_proc_DA"


@dataclass(frozen=True)
class End:
    """What is known of a process that has ended.

    Attributes:
        pid: None if it never came into being.
        how: what the kernel said.
        words: what is known where the kernel says nothing, or more than it says, as the end of "the worker …".
        status: the last entry on its status page.
        oom: what shows that the OOM killer killed it, or None. oom_known: whether the kernel would have told.
        idle_s: without progress, if the watchdog ended it. allowed_s: its deadline. state: what it was seen doing.
    """

    pid: int | None
    how: ProcessExit
    status: Status
    words: str | None = None
    oom: str | None = None
    oom_known: bool = False
    idle_s: float | None = None
    allowed_s: float = 0.0
    state: str | None = None
    abandoned: bool = False
    stderr_tail: str | None = None
    stacks: str | None = None
    figures: dict[str, Any] | None = None
    memory_nbytes: int | None = None


def worker_death(pool: str, mourn: events.Mourn, end: End) -> Incident:
    """A worker has died, or was ended because it hung."""
    status = end.status
    if status.ticket is not None and status.ticket not in mourn.tickets:
        # It had handed that batch over, and died before it could write that it was idle.
        status = replace(status, stage=Stage.IDLE, ticket=None, cases=())
    who = f"worker {pool}-{mourn.worker}" + ("" if end.pid is None else f" (pid {end.pid})")
    advice = _advice(mourn.cause, end)
    action = _replaced(mourn)
    message = f"{who} {_what(mourn.cause, end)} while {_doing(status)}: {action}."
    if advice:
        named = mourn.cause in (Cause.ITSELF, Cause.READING, Cause.OUTSIDE)
        message += f" {(end.how.signal if named else None) or 'What to do'}: {advice}."
    return Incident(
        at=_now(),
        pool=pool,
        kind=_KINDS.get(mourn.cause, "worker-death"),
        worker=mourn.worker,
        pid=end.pid,
        incarnation=mourn.incarnation,
        signal=None if mourn.cause is Cause.HUNG else end.how.signal,  # which would be our own
        exit_code=end.how.code,
        cause=end.words,
        stage=status.stage.word,
        ticket=status.ticket,
        case=status.case,
        stage_s=round(time.monotonic() - status.since, 3),
        stderr_tail=end.stderr_tail,
        stacks=end.stacks,
        figures=end.figures,
        memory_nbytes=end.memory_nbytes,
        action=action,
        advice=advice,
        message=message,
    )


def _what(cause: Cause, end: End) -> str:
    if cause is Cause.HUNG:
        seen = f", {end.state}" if end.state else ""
        where = _innermost(end.stacks)
        seen += f", in {where}" if where else ""
        ended = "can't be killed and is abandoned" if end.abandoned else "was killed"
        return f"made no progress for {end.idle_s:.1f} s (allowed: {end.allowed_s:.1f} s{seen}) and {ended}"
    if end.oom is not None:
        return f"was killed by the kernel's OOM killer ({end.oom})"
    return end.words or end.how.what


def _advice(cause: Cause, end: End) -> str:
    match cause:
        case Cause.HUNG:
            return (
                "usually storage that stalls, or a lock in native code that nobody will release; the stacks are in the "
                "incident; if batches may take so long, raise hang_timeout_s (SAFELOADER_HANG_TIMEOUT_S)"
            )
        case Cause.MEMORY:
            return _MORE_MEMORY
        case Cause.REFUSED:
            return (
                "this user or container may have no more processes or memory: `ulimit -u`, the cgroup's pids.max, "
                "`free -g`; lower nnUNet_n_proc_DA"
            )
        case Cause.OUTSIDE if end.how.signal == "SIGKILL" and end.oom_known:
            return (
                "the kernel's OOM-kill counters did not rise, so it was killed from outside: by a scheduler, another "
                "program or a person"
            )
        case _:
            return end.how.advice


def _replaced(mourn: events.Mourn) -> str:
    if mourn.restart_in_s is None:
        action = "not replaced"
    elif mourn.restart_in_s <= 0:
        action = "replaced at once"
    else:
        action = f"replaced in {mourn.restart_in_s:.1f} s"
    if mourn.tickets:
        numbers = ", ".join(str(ticket) for ticket in mourn.tickets)
        action += f", ticket{'s' * (len(mourn.tickets) > 1)} {numbers} made again"
        action += f", the one in hand after {mourn.again_in_s:.1f} s" if mourn.again_in_s > 0 else ""
    return action


def nursery_death(pool: str, *, pid: int, how: ProcessExit, what: str, stderr_tail: str | None = None) -> Incident:
    """The process that forks the workers has died; `what` ends the sentence "the nursery …"."""
    action = "another one is started, and its workers with it"
    said = f" It last wrote: {_last_line(stderr_tail)}" if stderr_tail else ""
    message = f"the nursery of pool {pool!r} (pid {pid}) {what}: {action}."
    message += f" {how.signal or 'What to do'}: {how.advice}." if how.advice else ""
    return _event(
        pool, "nursery-death", message + said, action, pid=pid, how=how, stderr_tail=stderr_tail, advice=how.advice
    )


def retried(pool: str, retry: events.Retry, record: FailureRecord, *, will: str | None = None) -> Incident:
    """A ticket has ended in an exception, and is made again."""
    when = f"in {retry.in_s:.1f} s" if retry.in_s > 0 else "at once"
    action = will or f"made again {when}"
    doing = f"{record.stage.word} the batch of ticket {retry.ticket}" + (
        f" (case {record.case})" if record.case else ""
    )
    match record.read:
        case ReadFailure.STORAGE:
            advice = "the storage answered with an error; if it goes on, look at the file system that holds the data"
        case ReadFailure.CONTENT:
            advice = "a file is truncated, half-written or corrupt; if it stays so, preprocess this case again"
        case _:
            advice = "nothing for now: an exception that comes again is raised, or its case is quarantined"
    message = (
        f"worker {pool}-{retry.worker} (pid {record.pid}) ran into {record.summary} while {doing}: {action}. "
        f"What to do: {advice}."
    )
    return Incident(
        at=_now(),
        pool=pool,
        kind="worker-error",
        worker=retry.worker,
        pid=record.pid,
        incarnation=retry.incarnation,
        cause=record.summary,
        stage=record.stage.word,
        ticket=retry.ticket,
        case=record.case,
        stacks=record.traceback,
        action=action,
        advice=advice,
        message=message,
    )


def quarantined(pool: str, quarantine: events.Quarantine, last: Incident | None, file: str | None) -> Incident:
    """A case is no longer drawn."""
    action = f"no longer drawn (quarantined: {quarantine.quarantined} of at most {quarantine.limit})"
    why = f" Last: {last.message}" if last is not None else ""
    kept = f"; to have it drawn again, remove this line from {file}" if file else ""
    advice = f"check this case's preprocessed files, and preprocess it again{kept}"
    message = (
        f"case {quarantine.case} of pool {pool!r} has two strikes while others have none: {action}; ticket "
        f"{quarantine.ticket} is drawn anew. What to do: {advice}.{why}"
    )
    return _event(pool, "quarantine", message, action, ticket=quarantine.ticket, case=quarantine.case, advice=advice)


def redrawn(pool: str, redraw: events.Redraw) -> Incident:
    """A ticket is drawn anew, and nothing is quarantined for it (yet)."""
    action = "made of other random numbers"
    if redraw.case is None:
        suspicion = "Which case it was is not known; safeloader.note_case would tell."
    else:
        suspicion = f"Case {redraw.case} is suspected; if it fails in other draws as well, it is quarantined."
    message = f"the batch of ticket {redraw.ticket} of pool {pool!r} failed again and again: {action}. {suspicion}"
    return _event(pool, "redraw", message, action, ticket=redraw.ticket, case=redraw.case)


def outage(pool: str, event: events.Outage) -> Incident:
    """Storage has failed, or works again."""
    if not event.cases:
        message = f"pool {pool!r} can read again, after {event.seconds:.0f} s. Nothing was quarantined for it."
        return _event(pool, "outage-over", message, "goes on")
    names = ", ".join(sorted(set(event.cases))[:5])
    action = "waiting and trying again; nothing is quarantined"
    advice = "look at the file system that holds the preprocessed data (nnUNet_preprocessed)"
    message = (
        f"{len(event.cases)} cases of pool {pool!r} can't be read at the same time ({names}): that is the storage, "
        f"not the cases. {action.capitalize()}. What to do: {advice}."
    )
    return _event(pool, "outage", message, action, advice=advice)


def resized(pool: str, resize: events.Resize, detail: str | None = None) -> Incident:
    """The pool goes on with another number of workers."""
    number = "1 worker" if resize.workers == 1 else f"{resize.workers} workers"
    action = f"{number} from here on, instead of {resize.before}"
    why = {
        Why.MEMORY: detail or "memory ran out",
        Why.QUIET: "nothing has gone wrong for a while",
        Why.STARTS: "a worker dies again and again before it has made a batch",
        Why.DEATHS: "workers die again and again without making a batch",
    }[resize.why]
    kind = "recovery" if resize.why is Why.QUIET else "degrade"
    advice = _MORE_MEMORY if resize.why is Why.MEMORY else ""
    message = f"pool {pool!r}: {action}: {why}." + (f" What to do: {advice}." if advice else "")
    return _event(pool, kind, message, action, advice=advice)


def resting(pool: str, rest: events.Rest, after_s: float) -> str:
    """Workers have left because there was nothing to do. No incident: a line for who wonders where they are."""
    who = "they" if rest.at_work is None else f"{rest.at_work} at work keep the CPUs busy, and the others"
    return (
        f"pool {pool!r}: {rest.resting} of {rest.workers} workers rest, since {who} had nothing to do for {after_s:g} "
        "s (rest_after_s); they are started again when they are needed"
    )


def switched(pool: str, *, to_fork: bool) -> Incident:
    """Workers come from the other kind of nursery from here on."""
    action = "forked from the trainer" if to_fork else "started from a clean process"
    message = f"pool {pool!r}: workers die again and again without making a batch; from here on they are {action}."
    return _event(pool, "degrade", message, action)


def recycled(pool: str, worker: int, pid: int | None, *, grown_nbytes: int, limit_nbytes: int) -> Incident:
    """A worker's memory has grown without end."""
    action = "replaced between two batches"
    advice = "look for something in the loader or transforms that keeps what it has read"
    message = (
        f"worker {pool}-{worker} (pid {pid}) has grown by {grown_nbytes / 2**20:.0f} MiB since its 8th batch (allowed: "
        f"{limit_nbytes / 2**20:.0f} MiB): {action}. What to do: {advice}."
    )
    return _event(pool, "recycle", message, action, pid=pid, worker=worker, advice=advice)


# ---- errors that end the stream ----


def start_failed(pool: str, reason: str, traceback: str) -> StartError:
    """The loader raises before the first batch, in every worker."""
    error = StartError(
        f"no worker of pool {pool!r} can start: {reason}. The loader or one of its parts raised this before the "
        "first batch; the traceback above comes from there."
    )
    error.__cause__ = RemoteTraceback(traceback)
    return error


def given_up(pool: str, decision: events.GiveUp, incidents: Sequence[Incident]) -> SafeLoaderError:
    """The pool can't go on. `incidents` led here: all causes, most frequent first, and the last one in full."""
    last = f" Last: {incidents[-1].message}" if incidents else ""
    listed = causes(incidents)
    match decision.why:
        case Why.BAD_CASE:
            message = f"case {decision.case} of pool {pool!r} has two strikes (on_bad_case='raise'): {listed}.{last}"
            return BadCaseError(message, decision.case, tuple(incidents))
        case Why.QUARANTINE:
            message = (
                f"case {decision.case} of pool {pool!r} has two strikes, and no more cases may be quarantined: "
                f"{listed}. Check the preprocessed dataset; `safeloader explain` reads the incidents.{last}"
            )
            return QuarantineLimitError(message, decision.case, tuple(incidents))
        case Why.OUTAGE:
            message = (
                f"pool {pool!r} is given up: its data could not be read for longer than outage_timeout_s: {listed}. "
                f"Look at the file system that holds the preprocessed data, then continue with `--c`.{last}"
            )
            return OutageError(message, tuple(incidents))
        case _:
            before = " before any of them was ready" if decision.why is Why.STARTS else " without making a batch"
            message = (
                f"pool {pool!r} is given up: {len(incidents)} workers died{before}, with fewer workers and with each "
                f"way to start them that there is: {listed}.{last}"
            )
            return RestartLimitError(message, tuple(incidents))


def causes(incidents: Sequence[Incident]) -> str:
    """Incidents by cause, most frequent first: "2 x SIGKILL while loading; 1 x exit code 3 while idle"."""
    counts = Counter(_cause(incident) for incident in incidents)
    return "; ".join(f"{count} x {cause}" for cause, count in counts.most_common()) or "no incident"


def out_of_resources(pool: str, error: OSError) -> SafeLoaderError:
    """The trainer itself can't get a descriptor or memory."""
    used = "all" if error.errno == errno.EMFILE else str(len(os.listdir("/proc/self/fd")))
    failure = SafeLoaderError(
        f"pool {pool!r} can't go on: {error}; {used} of this process's file descriptors are in use. Raise the limit "
        "(`ulimit -n`), or lower num_processes and num_cached (nnUNet_n_proc_DA)."
    )
    failure.__cause__ = error
    return failure


def doing(status: Status) -> str:
    """A status as the end of the sentence "while …"."""
    return _doing(status)


# ---- parts ----


def _event(
    pool: str,
    kind: str,
    message: str,
    action: str,
    *,
    worker: int | None = None,
    pid: int | None = None,
    how: ProcessExit | None = None,
    ticket: int | None = None,
    case: str | None = None,
    stderr_tail: str | None = None,
    advice: str = "",
) -> Incident:
    """An incident that is about the pool, and not about what a worker was doing."""
    how = how or ProcessExit()
    return Incident(
        at=_now(),
        pool=pool,
        kind=kind,
        worker=worker,
        pid=pid,
        incarnation=0,
        signal=how.signal,
        exit_code=how.code,
        stage="idle",
        ticket=ticket,
        case=case,
        stderr_tail=stderr_tail,
        action=action,
        advice=advice,
        message=message,
    )


def _doing(status: Status) -> str:
    if status.ticket is None:
        return status.stage.word
    case = f" (case {status.case})" if status.case else ""
    seconds = time.monotonic() - status.since
    return f"{status.stage.word} the batch of ticket {status.ticket}{case} for {seconds:.1f} s"


def _innermost(stacks: str | None) -> str | None:
    """The frame that runs, from what faulthandler wrote."""
    frame = _FRAME.search(stacks or "")
    return f"{frame[3]} ({os.path.basename(frame[1])}:{frame[2]})" if frame else None


def _last_line(text: str) -> str:
    return text.strip().splitlines()[-1][:500]


def _cause(incident: Incident) -> str:
    if incident.kind in ("worker-hang", "oom-kill"):
        what = {"worker-hang": "hang", "oom-kill": "OOM kill"}[incident.kind]
    else:
        code = None if incident.exit_code is None else f"exit code {incident.exit_code}"
        # Pids and times differ from death to death: what is left is the cause.
        said = re.sub(r" \(pid \d+\)| for \d+\.\d s", "", incident.cause or "")
        what = incident.signal or code or said or "unknown exit"
    return f"{what} while {incident.stage}"


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="milliseconds")
