"""The machine over any order of events: the invariants hold after every step, and it always makes progress.

`World` plays everything around the machine: workers that get ready, finish and die whenever they like, messages of
the dead that arrive late, a consumer that takes and releases in its own time. It checks what it is told to do
against what it knows, independently of the machine's own `validate`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from safeloader.pool import events
from safeloader.pool.machine import Limits, Machine, PoolState, SlotState


@dataclass
class _FakeWorker:
    incarnation: int
    ready: bool = False
    queue: list[tuple[int, int]] = field(default_factory=list)


class World(RuleBasedStateMachine):
    @initialize(workers=st.integers(1, 4), num_cached=st.integers(1, 3), max_restarts=st.sampled_from([3, 10_000]))
    def begin(self, workers: int, num_cached: int, max_restarts: int) -> None:
        self.limits = Limits(workers, num_cached, max_restarts, window_s=600, backoff_first_s=0.1, backoff_max_s=5)
        self.machine = Machine(self.limits)
        self.now = 0.0
        self.alive: dict[int, _FakeWorker] = {}
        self.buried: list[tuple[int, int]] = []
        self.slots: set[int] = set()
        self.filling: dict[int, tuple[int, int]] = {}  # slot: (worker, ticket)
        self.unproven: set[int] = set()  # slots in which an abandoned worker may still write
        self.delivered: dict[int, int] = {}  # ticket: slot, not taken yet
        self.leased: set[int] = set()
        self.next_ticket = 0
        self.ended = False
        self.feed(events.Tick())

    # ---- carrying out what the machine says ----

    def feed(self, event: events.Event) -> None:
        for action in self.machine.handle(event, self.now):
            self.carry_out(action)
        self.machine.validate()

    def carry_out(self, action: events.Action) -> None:
        match action:
            case events.Start(worker, incarnation):
                assert worker not in self.alive, "one process per worker"
                assert not self.ended, "nothing is started after the end"
                self.alive[worker] = _FakeWorker(incarnation)
            case events.Stop(worker, incarnation):
                assert self.alive[worker].incarnation == incarnation
            case events.CreateSlot(slot):
                assert slot not in self.slots
                self.slots.add(slot)
                assert len(self.slots) <= self.limits.slots, "memory is bounded"
            case events.DiscardSlot(slot):
                assert slot not in self.leased, "a lease is never taken away"
                assert slot not in self.filling or self.filling[slot][0] not in self.alive
                self.slots.remove(slot)
                self.filling.pop(slot, None)
            case events.Produce(worker, ticket, slot):
                fake = self.alive[worker]
                assert fake.ready and len(fake.queue) < 2
                assert slot in self.slots and slot not in self.filling and slot not in self.leased
                assert slot not in self.delivered.values(), "a READY slot is not written"
                assert slot not in self.unproven, "nobody else may still write there"
                assert ticket >= self.next_ticket and ticket not in self.delivered, "never made twice"
                assert ticket not in {t for _, t in self.filling.values()}, "in one place at a time"
                fake.queue.append((ticket, slot))
                self.filling[slot] = (worker, ticket)
            case events.Deliver(ticket, slot, _):
                assert ticket not in self.delivered and ticket >= self.next_ticket, "exactly once"
                self.filling.pop(slot)
                self.delivered[ticket] = slot
            case events.GiveUp():
                self.ended = True
            case events.Mourn():
                pass

    # ---- what can happen ----

    @rule(data=st.data())
    def a_worker_gets_ready(self, data: st.DataObject) -> None:
        starting = [w for w, fake in self.alive.items() if not fake.ready]
        if starting:
            worker = data.draw(st.sampled_from(starting))
            self.alive[worker].ready = True
            self.feed(events.Ready(worker, self.alive[worker].incarnation))

    @rule(data=st.data(), failed=st.booleans())
    def a_worker_finishes(self, data: st.DataObject, failed: bool) -> None:
        busy = [w for w, fake in self.alive.items() if fake.queue]
        if busy:
            worker = data.draw(st.sampled_from(busy))
            ticket, slot = self.alive[worker].queue.pop(0)
            if self.ended:
                self.filling.pop(slot)
            self.feed(events.Finished(worker, self.alive[worker].incarnation, ticket, slot, failed))

    @rule(data=st.data(), proven=st.booleans())
    def a_worker_dies(self, data: st.DataObject, proven: bool) -> None:
        if self.alive:
            worker = data.draw(st.sampled_from(sorted(self.alive)))
            fake = self.alive.pop(worker)
            for _, slot in fake.queue:
                self.filling.pop(slot, None)
                if not proven:
                    self.unproven.add(slot)
            self.buried.append((worker, fake.incarnation))
            self.feed(events.Exited(worker, fake.incarnation, proven))

    @precondition(lambda self: self.buried)
    @rule(data=st.data(), ticket=st.integers(0, 30), slot=st.integers(0, 10))
    def the_dead_are_heard_late(self, data: st.DataObject, ticket: int, slot: int) -> None:
        worker, incarnation = data.draw(st.sampled_from(self.buried))
        kind = data.draw(st.integers(0, 2))
        late = (
            events.Ready(worker, incarnation),
            events.Finished(worker, incarnation, ticket, slot),
            events.Exited(worker, incarnation),
        )[kind]
        assert self.machine.handle(late, self.now) == [], "the dead change nothing"

    @rule()
    def the_consumer_takes(self) -> None:
        if self.next_ticket in self.delivered and len(self.leased) < self.limits.max_leases:
            self.leased.add(self.delivered.pop(self.next_ticket))
            self.feed(events.Taken(self.next_ticket))
            self.next_ticket += 1

    @rule(data=st.data())
    def the_consumer_releases(self, data: st.DataObject) -> None:
        if self.leased:
            slot = data.draw(st.sampled_from(sorted(self.leased)))
            self.leased.remove(slot)
            self.feed(events.Released(slot))

    @rule(seconds=st.floats(0.01, 700))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.feed(events.Tick())

    @precondition(lambda self: not self.ended)
    @rule(failed=st.booleans(), really=st.integers(0, 9))
    def somebody_closes(self, failed: bool, really: int) -> None:
        if really == 0:
            self.ended = True
            self.feed(events.Close(failed))

    # ---- what must hold ----

    @invariant()
    def it_ends_when_it_says_so(self) -> None:
        assert self.ended == (self.machine.state is not PoolState.RUNNING)
        assert self.machine.stopped == (self.ended and not self.alive)

    def teardown(self) -> None:
        """Whatever happened: from here on nobody dies, and then every ticket comes; or everything ends."""
        if not hasattr(self, "machine"):
            return
        if self.ended:
            self.the_end_is_clean()
            return
        goal = self.next_ticket + 10
        for _ in range(200):
            if self.next_ticket >= goal:
                return
            self.now += self.limits.backoff_max_s
            self.feed(events.Tick())
            for worker, fake in list(self.alive.items()):
                if not fake.ready:
                    fake.ready = True
                    self.feed(events.Ready(worker, fake.incarnation))
                if fake.queue:
                    ticket, slot = fake.queue.pop(0)
                    self.feed(events.Finished(worker, fake.incarnation, ticket, slot))
            for slot in list(self.leased):
                self.leased.remove(slot)
                self.feed(events.Released(slot))
            self.the_consumer_takes()
        raise AssertionError(f"no progress: {self.machine.slots()}, {self.alive}")

    def the_end_is_clean(self) -> None:
        for worker, fake in list(self.alive.items()):
            del self.alive[worker]
            for _, slot in fake.queue:
                self.filling.pop(slot, None)
            self.feed(events.Exited(worker, fake.incarnation))
        for slot in list(self.leased):
            self.leased.remove(slot)
            self.feed(events.Released(slot))
        assert self.machine.stopped
        assert sum(self.machine.slots().values()) == 0 == self.machine.slots()[SlotState.FREE]


TestMachine = World.TestCase
TestMachine.settings = settings(
    max_examples=int(os.environ.get("SAFELOADER_EXAMPLES", "300")),
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
