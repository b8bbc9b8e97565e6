"""One pool as the supervisor's thread sees it: carries out what its machine decides.

The machine knows numbers; here they have processes, sockets and memory behind them. Everything but `snapshot` runs
in the supervisor's thread. Nothing is raised to the training loop from here: errors go to the consumer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Final, Protocol

import psutil

from safeloader import killpoints
from safeloader.config import Options
from safeloader.errors import ClosedError
from safeloader.faults.exits import ProcessExit
from safeloader.faults.incident import Incident
from safeloader.pool import events, machine, records, wire
from safeloader.pool.consumer import Consumer
from safeloader.pool.launch import ForkRequest
from safeloader.pool.work import Work
from safeloader.report.stats import WorkerInfo
from safeloader.ring.memfile import MemoryFile
from safeloader.ring.status_page import Stage, Status, StatusPage

logger = logging.getLogger("safeloader")

MAX_INCIDENTS: Final = 1000
"""Incidents kept in full per pool; beyond, the oldest are only counted."""


class Host(Protocol):
    """What a pool needs of the supervisor."""

    def request_worker(self, pool: Pool, request: ForkRequest) -> None:
        """Have a nursery fork this worker."""

    def cancel_worker(self, pool: Pool, worker: int) -> bool:
        """Take a request back; False if it has gone to the nursery already."""

    def kill_worker(self, pool: Pool, worker: int, incarnation: int) -> None:
        """Have the worker's parent kill it."""

    def watch(self, life: Life) -> None:
        """Call `life.pool.on_readable(life)` when the worker has said something."""

    def unwatch(self, life: Life) -> None:
        """The reverse."""


@dataclass
class Life:
    """One incarnation of a worker, from the request to fork it to its end."""

    pool: Pool
    worker: int
    incarnation: int
    channel: wire.Channel
    page: StatusPage
    pid: int | None = None
    known_slots: set[int] = field(default_factory=set)
    exit: ProcessExit = field(default_factory=ProcessExit)
    cause: str | None = None
    silent: bool = False
    """Its end of the socket is closed: it has ended, or is about to."""
    watched: bool = False
    buried: bool = False


class Pool:
    """A pool's processes, memory and statistics.

    Attributes:
        lock: held while anything below changes.
        finished: set when the pool has ended and nothing of it is left but leased memory.
        use_fork: whether its workers come from a nursery forked from the trainer.
        packed: the pickled loader's file and size, for the clean nursery.
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
    ) -> None:
        self.number = number
        self.options = options
        self.seed = seed
        self.work = work
        self.packed = packed
        self.use_fork = packed is None
        self.consumer = consumer
        self.lock = threading.RLock()
        self.finished = threading.Event()
        self.incidents: deque[Incident] = deque(maxlen=MAX_INCIDENTS)
        self.incident_kinds: Counter[str] = Counter()
        self.lives: dict[int, Life] = {}
        self.machine = machine.Machine(limits, first_ticket=consumer.next_ticket)
        self._host: Host | None = None
        self._slots: dict[int, MemoryFile] = {}
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
            queue = deque([*self.consumer.released(), *happened])
            while queue:
                for action in self.machine.handle(queue.popleft(), time.monotonic()):
                    try:
                        queue.extend(self._carry_out(action))
                    except OSError as error:
                        self.consumer.fail(records.out_of_resources(self.name, error))
                        queue.append(events.Close(failed=True))
                        break
            if self.machine.state is machine.PoolState.CLOSED:
                self.consumer.drop()  # after a failure, what is ready is still delivered

    def on_forked(self, message: wire.Forked) -> None:
        """The nursery has made a worker."""
        with self.lock:
            life = self._life(message.worker, message.incarnation)
            if life is not None:
                life.pid = message.pid

    def on_readable(self, life: Life) -> None:
        """A worker has said something, or has closed its socket."""
        with self.lock:
            said = self._drain(life)
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
        cause: str | None = None,
    ) -> None:
        """A worker has ended. What it said before is taken in first. `proven`, `counts`: see `events.Exited`."""
        with self.lock:
            life = self._life(worker, incarnation)
            if life is None:
                return
            said = self._drain(life)
            life.exit, life.cause = how, cause
            self.step(*said, events.Exited(worker, incarnation, proven, counts))
            self._bury(life)
            self.step(events.Tick())

    def on_nursery_death(self, pid: int, how: ProcessExit, what: str) -> None:
        """The process that forks the workers has died; the workers' own exits follow."""
        with self.lock:
            self._record(records.nursery_death(self.name, pid=pid, how=how, what=what))

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
            if self.packed is not None:
                self.packed[0].close()
        self.finished.set()

    # ---- any thread ----

    def workers(self) -> tuple[WorkerInfo, ...]:
        """What each worker is doing now; one that waits to be started again has no pid."""
        with self.lock:
            return tuple(self._worker_info(worker) for worker in range(self.machine.limits.workers))

    def _worker_info(self, worker: int) -> WorkerInfo:
        life = self.lives.get(worker)
        status = Status(Stage.STARTING, None, None, time.monotonic(), 0) if life is None else life.page.read()
        pid = None if life is None else life.pid
        memory_nbytes = None
        if pid is not None:
            with contextlib.suppress(psutil.Error):
                memory_nbytes = psutil.Process(pid).memory_info().rss
        return WorkerInfo(
            worker=worker,
            pid=pid,
            incarnation=max(0, self.machine.incarnation(worker)),
            state=self.machine.worker_state(worker).value,
            stage=status.stage.word,
            ticket=status.ticket,
            case=status.case,
            since_s=max(0.0, time.monotonic() - status.since),
            batches=status.batches,
            memory_nbytes=memory_nbytes,
        )

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
            case events.Start(worker, incarnation):
                return self._start(worker, incarnation)
            case events.Stop(worker, incarnation):
                return self._stop(worker, incarnation)
            case events.Produce(worker, ticket, slot):
                self._produce(self.lives[worker], ticket, slot)
            case events.CreateSlot(slot):
                self._slots[slot] = MemoryFile.create(f"safeloader-slot-{slot}")
            case events.DiscardSlot(slot) if slot in self._slots:
                self._slots.pop(slot).close()
            case events.Deliver(ticket, slot, failed):
                self.consumer.put(ticket, slot, self._slots[slot].map(), failed=failed)
            case events.Mourn():
                self._mourn(action)
            case events.GiveUp():
                self.consumer.fail(records.given_up(self.name, self.machine.limits, action, list(self.incidents)))
        return []

    def _start(self, worker: int, incarnation: int) -> list[events.Event]:
        previous = self.lives.pop(worker, None)
        if previous is not None:
            self._bury(previous)
        ours, theirs = wire.Channel.pair()
        life = Life(self, worker, incarnation, ours, StatusPage.create())
        self.lives[worker] = life
        order = wire.Fork(
            pool=self.number,
            worker=worker,
            incarnation=incarnation,
            title=f"sl-{self.name[:9]}-{worker}",
            cwd=self._cwd,
            seed=self.seed,
            stream=self.options.stream,
        )
        self._the_host.watch(life)
        self._the_host.request_worker(self, ForkRequest(order, theirs, life.page.fd))
        return []

    def _stop(self, worker: int, incarnation: int) -> list[events.Event]:
        life = self._life(worker, incarnation)
        if life is None or self._the_host.cancel_worker(self, worker):
            if life is not None:
                self._bury(life)
            return [events.Exited(worker, incarnation)]
        self._the_host.kill_worker(self, worker, incarnation)
        return []

    def _produce(self, life: Life, ticket: int, slot: int) -> None:
        fds = [] if slot in life.known_slots else [self._slots[slot].fd]
        life.known_slots.add(slot)
        with contextlib.suppress(wire.ChannelClosedError):  # its exit is on the way, and brings the ticket back
            life.channel.send(wire.Produce(ticket, slot), fds)

    def _drain(self, life: Life) -> list[events.Event]:
        """Everything that the worker has said since."""
        said: list[events.Event] = []
        while not life.silent:
            try:
                received = life.channel.receive(wait=False)
            except wire.ChannelClosedError:
                life.silent = True
                break
            if received is None:
                break
            match received[0]:
                case wire.Ready():
                    said.append(events.Ready(life.worker, life.incarnation))
                case wire.Done(ticket, slot):
                    said.append(events.Finished(life.worker, life.incarnation, ticket, slot))
                case wire.Failed(ticket, slot):
                    said.append(events.Finished(life.worker, life.incarnation, ticket, slot, failed=True))
                case wire.StartFailed(reason, traceback):
                    self.on_start_failed(reason, traceback)
        return said

    def _bury(self, life: Life) -> None:
        """Close what this side holds of a worker that is gone."""
        if life.buried:
            return
        life.buried = True
        if self.lives.get(life.worker) is life:
            del self.lives[life.worker]
        self._the_host.unwatch(life)
        life.channel.close()
        life.page.close()

    # ---- records ----

    def _mourn(self, mourn: events.Mourn) -> None:
        life = self.lives[mourn.worker]
        incident = records.worker_death(
            self.name, mourn, pid=life.pid, how=life.exit, cause=life.cause, status=life.page.read()
        )
        # A nursery's death is logged as one line; its workers' need no line each.
        self._record(incident, level=logging.INFO if life.cause else logging.WARNING)

    def _record(self, incident: Incident, level: int = logging.WARNING) -> None:
        self.incidents.append(incident)
        self.incident_kinds[incident.kind] += 1
        logger.log(level, "SafeLoader: %s", incident.message)
