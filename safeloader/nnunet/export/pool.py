"""The pool that nnU-Net's validation exports through: its processes may die or hang, and nothing waits for ever.

    submitted ─► queue ─► in a process ──────────────────► done, or failed: it raised
                              │ died, hung, out of memory
                              ▼
                          alone: in a process, when nothing else is to be done
                              │ died again                          │ hung again, or crashed in native code
                              ▼                                     ▼
                          in the trainer, if its memory suffices ─► failed

There is no thread: the pool moves on whenever nnU-Net's method asks it something (`turn`), which it does before each
prediction and all the time once it waits. A process has the next job before it has finished its own, so it does not
wait for the method while that predicts. A failure is raised by `get`, and only when all other jobs are done.

What it does not do again: a job that raised. What would end the trainer as well, a crash in native code, is not tried
there; neither is what hangs, because the trainer has nobody to end it.
"""

from __future__ import annotations

import select
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safeloader.faults import memory
from safeloader.faults.exits import ProcessExit
from safeloader.faults.incident import Incident
from safeloader.nnunet.export.call import Brief, Call
from safeloader.nnunet.export.job import TRIES, Job, State
from safeloader.nnunet.export.outputs import Output, remove_abandoned
from safeloader.nnunet.export.process import GOODBYE_S, ExportProcess, Failure, Kind, private_view
from safeloader.nnunet.export.records import Death, Failed, final_error
from safeloader.pool.failure import describe, format_remote
from safeloader.ring import codec

TIMEOUT_FLOOR_S: Final = 600.0
"""Nobody is said to hang before that, unless the user says so."""
_TIMES_SLOWEST: Final = 20
"""…and not before so many times what the slowest job so far took for its size."""
_JOBS_AHEAD: Final = 2
"""Jobs that a process may have: the one in hand, and the next."""
_ORDINALS: Final = ("", "first", "second", "third")
_LOOK_AGAIN_S: Final = 1.0


@dataclass(frozen=True)
class Told:
    """Whom the pool tells what happens.

    Attributes:
        say: a line for the training log.
        record: an incident.
        exported: an output, and its files, which are complete and in place.
    """

    say: Callable[[str], None]
    record: Callable[[Incident], None]
    exported: Callable[[Brief, list[Path]], None]


class ExportPool:
    """Used by one thread. See the module.

    Args:
        processes: at most so many; each is started when there is a job for it.
        told: whom it tells.
        timeout_s: how long a job may take; None follows from what others took, at least `TIMEOUT_FLOOR_S`.

    Attributes:
        processes: what it goes on with: one less after the OOM killer took one.
    """

    def __init__(self, processes: int, told: Told, timeout_s: float | None = None) -> None:
        self.processes = processes
        self._told = told
        self._timeout_s = timeout_s
        self._running: list[ExportProcess] = []
        self._jobs: dict[int, Job] = {}  # all that are not settled, by number
        self._queue: deque[Job] = deque()
        self._again: deque[Job] = deque()
        self._failed: list[Failed] = []
        self._done = 0
        self._numbers = 0
        self._swept: set[Path] = set()
        self._slowest_s_per_byte = 0.0
        self._oom = memory.OomCounters.read()

    @property
    def pids(self) -> tuple[int, ...]:
        """Of the processes that run, in the order in which they were started."""
        return tuple(process.pid for process in self._running)

    def submit(self, function: Callable[..., Any], arguments: Sequence[Any]) -> Job:
        """Have a function called; returns at once."""
        call = Call.of(function, arguments)
        output = None
        if call.output is not None:
            output = Output.of(Path(call.output), self._numbers)
            if output.target.parent not in self._swept:
                self._swept.add(output.target.parent)
                remove_abandoned(output.target.parent)
        job = Job(self._numbers, call, call.brief(), output)
        self._numbers += 1
        self._jobs[job.number] = job
        self._queue.append(job)
        self.turn()
        return job

    def turn(self) -> None:
        """Take note of what happened since the last turn, and give out what can be given.

        Returns soon, unless a job is to be done in the trainer: then that is done now.
        """
        for process in list(self._running):
            if not self._listen(process):
                self._bury(process, process.end(patience_s=GOODBYE_S))
            elif process.jobs and time.monotonic() - process.since > (limit_s := self._limit_s(process)):
                self._bury(process, process.condemn(), hung_s=limit_s)
        self._give_out()
        if not self._queue and self._again and not self._busy():
            self._try_again(self._again.popleft())

    def wait(self) -> None:
        """Until something may have happened."""
        now = time.monotonic()
        ends = [process.since + self._limit_s(process) - now for process in self._running if process.jobs]
        poll = select.poll()
        for process in self._running:
            poll.register(process, select.POLLIN)
        poll.poll(1000 * max(0.0, min([_LOOK_AGAIN_S, *ends])))

    def finish(self, jobs: Sequence[Job]) -> None:
        """Wait for these, and if one of them fails, for all others as well.

        Raises:
            ExportError: a job can't be done.
        """
        self._settle_all(jobs)
        if any(job.failed for job in jobs):
            self._settle_all(list(self._jobs.values()))
            raise final_error(self._failed, self._done)

    def close(self) -> None:
        """End all processes, and forget what is not done."""
        self._dismiss(0)
        for job in self._jobs.values():
            job.settle()
        self._jobs.clear()
        self._queue.clear()
        self._again.clear()

    # ---- giving out ----

    def _settle_all(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            while not job.settled:
                self.turn()
                if self._busy():
                    self.wait()

    def _busy(self) -> bool:
        return any(process.jobs for process in self._running)

    def _give_out(self) -> None:
        """To idle processes first, then to new ones, then as the next job of one that is busy."""
        while self._queue and not self._alone():
            process = min(self._running, key=lambda process: len(process.jobs), default=None)
            if (process is None or process.jobs) and len(self._running) < self.processes:
                process = self._start() or process
            if process is None:  # not even one can be started
                self._again.append(self._queue.popleft())
            elif len(process.jobs) < _JOBS_AHEAD:
                self._give(self._queue.popleft(), process)
            else:
                return

    def _alone(self) -> bool:
        """Whether a job is being done that has cost a process before."""
        return any(self._jobs[number].deaths for process in self._running for number in process.jobs)

    def _try_again(self, job: Job) -> None:
        """Nothing else is to be done now."""
        self._dismiss(1)  # who idles has memory
        if job.may_cost_another:
            process = self._running[0] if self._running else self._start()
            if process is not None:
                self._give(job, process)
                return
        if len(job.own_fault) == TRIES:
            self._fail(job, f"its process {job.own_fault[-1].what}, for the second time")
        elif job.own_fault:
            self._fail(job, job.tried())
        else:
            self._dismiss(0)
            self._do_here(job)

    def _start(self) -> ExportProcess | None:
        try:
            process = ExportProcess()
        except OSError as error:
            self._told.say(f"SafeLoader: no process for the validation's exports could be started: {error}")
            return None
        self._running.append(process)
        return process

    def _dismiss(self, kept: int) -> None:
        """End all processes but so many."""
        while len(self._running) > kept:
            process = self._running.pop()
            process.end()
            process.close()

    def _give(self, job: Job, process: ExportProcess) -> None:
        try:
            file = job.spool()
        except OSError as error:
            self._fail_by(job, error)
            return
        job.state = State.GIVEN
        process.give(job.number, file)

    def _limit_s(self, process: ExportProcess) -> float:
        if not process.ready:
            return TIMEOUT_FLOOR_S
        if self._timeout_s is not None:
            return self._timeout_s
        return max(TIMEOUT_FLOOR_S, _TIMES_SLOWEST * self._slowest_s_per_byte * self._jobs[process.jobs[0]].nbytes)

    # ---- what happened ----

    def _listen(self, process: ExportProcess) -> bool:
        """Take in what it says; False at the end of the stream."""
        while True:
            try:
                received = process.receive()
            except BlockingIOError:
                return True
            if received is None:
                return False
            packet, answer = received
            if packet.kind is Kind.READY:
                continue
            job = self._jobs[packet.number]
            if packet.kind is Kind.DONE:
                self._slowest_s_per_byte = max(self._slowest_s_per_byte, packet.seconds / job.nbytes)
                self._complete(job, answer)
                continue
            assert isinstance(answer, Failure)
            if answer.out_of_memory:
                self._lost(job, Death(process.pid, ProcessExit(), packet.seconds, raised=answer.summary))
            else:
                self._fail(job, answer.summary, answer.traceback)

    def _bury(self, process: ExportProcess, end: ProcessExit, hung_s: float | None = None) -> None:
        """A process has ended: what it had in hand was perhaps its death, what it had not begun was not."""
        self._running.remove(process)
        counters = memory.OomCounters.read()
        oom = counters.risen_since(self._oom) if counters.killed_since(self._oom) else None
        self._oom = counters
        if oom is not None and self.processes > 1:
            self.processes -= 1
        jobs = [self._jobs[number] for number in process.jobs]
        for job in reversed(jobs[1:]):
            job.state = State.WAITING
            self._queue.appendleft(job)
        if jobs:
            worked_s = time.monotonic() - process.since
            self._lost(jobs[0], Death(process.pid, end, worked_s, hung_s, oom, stacks=process.stacks()))
        process.close()

    def _lost(self, job: Job, death: Death) -> None:
        """A process died of it, or might have."""
        job.deaths.append(death)
        job.state = State.WAITING
        self._again.append(job)
        action = (
            "it is done again, alone" if job.may_cost_another else f"that was the {_ORDINALS[len(job.deaths)]} time"
        )
        self._told.say(f"SafeLoader: {death.message(job.brief.title, action)}")
        self._told.record(death.incident(job.brief.title, job.brief.case, action))

    # ---- ends of jobs ----

    def _do_here(self, job: Job) -> None:
        """In the trainer: with one thread, beside nothing, and only if memory suffices."""
        budget, needed_nbytes = memory.available(), job.brief.needed_nbytes
        if budget is not None and needed_nbytes is not None and budget.nbytes < needed_nbytes:
            self._fail(
                job,
                f"{job.tried()}, and in the training process it would take at least {memory.gib(needed_nbytes)}, but "
                f"{budget.reason}. Give the job more memory",
            )
            return
        self._told.say(f"SafeLoader: {job.brief.title} is done in the training process, with one thread")
        try:
            function, arguments = codec.decode(private_view(job.spool().fd), job.number)
            value = Call.of(function, arguments).single_threaded().make()
        except Exception as error:  # noqa: BLE001 - as in an export process: it is raised when all others are done
            self._fail_by(job, error)
        else:
            self._complete(job, value)

    def _complete(self, job: Job, value: Any) -> None:
        """It was done: move its files to their place."""
        if job.output is not None:
            try:
                self._told.exported(job.brief, job.output.commit())
            except OSError as error:
                self._fail_by(job, error)
                return
        job.value = value
        self._done += 1
        self._settle(job)

    def _fail_by(self, job: Job, error: Exception) -> None:
        kind, text = describe(error)
        self._fail(job, f"{kind}: {text}", format_remote(error))

    def _fail(self, job: Job, why: str, traceback: str | None = None) -> None:
        job.failed = Failed(job.brief.title, job.brief.case, why, traceback)
        self._failed.append(job.failed)
        self._told.say(f"SafeLoader: {job.brief.title} failed: {why}. The others go on")
        self._settle(job)

    def _settle(self, job: Job) -> None:
        del self._jobs[job.number]
        job.settle()
