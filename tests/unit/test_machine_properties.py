"""The machine over any order of events: the invariants hold after every step, and it always makes progress.

`World` plays everything around the machine: workers that get ready, finish, fail, hang and die whenever they like,
pages that show progress or none, processes that can't be killed, messages of the dead that arrive late, a clock that
jumps, a consumer that takes and releases in its own time. It checks what it is told to do against what it knows,
independently of the machine's own `validate`.
"""

from __future__ import annotations

import math
import os
import sys
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from safeloader.config import OnBadCase
from safeloader.pool import events
from safeloader.pool.blame import Policy
from safeloader.pool.crew import WorkerState
from safeloader.pool.crowd import Effort
from safeloader.pool.events import Cause, Why
from safeloader.pool.machine import KILL_S, Limits, Machine, PoolState
from safeloader.pool.patience import HangLimits
from safeloader.pool.slots import SlotState

LEAST_S, FACTOR = 120.0, 20.0
"""Of the adaptive deadline, as documented."""
ASLEEP_S = 15.0
EPSILON_S = 1e-6
CASES = tuple(f"brain_{number}" for number in range(6))
FAILURES = (
    events.Failure("KeyError at user.py:7", "brain_0"),
    events.Failure("KeyError at user.py:7"),
    events.Failure("ValueError at user.py:9", "brain_1"),
    events.Failure("OSError at user.py:3", "brain_2", reading=True),
    events.Failure("OSError at user.py:3", "brain_3", reading=True, broken=True),
    events.Failure("OSError at user.py:3", "brain_4", reading=True),
    events.Failure("OSError at user.py:3", reading=True),
    events.Failure("StopIteration", final=True),
)


@dataclass
class _FakeWorker:
    incarnation: int
    since: float  # its page
    progress: float  # that, or when it was told to do something, on a clock that stands still while nobody looks
    began: float = 0.0  # its present ticket
    ready: bool = False
    fresh: bool = True
    grown: bool = False
    retiring: bool = False
    rests: bool = False
    idle_from: float = 0.0  # since when it is ready and has nothing to do
    condemned: float | None = None  # on the clock that stands still
    unkillable: bool = False
    queue: list[tuple[int, int]] = field(default_factory=list)

    @property
    def expected(self) -> bool:
        return self.condemned is None and (not self.ready or bool(self.queue) or self.retiring)


class World(RuleBasedStateMachine):
    @initialize(
        workers=st.integers(1, 4),
        num_cached=st.integers(1, 3),
        max_restarts=st.sampled_from([3, 10_000]),
        begin_with_one=st.booleans(),
        other_method=st.booleans(),
        own_lanes=st.sampled_from([False, False, True]),
        grow_back_s=st.sampled_from([5.0, 600.0]),
        rest_after_s=st.sampled_from([0.4, 3.0, 20.0, math.inf]),
        cpus=st.sampled_from([0, 0b1, 0b100, 0b11]),
        computes=st.booleans(),
        hang=st.sampled_from(
            [
                HangLimits(),
                HangLimits(fixed_s=2.0, first_s=3.0),
                HangLimits(fixed_s=20.0, most_s=10.0),
                HangLimits(fixed_s=math.inf),
            ]
        ),
        policy=st.sampled_from(
            [
                Policy(),
                Policy(max_share=0.5, outage_s=30.0),
                Policy(OnBadCase.RAISE),
                Policy(OnBadCase.RETRY, outage_s=30.0),
            ]
        ),
        cases=st.sampled_from([None, 1, 6, 100]),
        quarantined=st.sampled_from([(), ("brain_0",)]),
    )
    def begin(
        self,
        workers: int,
        num_cached: int,
        max_restarts: int,
        begin_with_one: bool,
        other_method: bool,
        own_lanes: bool,
        grow_back_s: float,
        rest_after_s: float,
        cpus: int,
        computes: bool,
        hang: HangLimits,
        policy: Policy,
        cases: int | None,
        quarantined: tuple[str, ...],
    ) -> None:
        begin_with_one = begin_with_one and not own_lanes
        self.limits = Limits(
            workers,
            num_cached,
            max_restarts,
            window_s=600,
            backoff_first_s=0.1,
            backoff_max_s=5,
            begin_with=1 if begin_with_one else None,
            grow_back_s=grow_back_s,
            rest_after_s=rest_after_s,
            other_method=other_method,
            own_lanes=own_lanes,
            hang=hang,
            policy=policy,
        )
        self.machine = Machine(self.limits, quarantined=quarantined)
        self.cases, self.cpus = cases, cpus
        self.effort = Effort(0.5, 0.5) if computes else Effort(0.01, 0.5)
        self.has_worked = False
        self.now = self.asked = self.awake = 1000.0
        self.alive: dict[int, _FakeWorker] = {}
        self.resting: set[int] = set()
        self.measured = not begin_with_one
        self.said_who_rests = False
        self.lives: Counter[int] = Counter()
        self.buried: list[tuple[int, int]] = []
        self.slots: set[int] = set()
        self.filling: dict[int, tuple[int, int]] = {}  # slot: (worker, ticket)
        self.reserve = 0  # slots that memory had room for, at any time
        self.newest = -1  # ticket that was given out
        self.lost: set[int] = set()  # tickets that are to be made again
        self.failed: set[int] = set()  # those that may have had a part in it
        self.wide = False  # whether a ticket has held up a full ring
        self.unproven: set[int] = set()  # slots in which an abandoned worker may still write
        self.delivered: dict[int, int] = {}  # ticket: slot, not taken yet
        self.raised: set[int] = set()  # tickets among them that are exceptions
        self.leased: set[int] = set()
        self.next_tickets = list(range(self.limits.lanes))  # of each lane
        self.news: list[events.Taken | events.Released] = []  # that the machine has not heard yet
        self.turn = 0
        self.taken = 0
        self.not_before: dict[int, float] = {}  # ticket
        self.attempts: Counter[int] = Counter()
        self.wrongs: Counter[str] = Counter()  # of a case since its last success
        self.successes = 0
        self.deaths = 0  # since the last batch
        self.longest_s = 0.0
        self.most = self.allowed = 1 if begin_with_one else workers
        self.quarantined = set(quarantined)
        self.switched = False
        self.in_outage = False
        self.ended = False
        self.feed(events.Tick())

    # ---- carrying out what the machine says ----

    def feed(self, event: events.Event) -> Sequence[events.Action]:
        """What the pool does: an event and the news before it, what it leads to, and what that causes at once."""
        if self.now - self.asked <= ASLEEP_S:
            self.awake += self.now - self.asked
        self.asked = self.now
        queue, actions = deque([event]), []
        while queue:
            news, self.news = self.news, []
            answer = self.machine.handle(queue.popleft(), self.now, news)
            actions += answer
            for action in answer:
                queue.extend(self.carry_out(action))
            self.machine.validate()
        self.it_wakes_in_time()
        self.nobody_rests_while_work_waits()
        return actions

    def carry_out(self, action: events.Action) -> list[events.Event]:  # noqa: C901 - one branch an action
        match action:
            case events.Start():
                self.start(action)
            case events.Stop(worker, incarnation) | events.Condemn(worker, incarnation):
                fake = self.alive[worker]
                assert fake.incarnation == incarnation and fake.condemned is None
                if isinstance(action, events.Condemn):
                    self.it_is_hung(fake, action)
                else:
                    assert self.ended
                fake.condemned = self.awake
            case events.Inspect(worker, incarnation):
                fake = self.alive[worker]
                assert fake.incarnation == incarnation and fake.expected
                return [events.Seen(worker, incarnation, fake.since)]
            case events.Abandon(worker, incarnation):
                return [self.abandon(worker, incarnation)]
            case events.Retire():
                self.retire(action)
            case events.CreateSlot(slot):
                assert slot not in self.slots
                self.slots.add(slot)
                assert len(self.slots) <= self.limits.slots + self.reserve, "memory is bounded"
            case events.DiscardSlot(slot):
                assert slot not in self.leased, "a lease is never taken away"
                assert slot not in self.filling or self.filling[slot][0] not in self.alive
                self.slots.remove(slot)
                self.filling.pop(slot, None)
            case events.Produce():
                self.produce(action)
            case events.Deliver(ticket, slot, failed):
                assert ticket not in self.delivered and self.is_to_come(ticket), "exactly once"
                self.filling.pop(slot)
                self.lost.discard(ticket)
                self.failed.discard(ticket)
                self.delivered[ticket] = slot
                if failed:
                    self.raised.add(ticket)
            case _:
                self.record(action)
        return []

    def retire(self, action: events.Retire) -> None:
        fake = self.alive[action.worker]
        assert fake.incarnation == action.incarnation and fake.ready and fake.condemned is None
        assert not fake.retiring and not fake.queue and not self.ended
        assert action.rests or fake.grown
        if action.rests:
            assert not self.limits.own_lanes and self.measured
            assert self.now >= fake.idle_from + self.limits.rest_after_s, "it had something to do"
        fake.retiring, fake.rests = True, action.rests
        fake.progress = self.awake

    def is_to_come(self, ticket: int) -> bool:
        return ticket >= self.next_tickets[ticket % self.limits.lanes]

    def start(self, action: events.Start) -> None:
        worker = action.worker
        assert worker not in self.alive, "one process per worker"
        assert not self.ended, "nothing is started after the end"
        assert action.incarnation == self.lives[worker]
        self.lives[worker] += 1
        self.resting.discard(worker)
        self.alive[worker] = _FakeWorker(action.incarnation, self.now, self.awake)
        assert len(self.alive) <= self.allowed, "nothing is started beyond what is allowed"

    def produce(self, action: events.Produce) -> None:
        fake = self.alive[action.worker]
        assert not self.ended
        assert fake.ready and len(fake.queue) < (1 if self.limits.own_lanes else 2)
        assert fake.condemned is None and not fake.grown and not fake.retiring, "it is about to leave"
        slot, ticket = action.slot, action.ticket
        assert slot in self.slots and slot not in self.filling and slot not in self.leased
        assert slot not in self.delivered.values(), "a READY slot is not written"
        assert slot not in self.unproven, "nobody else may still write there"
        assert self.is_to_come(ticket) and ticket not in self.delivered, "never made twice"
        if self.limits.own_lanes:
            assert ticket % self.limits.lanes == action.worker, "each in its lane"
            made = sum(t % self.limits.lanes == action.worker for t in self.delivered)
            assert ticket == self.next_tickets[action.worker] + made * self.limits.lanes, "one after the other"
        assert ticket not in {t for _, t in self.filling.values()}, "in one place at a time"
        assert self.now >= self.not_before.pop(ticket, 0.0), "its time has not come"
        assert action.attempt >= self.attempts[ticket], "a draw that was given up stays so"
        self.attempts[ticket] = action.attempt
        if not fake.queue:
            if ticket > self.newest:
                assert self.surely_at_work < self.enough, "it would only wait for a CPU"
            fake.progress, fake.began = self.awake, self.now
        fake.queue.append((ticket, slot))
        self.filling[slot] = (action.worker, ticket)
        if ticket > self.newest and len(self.in_use) > self.limits.slots:
            assert self.reserve and not self.limits.own_lanes
            self.wide = self.wide or bool(self.delivered and self.next_tickets[0] not in self.delivered)
            assert self.wide, "nothing was ever held up"
            assert not self.failed, "what fails is found out first"
        self.newest = max(self.newest, ticket)

    @property
    def enough(self) -> float:
        """How many at work keep the CPUs busy."""
        known = self.cpus and not self.limits.own_lanes
        return self.cpus.bit_count() + 1 if known and not (self.has_worked and self.effort.cpu_s < 0.1) else math.inf

    @property
    def surely_at_work(self) -> int:
        return sum(bool(f.queue) and f.condemned is None and self.now - f.began < 5.0 for f in self.alive.values())

    @property
    def in_use(self) -> set[int]:
        return self.filling.keys() | self.leased | set(self.delivered.values())

    def goes_on(self, fake: _FakeWorker) -> None:
        """It has done one thing and begins the next."""
        fake.since, fake.progress, fake.began = self.now, self.awake, self.now
        fake.idle_from = self.now

    def it_is_hung(self, fake: _FakeWorker, action: events.Condemn) -> None:
        assert fake.expected and not self.ended
        hang = self.limits.hang
        least_s = LEAST_S if hang.fixed_s is None else hang.fixed_s
        least_s = min(hang.most_s, max(least_s, hang.first_s) if fake.fresh else least_s)
        assert action.allowed_s >= least_s
        assert self.awake - fake.progress >= least_s - EPSILON_S, "what passed while nobody looked does not count"
        assert abs(action.idle_s - (self.awake - fake.progress)) < EPSILON_S

    def abandon(self, worker: int, incarnation: int) -> events.Exited:
        fake = self.alive[worker]
        assert fake.incarnation == incarnation and fake.condemned is not None
        assert self.awake >= fake.condemned + KILL_S - EPSILON_S, "it gets the time to end"
        return self.bury(worker, Cause.NURSERY, proven=False)

    def bury(
        self, worker: int, cause: Cause, *, proven: bool = True, counts: bool = True, case: str | None = None
    ) -> events.Exited:
        fake = self.alive.pop(worker)
        for ticket, slot in fake.queue:
            self.lost.add(ticket)
            self.filling.pop(slot, None)
            if not proven:
                self.unproven.add(slot)
        self.buried.append((worker, fake.incarnation))
        if fake.rests and cause is Cause.SPENT and fake.condemned is None and not self.ended:
            self.resting.add(worker)
        ticket = fake.queue[0][0] if fake.queue else None
        blamed = cause in (Cause.ITSELF, Cause.READING, Cause.MEMORY, Cause.HUNG) or fake.condemned is not None
        if case is not None and ticket is not None and blamed:
            self.wrongs[case] += 1
        self.deaths += 1
        return events.Exited(worker, fake.incarnation, cause, proven, counts, ticket=ticket, case=case)

    def record(self, action: events.Action) -> None:  # noqa: C901 - one branch an action
        policy = self.limits.policy
        match action:
            case events.Mourn(_, _, tickets, restart_in_s, _, again_in_s):
                assert restart_in_s is None or 0 <= restart_in_s <= self.limits.backoff_max_s
                assert not tickets or again_in_s >= 0
                if again_in_s > 0:
                    self.failed.add(tickets[0])
                    self.not_before[tickets[0]] = self.now + again_in_s
            case events.Retry(worker, incarnation, ticket, in_s):
                self.lost.add(ticket)
                self.failed.add(ticket)
                assert self.alive[worker].incarnation == incarnation
                self.filling = {slot: held for slot, held in self.filling.items() if held != (worker, ticket)}
                self.not_before[ticket] = self.now + in_s
            case events.Redraw(ticket, attempt):
                assert attempt > self.attempts[ticket]
                self.attempts[ticket] = attempt
            case events.Quarantine(case, _, quarantined, limit):
                assert policy.on_bad_case is OnBadCase.QUARANTINE and not self.in_outage
                assert case not in self.quarantined and self.wrongs[case] >= 2 and self.successes > 0
                self.quarantined.add(case)
                assert quarantined == len(self.quarantined) <= limit
                assert self.cases is None or limit <= max(1, policy.max_share * self.cases) < self.cases
            case events.Outage(cases):
                assert self.in_outage != bool(cases), "one ends before the next begins"
                self.in_outage = bool(cases)
            case events.Resize(workers, before, why):
                assert not self.limits.own_lanes, "nobody else can do a worker's part"
                assert before == self.allowed != workers and 1 <= workers <= self.limits.workers
                assert why is not Why.QUIET or workers == before + 1 <= self.most
                assert why not in (Why.DEATHS, Why.STARTS) or workers < before
                self.allowed = workers
            case events.Rest(resting, workers, at_work):
                assert (resting, workers) == (len(self.resting), self.limits.workers) and resting > 0
                assert at_work is None or at_work == self.enough
                assert not self.said_who_rests, "it is said once"
                self.said_who_rests = True
            case events.SwitchMethod():
                assert self.limits.other_method and not self.switched and self.allowed == self.least
                self.switched = True
            case events.GiveUp(why, case=case):
                assert not self.ended
                self.ended = True
                self.it_gives_up_for_a_reason(why, case)

    @property
    def least(self) -> int:
        """Workers below which it does not go."""
        return self.limits.workers if self.limits.own_lanes else 1

    def it_gives_up_for_a_reason(self, why: Why, case: str | None) -> None:
        policy = self.limits.policy.on_bad_case
        if why in (Why.DEATHS, Why.STARTS):
            assert self.deaths > 3 and self.allowed == self.least and self.switched == self.limits.other_method
        elif why is Why.OUTAGE:
            assert self.in_outage
        elif why is Why.BAD_CASE:
            assert policy is OnBadCase.RAISE
        else:
            assert why is Why.QUARANTINE and policy is OnBadCase.QUARANTINE and case is not None
            assert self.wrongs[case] >= 2 and self.successes > 0

    # ---- what can happen ----

    @rule(data=st.data(), everybody=st.booleans())
    def workers_get_ready(self, data: st.DataObject, everybody: bool) -> None:
        starting = [w for w, fake in self.alive.items() if not fake.ready]
        if starting and not everybody:
            starting = [data.draw(st.sampled_from(starting))]
        for worker in starting:
            self.gets_ready(worker)

    def gets_ready(self, worker: int) -> None:
        fake = self.alive[worker]
        fake.ready = True
        self.goes_on(fake)
        self.feed(events.Ready(worker, fake.incarnation, self.cases, self.cpus))

    @rule(data=st.data(), cases=st.sets(st.sampled_from(CASES), max_size=2))
    def a_worker_finishes(self, data: st.DataObject, cases: set[str]) -> None:
        busy = [w for w, fake in self.alive.items() if fake.queue]
        if busy:
            self.finishes(data.draw(st.sampled_from(busy)), tuple(sorted(cases)))

    def finishes(self, worker: int, cases: tuple[str, ...] = ()) -> None:
        fake = self.alive[worker]
        ticket, slot = fake.queue.pop(0)
        self.longest_s = max(self.longest_s, self.now - fake.began)
        fake.fresh = False
        self.goes_on(fake)
        if self.ended:
            self.filling.pop(slot)
        else:
            self.successes += 1
            self.has_worked = True
            self.deaths = 0
            for case in cases:
                del self.wrongs[case]
        self.feed(events.Finished(worker, fake.incarnation, ticket, slot, cases, effort=self.effort))
        assert self.ended or ticket in self.delivered

    @rule(rounds=st.integers(1, 6), cases=st.sets(st.sampled_from(CASES[3:]), max_size=2))
    def all_goes_well_for_a_while(self, rounds: int, cases: set[str]) -> None:
        for _ in range(rounds):
            self.now += 0.5
            self.ticks()
            for worker, fake in list(self.alive.items()):
                if not fake.ready:
                    self.gets_ready(worker)
                elif fake.queue:
                    self.finishes(worker, tuple(sorted(cases)))
            self.the_consumer_takes()
            self.leases_end()

    @rule(data=st.data(), failure=st.sampled_from(FAILURES))
    def a_ticket_fails(self, data: st.DataObject, failure: events.Failure) -> None:
        busy = [w for w, fake in self.alive.items() if fake.queue]
        if busy:
            self.fails(data.draw(st.sampled_from(busy)), failure)

    def fails(self, worker: int, failure: events.Failure) -> None:
        fake = self.alive[worker]
        ticket, slot = fake.queue.pop(0)
        if failure.case is not None:
            self.wrongs[failure.case] += 1
        self.goes_on(fake)
        if self.ended:
            self.filling.pop(slot)
        self.feed(events.Finished(worker, fake.incarnation, ticket, slot, failure=failure))

    @rule(
        faults=st.lists(st.sampled_from([*FAILURES[:-1], Cause.ITSELF, Cause.READING]), min_size=1, max_size=3),
        others_work=st.booleans(),
        times=st.integers(1, 20),
        waits=st.booleans(),
    )
    def something_stays_bad(
        self, faults: list[events.Failure | Cause], others_work: bool, times: int, waits: bool
    ) -> None:
        """Tickets fail or kill their workers in turn, and each is made again when its time comes."""
        how = [*faults, None] if others_work else faults
        for turn in range(times):
            for worker, fake in list(self.alive.items()):
                if not fake.ready:
                    self.gets_ready(worker)
            busy = [w for w, fake in self.alive.items() if fake.queue and not fake.unkillable]
            fault = how[turn % len(how)]
            if busy and fault is None:
                self.finishes(busy[-1], CASES[5:])
                self.the_consumer_takes()
                self.leases_end()
            elif busy and isinstance(fault, Cause):
                self.feed(self.bury(busy[0], fault, case="brain_2"))
            elif busy and isinstance(fault, events.Failure):
                self.fails(busy[0], fault)
            later = [at for at in self.not_before.values() if at > self.now]
            if waits and later:
                self.now = min(later)
                self.ticks()

    @rule(
        data=st.data(),
        cause=st.sampled_from(Cause),
        proven=st.booleans(),
        counts=st.booleans(),
        case=st.sampled_from([None, "brain_1", "brain_5"]),
    )
    def a_worker_dies(self, data: st.DataObject, cause: Cause, proven: bool, counts: bool, case: str | None) -> None:
        mortal = sorted(w for w, fake in self.alive.items() if not fake.unkillable)
        if mortal:
            worker = data.draw(st.sampled_from(mortal))
            self.feed(self.bury(worker, cause, proven=proven, counts=counts, case=case))

    @rule()
    def the_condemned_and_the_retiring_end(self) -> None:
        for worker, fake in list(self.alive.items()):
            if fake.condemned is not None and not fake.unkillable:
                self.feed(self.bury(worker, Cause.OUTSIDE))
            elif fake.retiring:
                self.feed(self.bury(worker, Cause.SPENT))

    @rule(data=st.data(), really=st.integers(0, 3))
    def a_worker_becomes_unkillable(self, data: st.DataObject, really: int) -> None:
        if self.alive and really == 0:
            self.alive[data.draw(st.sampled_from(sorted(self.alive)))].unkillable = True

    @rule(data=st.data())
    def a_worker_shows_progress(self, data: st.DataObject) -> None:
        if self.alive:
            fake = self.alive[data.draw(st.sampled_from(sorted(self.alive)))]
            fake.since, fake.progress = self.now, self.awake

    @rule(data=st.data())
    def a_worker_grows(self, data: st.DataObject) -> None:
        if self.alive:
            worker = data.draw(st.sampled_from(sorted(self.alive)))
            fake = self.alive[worker]
            fake.grown = fake.grown or fake.ready
            self.feed(events.Grown(worker, fake.incarnation))

    @precondition(lambda self: not self.limits.own_lanes)
    @rule(workers=st.integers(0, 6), reserve=st.sampled_from([0, 1, 3, 100]))
    def memory_is_measured(self, workers: int, reserve: int) -> None:
        self.most = max(1, min(workers, self.limits.workers))
        self.measured = True
        self.reserve = max(self.reserve, min(reserve, self.limits.reserve))
        self.feed(events.Budget(workers, reserve))
        assert self.allowed <= self.most

    @precondition(lambda self: self.buried)
    @rule(data=st.data(), ticket=st.integers(0, 30), slot=st.integers(0, 10))
    def the_dead_are_heard_late(self, data: st.DataObject, ticket: int, slot: int) -> None:
        worker, incarnation = data.draw(st.sampled_from(self.buried))
        words: list[events.Event] = [
            events.Ready(worker, incarnation),
            events.Finished(worker, incarnation, ticket, slot),
            events.Finished(worker, incarnation, ticket, slot, failure=FAILURES[0]),
            events.Exited(worker, incarnation, ticket=ticket, case="brain_0"),
            events.Seen(worker, incarnation, 0.0),
            events.Grown(worker, incarnation),
        ]
        late = data.draw(st.sampled_from(words))
        assert self.machine.handle(late, self.now) == [], "the dead change nothing"

    def it_is_told(self, news: events.Taken | events.Released, *, at_once: bool) -> None:
        if at_once:
            self.feed(news)
        else:  # with whatever happens next
            self.news.append(news)

    @rule(told_at_once=st.booleans())
    def the_consumer_takes(self, told_at_once: bool = True) -> None:
        """Of each lane in turn."""
        ticket = self.next_tickets[self.turn]
        if ticket in self.delivered and len(self.leased) < self.limits.max_leases:
            slot = self.delivered.pop(ticket)
            if slot in self.slots:
                self.leased.add(slot)
            self.next_tickets[self.turn] += self.limits.lanes
            self.turn = (self.turn + 1) % self.limits.lanes
            self.taken += 1
            self.it_is_told(events.Taken(ticket), at_once=told_at_once)
            if ticket in self.raised and not self.ended:
                self.ended = True
                self.feed(events.Close(failed=True))

    @rule(data=st.data(), told_at_once=st.booleans())
    def the_consumer_releases(self, data: st.DataObject, told_at_once: bool) -> None:
        if self.leased:
            slot = data.draw(st.sampled_from(sorted(self.leased)))
            self.leased.remove(slot)
            self.it_is_told(events.Released(slot), at_once=told_at_once)

    def leases_end(self) -> None:
        for slot in list(self.leased):
            self.leased.remove(slot)
            self.feed(events.Released(slot))

    @rule(seconds=st.one_of(st.floats(0.01, 5), st.floats(5, 14.9), st.floats(15.1, 100), st.floats(1800, 20_000)))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.ticks()

    @rule(seconds=st.floats(5, 10), asleep_s=st.floats(1800, 20_000), times=st.integers(1, 80))
    def the_trainer_is_suspended(self, seconds: float, asleep_s: float, times: int) -> None:
        """Its workers have shown progress that it has not seen yet."""
        for step_s in (seconds, asleep_s):
            self.now += step_s
            self.ticks()
            if step_s == seconds:
                for fake in self.alive.values():
                    fake.since, fake.progress = self.now, self.awake
        self.the_supervisor_waits(times)

    @precondition(lambda self: self.limits.rest_after_s < math.inf)
    @rule(rounds=st.integers(1, 12), takes=st.integers(0, 3), at_once=st.booleans())
    def there_is_little_to_do(self, rounds: int, takes: int, at_once: bool) -> None:
        """All is made that can be, and now and then a batch is taken: who has nothing to do goes."""
        for _ in range(rounds):
            for worker, fake in list(self.alive.items()):
                while worker in self.alive and (not fake.ready or fake.queue):
                    self.finishes(worker) if fake.ready else self.gets_ready(worker)
            self.now += self.limits.rest_after_s
            self.ticks()
            if at_once:  # or it is still there when there is something to do again
                self.the_condemned_and_the_retiring_end()
        for _ in range(takes):
            self.the_consumer_takes()
            self.leases_end()

    @rule(times=st.integers(1, 40), obedient=st.booleans())
    def the_supervisor_waits(self, times: int, obedient: bool = True) -> None:
        """As it does: until the machine wants to be called, and nothing else happens meanwhile."""
        for _ in range(times):
            wake = self.machine.next_wake()
            if wake is None:
                return
            self.now = max(self.now, wake)
            self.ticks()
            if obedient:
                self.the_condemned_and_the_retiring_end()

    def ticks(self) -> None:
        """A tick, and more as long as the machine wants them now: each has to do something."""
        for _ in range(5):
            actions = self.feed(events.Tick())
            self.nobody_is_forgotten()
            wake = self.machine.next_wake()
            if wake is None or wake > self.now:
                return
            assert actions, "it wants to be called and does nothing"
        raise AssertionError(f"a busy loop: {actions}")

    def nobody_is_forgotten(self) -> None:
        hang = self.limits.hang
        usual_s = max(LEAST_S, FACTOR * self.longest_s) if hang.fixed_s is None else hang.fixed_s
        for fake in self.alive.values():
            allowed_s = min(hang.most_s, max(usual_s, hang.first_s) if fake.fresh else usual_s)
            if fake.expected and not self.ended:
                assert self.awake - fake.progress < allowed_s + EPSILON_S, "it is hung"
            if fake.condemned is not None:
                assert self.awake - fake.condemned < KILL_S + EPSILON_S, "it can't be killed"

    @precondition(lambda self: not self.ended)
    @rule(failed=st.booleans(), really=st.integers(0, 9))
    def somebody_closes(self, failed: bool, really: int) -> None:
        if really == 0:
            self.ended = True
            self.feed(events.Close(failed))

    # ---- what must hold ----

    def nobody_rests_while_work_waits(self) -> None:
        """Somebody is on the way whenever a ticket could be made, and a worker may be started for it."""
        if self.ended or not self.resting or len(self.alive) >= self.allowed:
            return
        later = sum(at > self.now for at in self.not_before.values())
        waiting = max(0, self.limits.slots - len(self.in_use) - later)
        starting = any(not fake.ready and fake.condemned is None for fake in self.alive.values())
        busy = sum(bool(fake.queue) and fake.condemned is None for fake in self.alive.values()) >= self.enough
        assert waiting == 0 or starting or busy, f"{waiting} tickets could be made, and {self.resting} rest"

    def it_wakes_in_time(self) -> None:
        """The machine knows when it is needed again, as far as this world can tell."""
        wake = self.machine.next_wake()
        due = [self.now + KILL_S for fake in self.alive.values() if fake.condemned is not None]
        if not self.ended:
            due += [at for at in self.not_before.values() if at > self.now]
            due += [self.now + 5.0 for fake in self.alive.values() if fake.expected]
            if len(self.alive) + len(self.resting) < self.allowed:
                due.append(self.now + self.limits.backoff_max_s)
            if self.measured and not self.limits.own_lanes and self.limits.rest_after_s < math.inf:
                idle = [f for f in self.alive.values() if f.ready and not (f.queue or f.expected or f.condemned)]
                due += [max(self.now, fake.idle_from + self.limits.rest_after_s) for fake in idle]
        assert not due or (wake is not None and wake <= min(due) + EPSILON_S)

    @invariant()
    def it_ends_when_it_says_so(self) -> None:
        assert self.ended == (self.machine.state is not PoolState.RUNNING)
        assert self.machine.stopped == (self.ended and not self.alive)
        assert self.machine.allowed == self.allowed
        resting = {w for w in range(self.limits.workers) if self.machine.worker_state(w) is WorkerState.RESTING}
        assert resting == (set() if self.ended else self.resting)
        assert not self.alive.keys() & self.resting
        if self.ended:
            assert all(fake.condemned is not None for fake in self.alive.values()), "all are told to end"

    def teardown(self) -> None:
        """Whatever happened: from here on nobody fails, and then every ticket comes; or everything ends."""
        if not hasattr(self, "machine") or sys.exc_info()[0] is not None:
            return
        goal = self.taken + 10
        for _ in range(200):
            if self.ended or self.taken >= goal:
                break
            self.now += 5.0
            for fake in self.alive.values():
                fake.unkillable = False
                if fake.condemned is None:
                    fake.since, fake.progress = self.now, self.awake + 5.0
            self.ticks()
            self.the_condemned_and_the_retiring_end()
            for worker, fake in list(self.alive.items()):
                if not fake.ready:
                    self.gets_ready(worker)
                if fake.queue:
                    self.finishes(worker)
            self.leases_end()
            self.the_consumer_takes()
        else:
            raise AssertionError(f"no progress: {self.machine.slots()}, {self.alive}")
        if not self.ended:
            self.ended = True
            self.feed(events.Close())
        self.the_end_is_clean()

    def the_end_is_clean(self) -> None:
        for worker, fake in list(self.alive.items()):
            if not fake.unkillable:
                self.feed(self.bury(worker, Cause.OUTSIDE))
        self.now += KILL_S
        self.ticks()
        self.leases_end()
        assert self.machine.stopped and self.machine.next_wake() is None
        assert sum(self.machine.slots().values()) == 0 == self.machine.slots()[SlotState.FREE]


TestMachine = World.TestCase
TestMachine.settings = settings(
    max_examples=int(os.environ.get("SAFELOADER_EXAMPLES", "300")),
    stateful_step_count=60,
    deadline=None,
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
