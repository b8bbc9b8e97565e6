"""One pool as the supervisor's thread sees it: carries out what its machine decides.

The machine knows numbers; here they have processes, sockets and memory behind them. Everything but `workers`, `slots`
and `waiting_for` runs in the supervisor's thread. Nothing is raised to the training loop from here: errors go to the
consumer.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Protocol

from safeloader import killpoints
from safeloader.config import Options
from safeloader.errors import ClosedError
from safeloader.faults import memory
from safeloader.faults.exits import ProcessExit
from safeloader.faults.incident import Incident
from safeloader.pool import events, machine, records, wire
from safeloader.pool.book import Book
from safeloader.pool.consumer import Consumer
from safeloader.pool.crew import WorkerState
from safeloader.pool.crowd import Effort
from safeloader.pool.events import Cause, Why
from safeloader.pool.failure import FailureRecord
from safeloader.pool.launch import ForkRequest
from safeloader.pool.life import Life, absent
from safeloader.pool.memory_watch import Fit, MemoryWatch, OomWatch, Ring, fit, growth_nbytes
from safeloader.pool.relay import Relay
from safeloader.pool.work import Work
from safeloader.report import log
from safeloader.report.audit import Audit, Header
from safeloader.report.errand import Errand
from safeloader.report.stats import WorkerInfo
from safeloader.ring import codec
from safeloader.ring.bookmark import Bookmark
from safeloader.ring.memfile import MemoryFile
from safeloader.ring.status_page import StatusPage

_AVOID_AT_ONCE: Final = 100
"""Cases in one `Avoid`: a message must stay small."""
_MEASUREMENTS: Final = 3
"""How often a worker is measured in vain before all start."""
_FIGURES_FOR_S: Final = 1.0
"""Figures of memory and descriptors in an incident are at most so old."""


class Host(Protocol):
    """What a pool needs of the supervisor."""

    def request_worker(self, life: Life, request: ForkRequest) -> None:
        """Have a nursery fork this worker."""

    def cancel_worker(self, life: Life) -> bool:
        """Take a request back; False if it has gone to the nursery already."""

    def kill_worker(self, life: Life, *, stacks: bool = False) -> None:
        """Have the worker's parent kill it; with `stacks`, after it has written them onto its page."""

    def suspect_nursery(self, life: Life) -> None:
        """The worker was killed and does not end: see whether that is its nursery's fault."""

    def watch(self, life: Life) -> None:
        """Call `life.pool.on_readable(life)` when the worker has said something, and serve its relay."""

    def unwatch(self, life: Life) -> None:
        """The reverse."""

    def post(self, call: Callable[[], None]) -> None:
        """From any thread: have the supervisor's thread make this call."""


class Pool:
    """A pool's processes, memory and statistics.

    Attributes:
        lock: held while anything below changes.
        finished: set when the pool has ended and nothing of it is left but leased memory.
        use_fork: whether its workers come from a nursery forked from the trainer.
        stuck_nurseries: how many did not answer in time, because of its loader or their imports.
        packed: the pickled loader's file and size, for the clean nursery.
        book: its incidents.
        due: when the machine is to be asked again, whatever happens, on `time.monotonic`'s clock; None is never.
    """

    def __init__(
        self,
        number: int,
        options: Options,
        limits: machine.Limits,
        *,
        seed: int,
        work: Work,
        packed: tuple[MemoryFile, int] | None,
        consumer: Consumer,
        memory_watch: MemoryWatch,
        oom_watch: OomWatch,
        quarantined: Iterable[str] = (),
        numpy_seeds: Sequence[int | None] = (),
        on_incident: Callable[[Incident], None] | None = None,
    ) -> None:
        self.number = number
        self.options = options
        self.seed = seed
        self.work = work
        self.packed = packed
        self.use_fork = packed is None
        self.stuck_nurseries = 0
        self.consumer = consumer
        self.lock = threading.RLock()
        self.finished = threading.Event()
        self.due: float | None = None
        self.lives: dict[int, Life] = {}
        self.book = Book(options.name, options.folder, on_incident)
        self._audit: Audit | None = None
        if options.audit:
            assert options.folder is not None, "`resolve` has seen to it"
            header = Header(options.name, seed, options.stream, consumer.next_ticket)
            self._audit = Audit(options.folder, header)
            consumer.record = self._audit.delivered
        self.machine = machine.Machine(
            limits, first_ticket=consumer.next_ticket, quarantined=dict.fromkeys([*quarantined, *self.book.quarantined])
        )
        self._memory = memory_watch
        self._oom = oom_watch
        self._to_measure = 0 if limits.own_lanes else _MEASUREMENTS
        self._measuring = False
        self._makers: dict[int, int] = {}  # pids by ticket, while there is something to measure
        self._figures: tuple[float, dict[str, Any]] = (-math.inf, {})
        self._has_worked = False
        self._failed_starts = 0  # with an exception
        self._host: Host | None = None
        self._slots: dict[int, MemoryFile] = {}
        self._numpy_seeds = tuple(numpy_seeds)
        self._bookmarks: dict[int, Bookmark] = {}  # by worker, in lanes of their own
        self._cwd: str | None = None
        with contextlib.suppress(FileNotFoundError):
            self._cwd = os.getcwd()

    @property
    def name(self) -> str:
        """What people call the pool."""
        return self.options.name

    def open(self, host: Host) -> None:
        """Start the workers."""
        self._host = host
        self.step(events.Tick())

    # ---- events ----

    def step(self, *happened: events.Event) -> None:
        """Feed the machine and do what it says; what that causes at once is fed as well."""
        with self.lock:
            queue = deque(happened)
            while queue:
                event, news = queue.popleft(), list(self.consumer.news())
                for action in self.machine.handle(event, time.monotonic(), news):
                    try:
                        queue.extend(self._carry_out(action))
                    except OSError as error:
                        self.consumer.fail(records.out_of_resources(self.name, error))
                        queue.append(events.Close(failed=True))
                        break
            self.consumer.wants_slots = self.machine.wants_slots
            self.due = self.machine.next_wake()
            if len(self.lives) > self.machine.running:
                for life in list(self.lives.values()):
                    if self.machine.worker_state(life.worker) in (WorkerState.DOWN, WorkerState.RESTING):
                        self._bury(life)
            if self.machine.state is machine.PoolState.CLOSED:
                self.consumer.drop()  # after a failure, what is ready is still delivered

    def tick(self) -> None:
        """Time has passed, or the consumer has taken something."""
        self._oom.sample()
        grown = self._memory.grown(self.lives.values())
        if grown is not None:
            self.step(events.Grown(grown.worker, grown.incarnation))
        if self.consumer.ended or (self.due is not None and self.due <= time.monotonic()):
            self.step(events.Tick())

    def on_forked(self, message: wire.Forked) -> None:
        """The nursery has made a worker."""
        with self.lock:
            life = self._life(message.worker, message.incarnation)
            if life is not None:
                life.pid = message.pid

    def on_readable(self, life: Life) -> None:
        """A worker has said something, or has closed its socket."""
        with self.lock:
            if life.buried:  # by what the same turn has heard before
                return
            said = self._hear(life) or ()  # what follows keeps the socket readable
            if life.silent:
                self._the_host.unwatch(life)
            self.step(*said)

    def on_gone(
        self,
        worker: int,
        incarnation: int,
        how: ProcessExit,
        *,
        proven: bool,
        counts: bool = True,
        cause: Cause | None = None,
        words: str | None = None,
    ) -> None:
        """A worker has ended. What it said before is taken in first.

        `proven`, `counts`: see `events.Exited`. `cause` and `words` say what is known where the kernel says nothing.
        """
        with self.lock:
            life = self._life(worker, incarnation)
            if life is None:
                return
            said: list[events.Event] = []
            while (more := self._hear(life)) is not None:
                said += more
            life.exit, life.words = how, words or life.words
            self.step(*said, self._exited(life, proven=proven, counts=counts, cause=cause))

    def _exited(self, life: Life, *, proven: bool, counts: bool = True, cause: Cause | None = None) -> events.Exited:
        status = life.page.read()
        ours = life.condemned is not None or self.machine.state is not machine.PoolState.RUNNING
        if life.exit.signal == "SIGKILL" and not ours:
            life.oom, life.oom_known = self._oom.claim()
        if cause is None:
            cause = life.cause()
        return events.Exited(
            life.worker, life.incarnation, cause, proven, counts, ticket=status.ticket, case=status.culprit
        )

    def on_nursery_death(self, pid: int, how: ProcessExit, what: str, stderr_tail: str | None) -> None:
        """The process that forks the workers has died; the workers' own exits follow."""
        with self.lock:
            self._note(records.nursery_death(self.name, pid=pid, how=how, what=what, stderr_tail=stderr_tail))

    def on_start_failed(self, reason: str, traceback: str) -> None:
        """No worker can start with this loader: trying again would not help."""
        self.fail(records.start_failed(self.name, reason, traceback))

    def fail(self, error: BaseException) -> None:
        """End the stream with an error."""
        self.consumer.fail(error)
        self.step(events.Close(failed=True))

    def close(self) -> None:
        """End the stream on request."""
        killpoints.reach("trainer.step.closing")
        self.consumer.fail(ClosedError(f"pool {self.name!r} is closed"))
        self.step(events.Close())

    def dispose(self) -> None:
        """Free what is left, once no worker is."""
        with self.lock:
            for life in list(self.lives.values()):
                self._bury(life)
            for slot in self._slots.values():
                slot.close()
            self._slots.clear()
            self.consumer.slots_closed()
            for bookmark in self._bookmarks.values():
                bookmark.close()
            self._bookmarks.clear()
            if self.packed is not None:
                self.packed[0].close()
        self.book.close()  # without the lock: it may wait for a moment
        if self._audit is not None:
            self._audit.close()
        self.finished.set()

    # ---- any thread ----

    def workers(self) -> tuple[WorkerInfo, ...]:
        """What each worker is doing now; one that rests, or waits to be started again, has no pid."""
        with self.lock:
            return tuple(self._worker_info(worker) for worker in range(self.machine.limits.workers))

    def _worker_info(self, worker: int) -> WorkerInfo:
        life, state = self.lives.get(worker), self.machine.worker_state(worker).value
        return absent(worker, self.machine.incarnation(worker), state) if life is None else life.info(state)

    def waiting_for(self, ticket: int) -> str:
        """Who has this ticket, and what it is doing with it, as a sentence."""
        with self.lock:
            holder = self.machine.holder(ticket)
            life = None if holder is None else self.lives.get(holder)
            if life is None:
                return f"no worker has ticket {ticket} yet"
            status = life.page.read()
            doing = records.doing(status)
            ahead = "" if status.ticket == ticket else f", and ticket {ticket} comes next"
            return f"worker {life.title} (pid {life.pid}) is {doing}{ahead}"

    def slots(self) -> dict[str, int]:
        """How many slots are free, filling, ready and leased."""
        with self.lock:
            counts = {state.name.lower(): count for state, count in self.machine.slots().items()}
            # What the consumer has taken and let go since the machine's last event.
            taken = max(0, counts["ready"] - self.consumer.ready)
            ended = min(self.consumer.ended, counts["leased"] + taken)
            counts["ready"] -= taken
            counts["leased"] += taken - ended
            counts["free"] += ended
            return counts

    # ---- actions ----

    @property
    def _the_host(self) -> Host:
        assert self._host is not None, "the pool was opened"
        return self._host

    def _life(self, worker: int, incarnation: int) -> Life | None:
        life = self.lives.get(worker)
        return life if life is not None and life.incarnation == incarnation else None

    def _carry_out(self, action: events.Action) -> list[events.Event]:
        """Do one thing; returns events that follow at once."""
        match action:
            case events.Produce(worker, ticket, slot, attempt):
                self._produce(self.lives[worker], ticket, slot, attempt)
            case events.Deliver(ticket, slot, failed):
                self.consumer.put(ticket, slot, self._slots[slot], failed=failed)
                if not failed:
                    self._on_batch(ticket)
            case events.CreateSlot(slot):
                self._slots[slot] = MemoryFile.create(f"safeloader-slot-{slot}")
            case events.DiscardSlot(slot) if slot in self._slots:
                self._slots.pop(slot).close()
            case events.Start(worker, incarnation):
                self._start(worker, incarnation)
            case events.Stop() | events.Inspect() | events.Condemn() | events.Abandon() | events.Retire():
                return self._deal_with(action)
            case _:
                self._record(action)
        return []

    def _deal_with(
        self, action: events.Stop | events.Inspect | events.Condemn | events.Abandon | events.Retire
    ) -> list[events.Event]:
        match action:
            case events.Stop(worker, incarnation):
                return self._stop(worker, incarnation)
            case events.Inspect(worker, incarnation):
                return self._inspect(worker, incarnation)
            case events.Condemn(worker):
                self.lives[worker].condemn(action)
                self._the_host.kill_worker(self.lives[worker], stacks=True)
            case events.Abandon(worker):
                return self._abandon(self.lives[worker])
            case events.Retire(worker):
                self._retire(self.lives[worker], rests=action.rests)
        return []

    def _start(self, worker: int, incarnation: int) -> None:
        previous = self.lives.pop(worker, None)
        if previous is not None:
            self._bury(previous)
        course, bookmark_fd = self._take_up(worker)
        page = StatusPage.create()
        try:
            ours, theirs = wire.Channel.pair()
            relay, stderr_fd = Relay.create()
        except OSError:
            page.close()
            raise
        nursery = self.number if self.use_fork else None
        life = Life(self, worker, incarnation, ours, page, relay, nursery)
        self.lives[worker] = life
        order = wire.Fork(
            pool=self.number,
            worker=worker,
            incarnation=incarnation,
            title=f"sl-{self.name[:9]}-{worker}",
            cwd=self._cwd,
            seed=self.seed,
            stream=self.options.stream,
            course=course,
            audit=self._audit is not None,
        )
        self._the_host.watch(life)
        self._the_host.request_worker(life, ForkRequest(order, theirs, life.page.fd, stderr_fd, bookmark_fd))

    def _take_up(self, worker: int) -> tuple[wire.Course | None, int | None]:
        """For a worker with a lane of its own: where the one before it has left off."""
        if not self.machine.limits.own_lanes:
            return None, None
        previous = self._bookmarks.get(worker)
        self._bookmarks[worker] = Bookmark.create(previous)
        if previous is not None:
            previous.close()
        return wire.Course(self.machine.limits.lanes, self._numpy_seeds[worker]), self._bookmarks[worker].fd

    def _stop(self, worker: int, incarnation: int) -> list[events.Event]:
        life = self._life(worker, incarnation)
        if life is None or self._the_host.cancel_worker(life):
            return [events.Exited(worker, incarnation)]
        self._the_host.kill_worker(life)
        return []

    def _inspect(self, worker: int, incarnation: int) -> list[events.Event]:
        life = self._life(worker, incarnation)
        if life is None:
            return []
        # One that was not forked yet is its nursery's business.
        since = time.monotonic() if life.pid is None else life.page.read().since
        return [events.Seen(worker, incarnation, since)]

    def _abandon(self, life: Life) -> list[events.Event]:
        self._the_host.suspect_nursery(life)
        life.words = "was killed and does not end"
        return [self._exited(life, proven=False, cause=Cause.NURSERY)]

    def _retire(self, life: Life, *, rests: bool) -> None:
        if not rests:
            grown, limit = growth_nbytes(life), self._memory.growth_nbytes
            self._note(records.recycled(self.name, life.worker, life.pid, grown_nbytes=grown, limit_nbytes=limit))
        with contextlib.suppress(wire.ChannelClosedError):
            life.channel.send(wire.Retire())

    def _on_batch(self, ticket: int) -> None:
        """A batch was made: the first one tells how much memory a worker takes."""
        self.book.settle()
        self._has_worked = True
        maker = self._makers.pop(ticket, None)
        if maker is None or self._measuring or self._to_measure == 0:
            return
        self._measuring = True
        self._to_measure -= 1
        largest_nbytes = max(slot.nbytes for slot in self._slots.values())
        now_nbytes = sum(os.fstat(slot.fd).st_blocks * 512 for slot in self._slots.values())
        limits, host = self.machine.limits, self._the_host
        ring = Ring(now_nbytes, largest_nbytes, largest_nbytes * limits.slots)

        def measure() -> None:
            host.post(functools.partial(self._on_measured, fit(maker, ring, limits.workers, limits.reserve)))

        if not Errand("safeloader-measure", measure).go():  # no thread to be had
            host.post(functools.partial(self._on_measured, None))

    def _on_measured(self, fitting: Fit | None) -> None:
        """So much fits."""
        with self.lock:
            self._measuring = False
            if self.machine.state is not machine.PoolState.RUNNING:
                return
            wanted = self.machine.limits.workers
            if fitting is None:
                if self._to_measure:  # the next batch's maker may still be there
                    return
                fitting = Fit(wanted, self.machine.limits.reserve, "")
            if self.machine.limits.begin_with is None:  # memory is plentiful: all have begun
                fitting = fitting._replace(workers=wanted)
            self._to_measure = 0
            if fitting.workers < wanted:
                resize = events.Resize(fitting.workers, wanted, Why.MEMORY)
                self._note(records.resized(self.name, resize, fitting.reason))
            self.step(events.Budget(fitting.workers, fitting.reserve))

    def _produce(self, life: Life, ticket: int, slot: int, attempt: int) -> None:
        fds = [] if slot in life.known_slots else [self._slots[slot].fd]
        life.known_slots.add(slot)
        with contextlib.suppress(wire.ChannelClosedError):  # its exit is on the way, and brings the ticket back
            life.channel.send(wire.Produce(ticket, slot, attempt), fds)

    def _avoid(self, life: Life, cases: Iterable[str]) -> None:
        names = list(cases)
        with contextlib.suppress(wire.ChannelClosedError):
            for at in range(0, len(names), _AVOID_AT_ONCE):
                life.channel.send(wire.Avoid(tuple(names[at : at + _AVOID_AT_ONCE])))

    def _hear(self, life: Life) -> list[events.Event] | None:
        """What follows from the next thing that the worker has said; None if it has said nothing since."""
        try:
            message = None if life.silent else life.channel.hear()
        except wire.ChannelClosedError:
            life.silent = True
            return None
        return None if message is None else self._understood(life, message)

    def _understood(self, life: Life, message: wire.Message) -> list[events.Event]:
        match message:
            case wire.Done(ticket, slot, cases, effort, checksum, parts):
                if self._to_measure and life.pid is not None:
                    self._makers[ticket] = life.pid
                if self._audit is not None and checksum is not None:
                    self._audit.made(ticket, cases, checksum, parts)
                known = None if effort is None else Effort(*effort)
                return [events.Finished(life.worker, life.incarnation, ticket, slot, cases, effort=known)]
            case wire.Failed(ticket, slot):
                return [self._failed(life, ticket, slot)]
            case wire.Ready(cases, cpus):
                self._avoid(life, self.machine.blame.quarantined)
                return [events.Ready(life.worker, life.incarnation, cases, cpus)]
            case wire.StartFailed(reason, traceback):
                self._on_start_failed(life, reason, traceback)
                return []
            case _:
                raise AssertionError(f"not from a worker: {message}")

    def _on_start_failed(self, life: Life, reason: str, traceback: str) -> None:
        """The loader raised at the start; the second time before any batch, it always will."""
        life.words = f"could not start: {reason}"
        self._failed_starts += 1
        if self._failed_starts > 1 and not self._has_worked:
            self.on_start_failed(reason, traceback)

    def _failed(self, life: Life, ticket: int, slot: int) -> events.Finished:
        """The ticket's slot holds a record: what it says decides what is done."""
        record = codec.decode(codec.private_copy(memoryview(self._slots[slot].map())), ticket)
        assert isinstance(record, FailureRecord)
        life.failures[ticket] = record
        return events.Finished(life.worker, life.incarnation, ticket, slot, failure=record.failure)

    def _bury(self, life: Life) -> None:
        """Close what this side holds of a worker that is gone."""
        if life.buried:
            return
        life.buried = True
        if self.lives.get(life.worker) is life:
            del self.lives[life.worker]
        self._the_host.unwatch(life)
        life.relay.drain()
        life.close()

    # ---- records ----

    def _record(self, action: events.Action) -> None:
        """What a person is to know of."""
        name, book = self.name, self.book
        match action:
            case events.Mourn():
                self._mourn(action)
            case events.Retry():
                self._retry(action)
            case events.Quarantine(case):
                self._quarantine(case)
                self._note(records.quarantined(name, action, book.last, book.file))
            case events.Redraw():
                self._note(records.redrawn(name, action))
            case events.Outage():
                self._note(records.outage(name, action))
            case events.Resize(_, _, why) if not action.after_measuring:
                self._note(records.resized(name, action), quietly=why is Why.QUIET)
            case events.Rest():
                log.say(logging.INFO, records.resting(name, action, self.options.rest_after_s))
            case events.SwitchMethod():
                self.use_fork = True
                self._note(records.switched(name, to_fork=True))
            case events.GiveUp():
                self.consumer.fail(records.given_up(name, action, book.since_batch))

    def _retry(self, retry: events.Retry) -> None:
        record = self.lives[retry.worker].failures.pop(retry.ticket)
        # In an outage one line is enough; and before anything has worked, the error itself is about to come.
        quietly = self.machine.blame.outage_since is not None or not self._has_worked
        self._note(records.retried(self.name, retry, record), quietly=quietly)

    def _quarantine(self, case: str) -> None:
        for life in self.lives.values():
            if self.machine.worker_state(life.worker) is WorkerState.READY:
                self._avoid(life, [case])

    def _mourn(self, mourn: events.Mourn) -> None:
        life = self.lives[mourn.worker]
        incident = records.worker_death(self.name, mourn, life.end(memory.figures().to_dict()))
        # A nursery's death is logged as one line; its workers' need no line each.
        self._note(incident, quietly=mourn.cause is Cause.NURSERY and not life.condemned)

    def _note(self, incident: Incident, *, quietly: bool = False) -> None:
        """Put it into the book, with the figures of now."""
        if incident.figures is None:
            if time.monotonic() - self._figures[0] > _FIGURES_FOR_S:
                self._figures = (time.monotonic(), memory.figures().to_dict())
            incident = dataclasses.replace(incident, figures=self._figures[1])
        self.book.add(incident, quietly=quietly)
