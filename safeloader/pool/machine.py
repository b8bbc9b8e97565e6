"""The machine: everything that decides a worker's, a ticket's or a slot's fate, and nothing else.

Events and `now` go in, actions come out. No clock, process, thread or descriptor is in here, so every race is a
list of events in a test. The supervisor feeds it and carries out its actions.

A worker's life (`_Worker.state`):

    STARTING ──Ready──► READY ──Exited──► DOWN ──its time comes──► STARTING (next incarnation)
        └──────Exited──────────────────────▲

A slot's life (`_Slot.state`); a slot has one owner at any time:

    FREE ──Produce──► FILLING(worker, ticket) ──Done, Failed──► READY ──Taken──► LEASED ──Released──► FREE
      ▲                     │ worker Exited
      └─────────────────────┘   (discarded instead if nobody can prove that the worker writes no more)

A ticket's life: issued in ascending order, lost tickets first → READY → taken exactly once, in order.

Sizes. There are at most workers + 2 x num_cached slots. The consumer leases no more than `Limits.max_leases` of them
(beyond that it gets copies), so workers always have some. A lost ticket has a slot kept for it: otherwise the others'
READY slots could wait for it for ever.

Restarts. A death is replaced at once; the same worker's next ones after a growing back-off, until the pool makes a
batch while this worker is ready. If the whole pool dies more than `max_restarts` times in `window_s` with no batch in
between, it is given up; a worker that dies before it is ready counts towards a smaller limit. A worker that was idle is
not evidence against the pool, so it does not count; of the workers that go down with their nursery, one counts.
"""

from __future__ import annotations

import heapq
from collections import deque
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

from safeloader.pool.events import (
    Action,
    Close,
    CreateSlot,
    Deliver,
    DiscardSlot,
    Event,
    Exited,
    Finished,
    GiveUp,
    Mourn,
    Produce,
    Ready,
    Released,
    Start,
    Stop,
    Taken,
    Tick,
)

TICKETS_AHEAD: Final = 2
"""Tickets that a worker holds at most: one in work, one so that it need not wait for the trainer."""


class WorkerState(str, Enum):
    """See the module's diagram."""

    STARTING = "starting"
    READY = "ready"
    DOWN = "down"


class SlotState(Enum):
    """See the module's diagram."""

    FREE = auto()
    FILLING = auto()
    READY = auto()
    LEASED = auto()


class PoolState(str, Enum):
    """`FAILED` and `CLOSED` are final; in both, no worker is started again."""

    RUNNING = "running"
    FAILED = "failed"
    CLOSED = "closed"


@dataclass(frozen=True)
class Limits:
    """The machine's constants, in units of its clock (seconds)."""

    workers: int
    num_cached: int
    max_restarts: int
    window_s: float
    backoff_first_s: float
    backoff_max_s: float

    @property
    def slots(self) -> int:
        """The size of the ring."""
        return self.workers + 2 * self.num_cached

    @property
    def max_leases(self) -> int:
        """Slots that the consumer may hold: at least the batch in use and the next one; never all."""
        return max(2, self.num_cached)

    @property
    def max_failed_starts(self) -> int:
        """Deaths before `Ready`, with nobody getting ready in between: each worker may fail once, and two more."""
        return self.workers + 2


@dataclass
class _Worker:
    index: int
    state: WorkerState = WorkerState.DOWN
    incarnation: int = -1
    restart_at: float = 0.0
    assigned: deque[tuple[int, int]] = field(default_factory=deque)  # (ticket, slot), oldest first
    deaths: deque[float] = field(default_factory=deque)  # since the pool's last batch while it was ready


@dataclass
class _Slot:
    state: SlotState = SlotState.FREE
    worker: int | None = None
    ticket: int | None = None


class Machine:
    """The state machine of one pool. Not thread-safe.

    Attributes:
        state: whether the pool runs.
        restarts: workers started beyond the first of each.
    """

    def __init__(self, limits: Limits, *, first_ticket: int = 0) -> None:
        self.limits = limits
        self.state = PoolState.RUNNING
        self.restarts = 0
        self._workers = [_Worker(index) for index in range(limits.workers)]
        self._slots: dict[int, _Slot] = {}
        self._slots_made = 0
        self._next_ticket = first_ticket
        self._lost: list[int] = []  # a heap
        self._deaths: deque[float] = deque()  # of the pool, since its last batch
        self._failed_starts = 0  # since anybody got ready or made a batch
        self._actions: list[Action] = []

    # ---- what the supervisor and people may ask ----

    def worker_state(self, worker: int) -> WorkerState:
        """The worker's state."""
        return self._workers[worker].state

    def incarnation(self, worker: int) -> int:
        """The worker's current life, or -1 before the first."""
        return self._workers[worker].incarnation

    def slots(self) -> dict[SlotState, int]:
        """How many slots are in each state."""
        return {state: sum(slot.state is state for slot in self._slots.values()) for state in SlotState}

    @property
    def stopped(self) -> bool:
        """Whether the pool has ended and no worker is left."""
        return self.state is not PoolState.RUNNING and all(w.state is WorkerState.DOWN for w in self._workers)

    def next_wake(self) -> float | None:
        """When a `Tick` will change something, on the caller's clock."""
        if self.state is not PoolState.RUNNING:
            return None
        return min((w.restart_at for w in self._workers if w.state is WorkerState.DOWN), default=None)

    # ---- the one entrance ----

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take in one event; events about earlier incarnations are ignored."""
        self._actions = []
        match event:
            case Ready(worker, incarnation):
                self._on_ready(worker, incarnation)
            case Finished():
                self._on_finished(event)
            case Exited():
                self._on_exited(event, now)
            case Taken(ticket):
                self._on_taken(ticket)
            case Released(slot):
                self._on_released(slot)
            case Tick():
                pass
            case Close(failed):
                self._on_close(PoolState.FAILED if failed else PoolState.CLOSED)
        if self.state is PoolState.RUNNING:
            self._start_workers(now)
            self._assign_lost()
            self._assign_new()
        self._trim()
        return self._actions

    # ---- events ----

    def _current(self, worker: int, incarnation: int) -> _Worker | None:
        known = self._workers[worker]
        return known if known.incarnation == incarnation and known.state is not WorkerState.DOWN else None

    def _on_ready(self, index: int, incarnation: int) -> None:
        worker = self._current(index, incarnation)
        if worker is not None:
            worker.state = WorkerState.READY
            self._failed_starts = 0

    def _on_finished(self, event: Finished) -> None:
        worker = self._current(event.worker, event.incarnation)
        if worker is None or (event.ticket, event.slot) not in worker.assigned:
            return
        worker.assigned.remove((event.ticket, event.slot))
        for ready in self._workers:
            if ready.state is WorkerState.READY:
                ready.deaths.clear()
        self._deaths.clear()
        self._failed_starts = 0
        if self.state is PoolState.RUNNING:
            self._slots[event.slot] = _Slot(SlotState.READY, ticket=event.ticket)
            self._actions.append(Deliver(event.ticket, event.slot, event.failed))
        else:
            self._slots[event.slot] = _Slot()

    def _on_exited(self, event: Exited, now: float) -> None:
        worker = self._current(event.worker, event.incarnation)
        if worker is None:
            return
        tickets = tuple(ticket for ticket, _ in worker.assigned)
        was_idle = worker.state is WorkerState.READY and not tickets
        failed_start = worker.state is WorkerState.STARTING and event.counts
        for ticket, slot in worker.assigned:
            heapq.heappush(self._lost, ticket)
            self._slots[slot] = _Slot()
            if not event.proven:
                self._discard(slot)
        worker.assigned.clear()
        worker.state = WorkerState.DOWN
        if self.state is not PoolState.RUNNING:
            return

        for deaths in (worker.deaths, self._deaths):
            while deaths and deaths[0] < now - self.limits.window_s:
                deaths.popleft()
        worker.deaths.append(now)
        if event.counts and not was_idle:
            self._deaths.append(now)
        self._failed_starts += failed_start
        worker.restart_at = now + self._backoff_s(len(worker.deaths))

        too_many_starts = self._failed_starts > self.limits.max_failed_starts
        hopeless = too_many_starts or len(self._deaths) > self.limits.max_restarts
        restart_in_s = None if hopeless else worker.restart_at - now
        self._actions.append(Mourn(event.worker, event.incarnation, tickets, restart_in_s))
        if hopeless:
            self._actions.append(
                GiveUp(self._failed_starts if too_many_starts else len(self._deaths), failed_starts=too_many_starts)
            )
            self._on_close(PoolState.FAILED)

    def _on_taken(self, ticket: int) -> None:
        for slot in self._slots.values():
            if slot.state is SlotState.READY and slot.ticket == ticket:
                slot.state, slot.ticket = SlotState.LEASED, None

    def _on_released(self, slot_id: int) -> None:
        slot = self._slots.get(slot_id)
        # READY: it was taken and let go so quickly that `Taken` is still to come.
        if slot is not None and slot.state in (SlotState.READY, SlotState.LEASED):
            slot.state, slot.ticket = SlotState.FREE, None

    def _on_close(self, final: PoolState) -> None:
        if self.state is not PoolState.RUNNING:
            return
        self.state = final
        self._lost.clear()
        for worker in self._workers:
            if worker.state is not WorkerState.DOWN:
                self._actions.append(Stop(worker.index, worker.incarnation))

    # ---- what follows from the state, after every event ----

    def _start_workers(self, now: float) -> None:
        for worker in self._workers:
            if worker.state is WorkerState.DOWN and worker.restart_at <= now:
                worker.incarnation += 1
                worker.state = WorkerState.STARTING
                self.restarts += worker.incarnation > 0
                self._actions.append(Start(worker.index, worker.incarnation))

    def _assign_lost(self) -> None:
        """Lost tickets go to idle workers; behind another ticket only if no replacement is on its way."""
        expecting = any(w.state is WorkerState.STARTING for w in self._workers)
        while self._lost:
            worker = self._least_loaded()
            if worker is None or (worker.assigned and expecting):
                return
            slot = self._free_slot(reserved=0)
            assert slot is not None, "a lost ticket has a slot kept for it"
            self._give(worker, heapq.heappop(self._lost), slot)

    def _assign_new(self) -> None:
        while (worker := self._least_loaded()) is not None:
            slot = self._free_slot(reserved=len(self._lost))
            if slot is None:
                return
            self._give(worker, self._next_ticket, slot)
            self._next_ticket += 1

    def _give(self, worker: _Worker, ticket: int, slot: int) -> None:
        self._slots[slot] = _Slot(SlotState.FILLING, worker.index, ticket)
        worker.assigned.append((ticket, slot))
        self._actions.append(Produce(worker.index, ticket, slot))

    def _least_loaded(self) -> _Worker | None:
        ready = [w for w in self._workers if w.state is WorkerState.READY and len(w.assigned) < TICKETS_AHEAD]
        return min(ready, key=lambda w: len(w.assigned), default=None)

    def _free_slot(self, *, reserved: int) -> int | None:
        """A free slot, made if need be, if more than `reserved` are left."""
        free = [slot_id for slot_id, slot in self._slots.items() if slot.state is SlotState.FREE]
        if len(free) + self.limits.slots - len(self._slots) <= reserved:
            return None
        if free:
            return free[-1]
        slot_id, self._slots_made = self._slots_made, self._slots_made + 1
        self._slots[slot_id] = _Slot()
        self._actions.append(CreateSlot(slot_id))
        return slot_id

    def _trim(self) -> None:
        """Once the pool has ended, let every slot go that nobody holds."""
        if self.state is PoolState.RUNNING:
            return
        for slot_id, slot in list(self._slots.items()):
            if slot.state in (SlotState.FREE, SlotState.READY):
                self._discard(slot_id)

    def _discard(self, slot_id: int) -> None:
        del self._slots[slot_id]
        self._actions.append(DiscardSlot(slot_id))

    def _backoff_s(self, deaths: int) -> float:
        if deaths < 2:
            return 0.0
        return min(self.limits.backoff_max_s, self.limits.backoff_first_s * 2.0 ** (deaths - 2))

    # ---- invariants ----

    def validate(self) -> None:
        """Check every cross-invariant; the tests do after each event."""
        filling = {slot_id for slot_id, slot in self._slots.items() if slot.state is SlotState.FILLING}
        assigned = [pair for worker in self._workers for pair in worker.assigned]
        assert filling == {slot for _, slot in assigned} and len(filling) == len(assigned), "one owner per slot"
        for worker in self._workers:
            assert len(worker.assigned) <= TICKETS_AHEAD
            assert not worker.assigned or worker.state is WorkerState.READY
            for ticket, slot_id in worker.assigned:
                slot = self._slots[slot_id]
                assert (slot.worker, slot.ticket) == (worker.index, ticket)
        ready = [slot.ticket for slot in self._slots.values() if slot.state is SlotState.READY]
        alive = [ticket for ticket, _ in assigned] + [t for t in ready if t is not None] + self._lost
        assert len(alive) == len(set(alive)), "a ticket is in one place"
        assert all(ticket < self._next_ticket for ticket in alive)
        free = sum(slot.state is SlotState.FREE for slot in self._slots.values())
        assert len(self._slots) <= self.limits.slots, "memory is bounded"
        if self.state is PoolState.RUNNING:
            assert len(self._lost) <= free + self.limits.slots - len(self._slots), (
                "a lost ticket has a slot kept for it"
            )
