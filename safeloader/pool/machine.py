"""The machine: everything that decides a worker's, a ticket's or a slot's fate, and nothing else.

Events and `now` go in, actions come out. No clock, process, thread or descriptor is in here, so every race is a
list of events in a test. The supervisor feeds it and carries out its actions.

A ticket's life: issued in ascending order, lost tickets first → READY → taken exactly once, in order. A worker's: see
`crew`.

Seven books are kept by parts of their own: `crew` (who is in which state), `lanes` (which ticket comes next), `slots`
(whose slot), `blame` (a failure's culprit), `strength` (how many workers, and when to give up), `patience` (how long
without progress), `crowd` (how many at work keep the CPUs busy).

Sizes. A lane has at most workers + 2 x num_cached slots, and where workers share one, a reserve from when on a ticket
that takes long has held up others: see `slots`. It is for batches that are not quick, as far as the first one told that
it fits into memory, until the OOM killer strikes. The consumer leases no more than `Limits.max_leases` of the slots
(beyond that it gets copies), so workers always have some. A lost ticket has a slot kept for it: otherwise the others'
READY slots could wait for it for ever.

Restarts. A death is replaced at once; the same worker's next ones after a growing back-off, until it makes a batch.
If not all may run, those with the fewest deaths do. A worker that was idle is not evidence against the pool, so it does
not count towards the intensity, and neither does one beyond those that may run now; of the workers that go down with
their nursery, one counts. Nor does the pool go on without a worker because it dies idle.

Rest. A worker that had no ticket for `rest_after_s` is asked to leave, and is started again when there is a ticket to
give out, and a slot for it, that nobody who runs or starts has room for. That is no restart: it has no back-off, counts
nowhere, and is no incident. A worker with a lane of its own never rests, for nobody else makes its batches; nor does
one before it was measured. One that dies while it is leaving was idle, and is replaced like any other. Time asleep
counts as idle: while all have nothing to do, nobody asks the machine, and it can't tell the one from the other.

Crowd. A worker without a ticket gets a new one only while fewer are at work than keep the CPUs busy; so those beyond
that number have nothing to do, and rest. A lost ticket is given to anybody. One that takes far longer than usual waits
for something, and does not count. Not in lanes of their own, where nobody can make another's batches.

Watchdog. A worker that starts, works or was asked to leave must show progress within `patience`. Time during which
the machine itself was not asked says nothing about the workers, so it does not count.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from safeloader.pool.blame import Blame, Fate, Policy, Verdict
from safeloader.pool.crew import Crew, Leave, Worker, WorkerState
from safeloader.pool.crowd import Crowd, waits_after_s
from safeloader.pool.events import (
    Abandon,
    Action,
    Budget,
    Cause,
    Close,
    Condemn,
    CreateSlot,
    Deliver,
    DiscardSlot,
    Event,
    Exited,
    Finished,
    GiveUp,
    Grown,
    Inspect,
    Mourn,
    Outage,
    Produce,
    Quarantine,
    Ready,
    Redraw,
    Released,
    Rest,
    Retire,
    Retry,
    Seen,
    Start,
    Stop,
    Taken,
    Tick,
    Why,
)
from safeloader.pool.lanes import Lane
from safeloader.pool.patience import HangLimits, Patience
from safeloader.pool.slots import Slots, SlotState
from safeloader.pool.strength import Strength, StrengthLimits

TICKETS_AHEAD: Final = 2
"""Tickets that a worker holds at most, where batches are quick: one in work, one so that it need not wait for the
trainer. In a lane of its own only one: if that fails, it comes again before the next."""
QUICK_S: Final = 0.1
"""Batches that take longer are given out one at a time. To wait for the trainer's interpreter lock (5 ms) costs little
then, and a ticket behind a slow one in the same worker would hold up all that come after it: see
`benchmarks/ordering.py`. And only they may use the reserve: to hold up quick ones for a moment costs nothing."""
RESERVE: Final = 2
"""Slots of the reserve per worker. nnU-Net's 3d_fullres batches take 0.1 to 2 s each (standard deviation: 0.75 of the
mean). In a simulation with 12 workers and 24 slots, a GPU that needs nine tenths of what they can make gets 0.87 of
that, and one that is faster 0.86 of what they can make. With one more slot per worker both get 0.996, with two all."""
DEATHS_IN_A_ROW: Final = 6
"""Deaths of one worker at work, while others make batches, after which the pool goes on without it for a while."""
KILL_S: Final = 5.0
"""How long a killed worker may take to end; then it is abandoned. (State D: the kernel can't end it.)"""
HEARTBEAT_S: Final = 5.0
"""While a worker is watched, the machine asks to be called at least this often."""
ASLEEP_S: Final = 3 * HEARTBEAT_S
"""If it was not, the whole process was stopped or starved, and that is not the workers' fault."""
_SLEEPS: Final = 32
"""How many of them are remembered, for progress that only a page knows of."""
_BLAMED: Final = (Cause.ITSELF, Cause.READING, Cause.HUNG, Cause.MEMORY)


class PoolState(str, Enum):
    """`FAILED` and `CLOSED` are final; in both, no worker is started again."""

    RUNNING = "running"
    FAILED = "failed"
    CLOSED = "closed"


@dataclass(frozen=True)
class Limits:
    """The machine's constants, in units of its clock (seconds). `cpu_quota`: the CPUs that the cgroup allows."""

    workers: int
    num_cached: int
    max_restarts: int
    window_s: float
    backoff_first_s: float
    backoff_max_s: float
    begin_with: int | None = None
    grow_back_s: float = 600.0
    rest_after_s: float = math.inf
    other_method: bool = False
    own_lanes: bool = False
    cpu_quota: float = math.inf
    hang: HangLimits = field(default_factory=HangLimits)
    policy: Policy = field(default_factory=Policy)

    @property
    def lanes(self) -> int:
        """How many lanes there are: one for all workers, or one for each."""
        return self.workers if self.own_lanes else 1

    @property
    def lane_slots(self) -> int:
        """The size of a lane's ring."""
        return self.workers // self.lanes + 2 * self.num_cached

    @property
    def slots(self) -> int:
        """The size of the ring, without its reserve."""
        return self.lanes * self.lane_slots

    @property
    def reserve(self) -> int:
        """How many slots more there may be, from when on a ticket has held up others."""
        return 0 if self.own_lanes else RESERVE * self.workers

    @property
    def max_leases(self) -> int:
        """Slots that the consumer may hold: at least the batch in use and the next one; never all."""
        return max(2, self.num_cached)

    @property
    def strength(self) -> StrengthLimits:
        """What is about the number of workers."""
        begin_with = self.workers if self.begin_with is None else self.begin_with
        return StrengthLimits(
            self.workers, begin_with, self.max_restarts, self.window_s, self.grow_back_s, self.other_method,
            all_or_none=self.own_lanes,
        )  # fmt: skip


class Machine:
    """The state machine of one pool. Not thread-safe.

    Attributes:
        state: whether the pool runs.
        restarts: workers started again after a death.
        wants_slots: whether a slot that becomes free is given to somebody at once.
        blame: the book of failures; `blame.quarantined` are the cases that are not drawn.
    """

    def __init__(self, limits: Limits, *, first_ticket: int = 0, quarantined: Iterable[str] = ()) -> None:
        self.limits = limits
        self.state = PoolState.RUNNING
        self.restarts = 0
        self.wants_slots = False
        self.blame = Blame(limits.policy, quarantined, ordered=limits.own_lanes)
        self._strength = Strength(limits.strength)
        self._patience = Patience(limits.hang)
        self._crowd = Crowd(limits.cpu_quota)
        self._lanes = [
            Lane(
                number, limits.lanes, first_ticket + number,
                Slots(limits.lane_slots, number, limits.lanes, reserve=limits.reserve, ticket=first_ticket + number),
                ordered=limits.own_lanes,
            )
            for number in range(limits.lanes)
        ]  # fmt: skip
        self._first_ticket = first_ticket
        self._crew = Crew(limits.workers)
        self._workers = self._crew.workers
        self._parts = [self._workers[lane.number :: limits.lanes] for lane in self._lanes]  # who works in which lane
        self._may_rest_once_measured = not limits.own_lanes and limits.rest_after_s < math.inf
        self._may_rest = self._may_rest_once_measured and limits.begin_with is None
        self._said_who_rests = False
        self._reserve = 0  # slots that memory has room for
        self._last = 0.0
        self._sleeps: deque[tuple[float, float]] = deque(maxlen=_SLEEPS)  # (from, to)
        self._actions: list[Action] = []

    # ---- what the supervisor and people may ask ----

    def worker_state(self, worker: int) -> WorkerState:
        """The worker's state."""
        return self._workers[worker].state

    def incarnation(self, worker: int) -> int:
        """The worker's current life, or -1 before the first."""
        return self._workers[worker].incarnation

    def holder(self, ticket: int) -> int | None:
        """The worker that has the ticket, or None."""
        return next((w.index for w in self._workers if any(ticket == held for held, _ in w.assigned)), None)

    def slots(self) -> dict[SlotState, int]:
        """How many slots are in each state."""
        counts = [lane.slots.counts() for lane in self._lanes]
        return {state: sum(count[state] for count in counts) for state in SlotState}

    @property
    def allowed(self) -> int:
        """How many workers may run now."""
        return self._strength.allowed

    @property
    def running(self) -> int:
        """How many workers have a process, or are about to."""
        return self._crew.running

    @property
    def resting(self) -> int:
        """How many workers have left because there was nothing to do."""
        return self._crew.resting

    @property
    def stopped(self) -> bool:
        """Whether the pool has ended and no worker is left."""
        return self.state is not PoolState.RUNNING and not self._crew.running

    def next_wake(self) -> float | None:
        """When a `Tick` will change something, on the caller's clock."""
        if self.state is not PoolState.RUNNING:
            return min((w.condemned_at + KILL_S for w in self._workers if w.condemned_at is not None), default=None)
        wakes = [self._strength.grow_at]
        usual_s, first_s = self._patience.allowed_s(first=False), self._patience.allowed_s(first=True)
        for worker in self._workers:
            if worker.condemned_at is not None:
                wakes.append(worker.condemned_at + KILL_S)
            elif worker.watched:
                wakes.append(min(worker.since + (first_s if worker.fresh else usual_s), self._last + HEARTBEAT_S))
            elif self._may_rest and worker.idle:
                wakes.append(self._rest_at(worker))
        for lane in self._lanes:
            wakes += lane.wakes
        wakes += [worker.restart_at for worker in self._crew.up_next(self.allowed)]
        wake = min(wakes)
        return wake if wake < math.inf else None

    # ---- the one entrance ----

    def handle(self, event: Event, now: float, news: Iterable[Taken | Released] = ()) -> list[Action]:
        """Take in one event, and news of the consumer from before it; what is to be done follows from both together.

        Events about earlier incarnations are ignored.
        """
        self._actions = []
        self._discount_sleep(now)
        for told in news:
            self._on_consumer(told)
        match event:
            case Finished() | Ready() | Exited() | Seen() | Grown():
                self._on_worker(event, now)
            case Taken() | Released():
                self._on_consumer(event)
            case Tick():
                self._watch(now)
            case Budget():
                self._on_budget(event)
            case Close(failed):
                self._on_close(PoolState.FAILED if failed else PoolState.CLOSED)
        if self.state is PoolState.RUNNING:
            self._note(self._strength.grow(now))
            self._start_workers(now)
            self.wants_slots = False
            for lane in self._lanes:
                self._assign_lost(lane, now)
                self._assign_new(lane, now)
            self._call_back(now)
            if self._may_rest and isinstance(event, Tick):
                self._send_to_rest(now)
        else:
            self._trim()
        return self._actions

    def _lane_of(self, ticket: int) -> Lane:
        return self._lanes[(ticket - self._first_ticket) % len(self._lanes)]

    def _slots(self, slot: int) -> Slots:
        """The part of the ring that the slot belongs to."""
        return self._lanes[slot % len(self._lanes)].slots

    def _note(self, action: Action | None) -> None:
        if action is not None:
            self._actions.append(action)

    # ---- events ----

    def _on_consumer(self, told: Taken | Released) -> None:
        match told:
            case Released(slot):
                self._slots(slot).released(slot)
            case Taken(ticket):
                self._lane_of(ticket).slots.taken(ticket)

    def _on_budget(self, budget: Budget) -> None:
        self._note(self._strength.budget(budget.workers))
        self._reserve = min(budget.reserve, self.limits.reserve)
        self._open_reserve()
        self._may_rest = self._may_rest_once_measured

    def _on_worker(self, event: Ready | Finished | Exited | Seen | Grown, now: float) -> None:
        match event:
            case Finished():
                self._on_finished(event, now)
            case Ready():
                self._on_ready(event, now)
            case Exited():
                self._on_exited(event, now)
            case Seen():
                self._on_seen(event, now)
            case Grown(worker, incarnation):
                self._on_grown(worker, incarnation)
        known = self._workers[event.worker]
        if known.leaves is not None and known.idle and self.state is PoolState.RUNNING:
            self._ask_to_leave(known, now)

    def _current(self, worker: int, incarnation: int) -> Worker | None:
        known = self._workers[worker]
        runs = known.state is WorkerState.STARTING or known.state is WorkerState.READY
        return known if runs and known.incarnation == incarnation else None

    def _on_ready(self, event: Ready, now: float) -> None:
        worker = self._current(event.worker, event.incarnation)
        if worker is not None:
            self._crew.enter(worker, WorkerState.READY)
            worker.begins(now)
            self._strength.somebody_is_ready()
            if event.cases is not None:
                self.blame.draws_from(event.cases)
            if not self.limits.own_lanes:
                self._crowd.has(event.cpus)

    def _on_finished(self, event: Finished, now: float) -> None:
        worker = self._current(event.worker, event.incarnation)
        if worker is None or (event.ticket, event.slot) not in worker.assigned:
            return
        worker.assigned.remove((event.ticket, event.slot))
        begun = worker.began
        worker.begins(now)
        if self.state is not PoolState.RUNNING:
            self._slots(event.slot).free(event.slot)
        elif event.failure is None:
            worker.fresh = False
            self._on_batch(event, now, begun)
        else:
            verdict = self.blame.failed(event.ticket, event.failure, now)
            if verdict.fate is Fate.RAISE:
                self._deliver(event)
                return
            self._slots(event.slot).free(event.slot)
            self._lane_of(event.ticket).lose(event.ticket, now + verdict.in_s, failed=True)
            self._actions.append(Retry(event.worker, event.incarnation, event.ticket, verdict.in_s))
            self._carry_out(verdict, event.ticket, now)

    def _on_batch(self, event: Finished, now: float, begun: float) -> None:
        self._patience.took(now - begun)
        if event.effort is not None:
            self._crowd.took(event.effort)
        self._open_reserve()
        self._workers[event.worker].deaths.clear()
        self._strength.batch_was_made()
        lasted_s = self.blame.succeeded(event.ticket, event.cases, now, begun=begun)
        if lasted_s is not None:
            self._actions.append(Outage((), lasted_s))
        self._deliver(event)

    def _deliver(self, event: Finished) -> None:
        self._slots(event.slot).ready(event.slot, event.ticket)
        self._actions.append(Deliver(event.ticket, event.slot, event.failure is not None))

    def _on_exited(self, event: Exited, now: float) -> None:
        worker = self._current(event.worker, event.incarnation)
        if worker is None:
            return
        tickets = tuple(ticket for ticket, _ in worker.assigned)
        cause = event.cause if worker.condemned_at is None else Cause.HUNG
        idle_s = now - worker.since if cause is Cause.HUNG else 0.0
        starting = worker.state is WorkerState.STARTING
        at_work = starting or bool(tickets)
        is_evidence = at_work and self._crew.running <= self.allowed
        for ticket, slot in worker.assigned:
            self._lane_of(ticket).lose(ticket, now)
            self._slots(slot).free(slot)
            if not event.proven:
                self._discard(slot)
        worker.assigned.clear()
        worker.condemned_at = None
        leaves, worker.leaves, worker.asked = worker.leaves, None, False
        worker.spent = cause is Cause.SPENT and not starting
        rests = worker.spent and leaves is Leave.RESTS and self.state is PoolState.RUNNING
        self._crew.enter(worker, WorkerState.RESTING if rests else WorkerState.DOWN)
        if self.state is not PoolState.RUNNING:
            return
        if worker.spent:
            worker.restart_at = now
            return
        in_hand = event.ticket if event.ticket in tickets and cause in _BLAMED else None
        verdict = Verdict(Fate.AGAIN)
        if in_hand is not None and (cause is not Cause.MEMORY or (self.allowed == 1 and self._crew.running == 0)):
            verdict = self.blame.died(in_hand, event.case, now, cause, idle_s=idle_s)
            self._lane_of(in_hand).lose(in_hand, now + verdict.in_s, failed=True)
        worker.died(now, at_work=at_work, window_s=self.limits.window_s)
        worker.restart_at = now + self._backoff_s(len(worker.deaths))
        self._count_death(now, counts=event.counts and is_evidence, starting=starting)
        memory = self._too_many(now) if cause is Cause.MEMORY else None
        rung = self._next_rung(worker, now)
        ends = isinstance(rung, GiveUp) or verdict.fate is Fate.END
        replaced = not ends and worker in self._crew.up_next(self.allowed)
        restart_in_s = worker.restart_at - now if replaced else None
        self._actions.append(
            Mourn(event.worker, event.incarnation, tickets, restart_in_s, cause=cause, again_in_s=verdict.in_s)
        )
        for action in (memory, rung):
            self._note(action)
        if isinstance(rung, GiveUp):
            self._on_close(PoolState.FAILED)
        elif in_hand is not None:
            self._carry_out(verdict, in_hand, now)

    def _count_death(self, now: float, *, counts: bool, starting: bool) -> None:
        if counts and self.blame.outage_since is None:
            self._strength.died(now, starting=starting)

    def _too_many(self, now: float) -> Action | None:
        """Memory did not suffice for those that ran; who rests had no part in that."""
        self._reserve = 0
        self._open_reserve()
        fewer = self._crew.running if self._crew.resting else None
        return self._strength.one_less(Why.MEMORY, now, fewer=fewer)

    def _open_reserve(self) -> None:
        """As far as memory has room for it, and for batches that are not quick."""
        for lane in self._lanes:
            lane.slots.granted = self._reserve if self._patience.typical_s > QUICK_S else 0

    def _next_rung(self, worker: Worker, now: float) -> Action | None:
        """What to change when deaths are too many; None if they are not."""
        rung = self._strength.step_down(now)
        if rung is not None:
            for each in self._workers:
                each.deaths.clear()
        elif sum(at_work for _, at_work in worker.deaths) >= DEATHS_IN_A_ROW and self.blame.outage_since is None:
            rung = self._strength.one_less(Why.STARTS, now)
        return rung

    def _carry_out(self, verdict: Verdict, ticket: int, now: float) -> None:
        """What follows from a failure beyond making the ticket again."""
        if verdict.outage:
            self._actions.append(Outage(verdict.outage))
        if verdict.quarantined is not None:
            blame = self.blame
            self._actions.append(Quarantine(verdict.quarantined, ticket, len(blame.quarantined), blame.limit))
        elif verdict.fate is Fate.DRAW_ANEW:
            self._actions.append(Redraw(ticket, self.blame.attempt(ticket), verdict.case))
        elif verdict.fate is Fate.END:
            assert verdict.why is not None
            lasted_s = 0.0 if self.blame.outage_since is None else now - self.blame.outage_since
            self._actions.append(GiveUp(verdict.why, case=verdict.case, seconds=lasted_s))
            self._on_close(PoolState.FAILED)

    def _on_seen(self, event: Seen, now: float) -> None:
        worker = self._current(event.worker, event.incarnation)
        if worker is None or not worker.watched:
            return
        asleep_s = sum(max(0.0, woke - max(fell, event.since)) for fell, woke in self._sleeps)
        worker.since = max(worker.since, event.since + asleep_s)
        if now >= self._deadline(worker):
            worker.condemned_at = now
            allowed_s = self._patience.allowed_s(first=worker.fresh)
            self._actions.append(Condemn(event.worker, event.incarnation, now - worker.since, allowed_s))

    def _on_grown(self, index: int, incarnation: int) -> None:
        worker = self._current(index, incarnation)
        if worker is not None and worker.state is WorkerState.READY and worker.leaves is None:
            worker.leaves = Leave.REPLACED

    def _on_close(self, final: PoolState) -> None:
        if self.state is not PoolState.RUNNING:
            return
        self.state = final
        for lane in self._lanes:
            lane.clear()
        for worker in self._workers:
            if worker.state is WorkerState.RESTING:
                self._crew.enter(worker, WorkerState.DOWN)
            elif worker.state is not WorkerState.DOWN and worker.condemned_at is None:
                worker.condemned_at = self._last
                self._actions.append(Stop(worker.index, worker.incarnation))

    # ---- the watchdog ----

    def _deadline(self, worker: Worker) -> float:
        return worker.since + self._patience.allowed_s(first=worker.fresh)

    def _discount_sleep(self, now: float) -> None:
        fell, self._last = self._last, now
        slept_s = now - fell
        if slept_s <= ASLEEP_S:
            return
        self._sleeps.append((fell, now))
        for worker in self._workers:
            if worker.watched:
                worker.since += slept_s
                worker.began += slept_s
            if worker.condemned_at is not None:
                worker.condemned_at += slept_s
        self.blame.slept(slept_s)

    def _watch(self, now: float) -> None:
        for worker in self._workers:
            if worker.condemned_at is not None:
                if now >= worker.condemned_at + KILL_S:
                    self._actions.append(Abandon(worker.index, worker.incarnation))
            elif worker.watched and self.state is PoolState.RUNNING and now >= self._deadline(worker):
                self._actions.append(Inspect(worker.index, worker.incarnation))

    # ---- what follows from the state, after every event ----

    def _start_workers(self, now: float) -> None:
        for worker in self._crew.up_next(self.allowed):
            if worker.restart_at <= now:
                self._start(worker, now)

    def _start(self, worker: Worker, now: float) -> None:
        worker.incarnation += 1
        self._crew.enter(worker, WorkerState.STARTING)
        worker.fresh = True
        worker.begins(now)
        self.restarts += worker.incarnation > 0 and not worker.spent
        self._actions.append(Start(worker.index, worker.incarnation))

    def _call_back(self, now: float) -> None:
        """Start those that rest, as many as there is work for that nobody else has room for, and CPUs."""
        if not self._crew.resting:
            return
        (lane,) = self._lanes
        on_their_way = self._on_their_way(lane)
        missing = math.ceil(lane.waiting / self._ahead(lane)) - on_their_way
        if missing > 0:
            missing = min(missing, self._room_at_work(now) - on_their_way)
        for worker in self._crew.called_back(missing, self.allowed):
            self._start(worker, now)
        if self._crew.resting and not self._said_who_rests and not any(w.idle or w.asked for w in self._workers):
            self._said_who_rests = True
            at_work = int(self._crowd.enough) if self._room_at_work(now) <= 0 else None
            self._actions.append(Rest(self._crew.resting, len(self._workers), at_work))

    def _send_to_rest(self, now: float) -> None:
        for worker in self._workers:
            if worker.idle and now >= self._rest_at(worker):
                worker.leaves = Leave.RESTS
                self._ask_to_leave(worker, now)

    def _rest_at(self, idle: Worker) -> float:
        return idle.since + self.limits.rest_after_s

    def _ask_to_leave(self, worker: Worker, now: float) -> None:
        worker.asked = True
        worker.begins(now)
        self._actions.append(Retire(worker.index, worker.incarnation, rests=worker.leaves is Leave.RESTS))

    def _assign_lost(self, lane: Lane, now: float) -> None:
        """Lost tickets go to idle workers; behind another ticket only if no replacement is on its way."""
        while lane.has_lost(now):
            worker = self._least_loaded(lane)
            if worker is None or (worker.assigned and self._on_their_way(lane)):
                return
            self._give(worker, lane, lane.next_lost(), now)

    def _assign_new(self, lane: Lane, now: float) -> None:
        while lane.has_new:
            worker = self._least_loaded(lane)
            if worker is not None and not worker.assigned and self._room_at_work(now) <= 0:
                worker = self._least_loaded(lane, at_work=True)
            if worker is None:
                return
            self._give(worker, lane, lane.next_new(), now)
        self.wants_slots = True

    def _room_at_work(self, now: float) -> int:
        """How many more may begin until the CPUs are busy. Who waits for something is noticed with a heartbeat."""
        enough = self._crowd.enough
        if enough >= len(self._workers):
            return len(self._workers)
        since = now - waits_after_s(self._patience.typical_s)
        at_work = sum(bool(w.assigned) and w.condemned_at is None and w.began > since for w in self._workers)
        return int(enough) - at_work

    def _on_their_way(self, lane: Lane) -> int:
        """How many workers start, and will take tickets."""
        if not self._crew.starting:
            return 0
        return sum(w.state is WorkerState.STARTING and w.condemned_at is None for w in self._parts[lane.number])

    def _give(self, worker: Worker, lane: Lane, ticket: int, now: float) -> None:
        obtained = lane.slots.obtain()
        assert obtained is not None, "there is a slot for a new ticket, and one is kept for a lost one"
        slot, made = obtained
        if made:
            self._actions.append(CreateSlot(slot))
        if not worker.assigned:
            worker.begins(now)
        lane.slots.fill(slot, worker.index, ticket)
        worker.assigned.append((ticket, slot))
        self._actions.append(Produce(worker.index, ticket, slot, self.blame.attempt(ticket)))

    def _ahead(self, lane: Lane) -> int:
        """How many tickets a worker may hold."""
        return 1 if lane.ordered or self._patience.typical_s > QUICK_S else TICKETS_AHEAD

    def _least_loaded(self, lane: Lane, *, at_work: bool = False) -> Worker | None:
        """Who gets the next ticket: of those with the fewest the first one, so that the last ones may rest.

        With `at_work` only one that has a ticket already.
        """
        least, fewest = None, self._ahead(lane)
        for worker in self._parts[lane.number]:
            held = len(worker.assigned)
            if held < fewest and (held or not at_work) and worker.takes_tickets:
                least, fewest = worker, held
        return least

    def _trim(self) -> None:
        """Once the pool has ended, let every slot go that nobody holds."""
        for lane in self._lanes:
            for slot_id, slot in lane.slots:
                if slot.state in (SlotState.FREE, SlotState.READY):
                    self._discard(slot_id)

    def _discard(self, slot: int) -> None:
        self._slots(slot).discard(slot)
        self._actions.append(DiscardSlot(slot))

    def _backoff_s(self, deaths: int) -> float:
        if deaths < 2:
            return 0.0
        return min(self.limits.backoff_max_s, self.limits.backoff_first_s * 2.0 ** (deaths - 2))

    # ---- invariants ----

    def validate(self) -> None:
        """Check every cross-invariant; the tests do after each event."""
        slots = {slot_id: slot for lane in self._lanes for slot_id, slot in lane.slots}
        filling = {slot_id for slot_id, slot in slots.items() if slot.state is SlotState.FILLING}
        assigned = [pair for worker in self._workers for pair in worker.assigned]
        assert filling == {slot for _, slot in assigned} and len(filling) == len(assigned), "one owner per slot"
        for worker in self._workers:
            assert len(worker.assigned) <= TICKETS_AHEAD
            for ticket, slot_id in worker.assigned:
                assert (slots[slot_id].worker, slots[slot_id].ticket) == (worker.index, ticket)
                assert worker in self._parts[self._lane_of(ticket).number], "each in its lane"
        ready = [slot.ticket for slot in slots.values() if slot.state is SlotState.READY]
        lost = [ticket for lane in self._lanes for ticket in lane.lost]
        alive = [ticket for ticket, _ in assigned] + [t for t in ready if t is not None] + lost
        assert len(alive) == len(set(alive)), "a ticket is in one place"
        assert all(self._lane_of(ticket).issued(ticket) for ticket in alive)
        assert len(slots) <= self.limits.slots + self.limits.reserve, "memory is bounded"
        for lane in self._lanes:
            free = lane.slots.counts()[SlotState.FREE]
            assert lane.slots.obtainable == free + self.limits.lane_slots + self.limits.reserve - len(lane.slots)
        if self.state is PoolState.RUNNING:
            assert all(len(lane.lost) <= lane.slots.obtainable for lane in self._lanes), "a slot is kept for each"
            assert 1 <= self.allowed <= self.limits.workers
        self._crew.validate()
        if self._crew.resting:
            assert self.state is PoolState.RUNNING and not self.limits.own_lanes
            (lane,) = self._lanes
            on_their_way = self._on_their_way(lane)
            all_run = self._crew.running >= self.allowed or self._room_at_work(self._last) <= on_their_way
            assert lane.waiting <= self._ahead(lane) * on_their_way or all_run, "nobody rests while work waits"
