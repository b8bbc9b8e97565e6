"""Incidents and final errors of a pool, put into words: what happened, the evidence, what was done or is to be done.

Pure functions: from what the pool knows to what a person reads.
"""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime

from safeloader.errors import RemoteTraceback, RestartLimitError, SafeLoaderError, StartError
from safeloader.faults.exits import ProcessExit
from safeloader.faults.incident import Incident
from safeloader.pool import events, machine
from safeloader.ring.status_page import Stage, Status


def worker_death(
    pool: str, mourn: events.Mourn, *, pid: int | None, how: ProcessExit, cause: str | None, status: Status
) -> Incident:
    """A worker has died. `cause` says what is known where the kernel said nothing."""
    if status.ticket is not None and status.ticket not in mourn.tickets:
        # It had handed that batch over, and died before it could write that it was idle.
        status = replace(status, stage=Stage.IDLE, ticket=None, case=None)
    if mourn.restart_in_s is None:
        action = "not replaced"
    elif mourn.restart_in_s == 0:
        action = "replaced at once"
    else:
        action = f"replaced in {mourn.restart_in_s:.1f} s"
    if mourn.tickets:
        numbers = ", ".join(str(ticket) for ticket in mourn.tickets)
        action += f", ticket{'s' * (len(mourn.tickets) > 1)} {numbers} made again"
    who = f"worker {pool}-{mourn.worker}" + ("" if pid is None else f" (pid {pid})")
    message = f"{who} {cause or how.what} while {_doing(status)}: {action}.{_advice(how)}"
    return Incident(
        at=_now(),
        pool=pool,
        kind="worker-death",
        worker=mourn.worker,
        pid=pid,
        incarnation=mourn.incarnation,
        signal=how.signal,
        exit_code=how.code,
        cause=cause,
        stage=status.stage.word,
        ticket=status.ticket,
        case=status.case,
        stage_s=round(time.monotonic() - status.since, 3),
        action=action,
        message=message,
    )


def nursery_death(pool: str, *, pid: int, how: ProcessExit, what: str) -> Incident:
    """The process that forks the workers has died; `what` ends the sentence "the nursery …"."""
    action = "another one is started, and its workers with it"
    return Incident(
        at=_now(),
        pool=pool,
        kind="nursery-death",
        worker=None,
        pid=pid,
        incarnation=0,
        signal=how.signal,
        exit_code=how.code,
        stage="idle",
        action=action,
        message=f"the nursery of pool {pool!r} (pid {pid}) {what}: {action}.{_advice(how)}",
    )


def start_failed(pool: str, reason: str, traceback: str) -> StartError:
    """The loader raises before the first batch, in every worker."""
    error = StartError(
        f"no worker of pool {pool!r} can start: {reason}. The loader or one of its parts raised this before the "
        "first batch; the traceback above comes from there."
    )
    error.__cause__ = RemoteTraceback(traceback)
    return error


def given_up(
    pool: str, limits: machine.Limits, decision: events.GiveUp, incidents: Sequence[Incident]
) -> RestartLimitError:
    """The restart intensity is exceeded: all causes, most frequent first, and the last death in full."""
    causes = Counter(_cause(incident) for incident in incidents[-decision.deaths :])
    listed = "; ".join(f"{count} x {cause}" for cause, count in causes.most_common())
    limit = (
        "before any of them was ready"
        if decision.failed_starts
        else f"in {limits.window_s:g} s with no batch in between (max_restarts={limits.max_restarts})"
    )
    last = incidents[-1].message if incidents else ""
    return RestartLimitError(
        f"pool {pool!r} is given up: {decision.deaths} workers died {limit}: {listed}. Last: {last}", tuple(incidents)
    )


def out_of_resources(pool: str, error: OSError) -> SafeLoaderError:
    """The trainer itself can't get a descriptor or memory."""
    used = "all" if error.errno == errno.EMFILE else str(len(os.listdir("/proc/self/fd")))
    failure = SafeLoaderError(
        f"pool {pool!r} can't go on: {error}; {used} of this process's file descriptors are in use. Raise the limit "
        "(`ulimit -n`), or lower num_processes and num_cached (nnUNet_n_proc_DA)."
    )
    failure.__cause__ = error
    return failure


def _doing(status: Status) -> str:
    """A status as the end of the sentence "while …"."""
    if status.ticket is None:
        return status.stage.word
    case = f" (case {status.case})" if status.case else ""
    seconds = time.monotonic() - status.since
    return f"{status.stage.word} the batch of ticket {status.ticket}{case} for {seconds:.1f} s"


def _advice(how: ProcessExit) -> str:
    return f" {how.signal or 'What to do'}: {how.advice}." if how.advice else ""


def _cause(incident: Incident) -> str:
    code = None if incident.exit_code is None else f"exit code {incident.exit_code}"
    return f"{incident.signal or code or incident.cause or 'unknown exit'} while {incident.stage}"


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="milliseconds")
