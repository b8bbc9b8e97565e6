"""The watchdog as lists of events: who is looked at, who is condemned, who is abandoned, and when the machine asks."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from safeloader.pool import events
from safeloader.pool.events import Cause
from safeloader.pool.machine import HEARTBEAT_S, KILL_S, Machine, WorkerState
from safeloader.pool.patience import HangLimits
from safeloader.pool.slots import SlotState
from tests.unit.simulation import Draw, Simulation, limits

START = 1000.0


class Watched:
    """A machine with workers at work since `START`, whose pages show no progress unless a test says so."""

    def __init__(self, workers: int = 1, *, hang: HangLimits | None = None, ready: bool = True, **others: Any) -> None:
        hang = HangLimits() if hang is None else hang
        self.machine = Machine(limits(workers, 1, hang=hang, **others))
        self.now = START
        self.pages = dict.fromkeys(range(workers), START)
        self.tell(events.Tick())
        for worker in range(workers if ready else 0):
            self.tell(events.Ready(worker, 0))

    def tell(self, event: events.Event) -> list[events.Action]:
        actions = self.machine.handle(event, self.now)
        self.machine.validate()
        return actions

    def tick(self) -> list[events.Action]:
        """A tick, and what pages say if they are asked for."""
        actions = self.tell(events.Tick())
        for action in list(actions):
            if isinstance(action, events.Inspect):
                actions += self.tell(events.Seen(action.worker, action.incarnation, self.pages[action.worker]))
        return actions

    def wait_until(self, until: float) -> list[events.Action]:
        """As the supervisor does: whenever the machine wants to be called."""
        actions: list[events.Action] = []
        while (wake := self.machine.next_wake()) is not None and wake <= until:
            assert wake >= self.now and len(actions) < 1000
            self.now = wake
            actions += self.tick()
        self.now = until
        return actions + self.tick()


def condemned(actions: list[events.Action]) -> list[int]:
    return [action.worker for action in actions if isinstance(action, events.Condemn)]


# ---- when ----


def test_a_first_batch_has_five_minutes_to_the_instant() -> None:
    pool = Watched()
    assert pool.wait_until(START + 299.999) == []
    assert pool.machine.next_wake() == START + 300.0
    assert pool.wait_until(START + 300.0)[-1] == events.Condemn(0, 0, 300.0, 300.0)


def test_so_has_a_start() -> None:
    pool = Watched(ready=False)
    assert pool.wait_until(START + 299.999) == []
    pool.now = START + 300.0
    assert pool.tick() == [events.Inspect(0, 0), events.Condemn(0, 0, 300.0, 300.0)]


def test_a_later_batch_has_two_minutes() -> None:
    pool = Watched()
    pool.now += 1.0
    pool.tell(events.Finished(0, 0, 0, 0))
    assert condemned(pool.wait_until(START + 120.999)) == []
    assert condemned(pool.wait_until(START + 121.0)) == [0]


def test_a_failed_try_is_not_a_first_batch() -> None:
    pool = Watched()
    pool.tell(events.Finished(0, 0, 0, 0, failure=events.Failure("OSError", reading=True)))
    assert condemned(pool.wait_until(START + 299.0)) == []


def test_batches_whose_time_varies_a_hundredfold_set_the_deadline() -> None:
    pool = Watched(workers=1)
    chance = random.Random(0)
    times = [0.2 * 100 ** chance.random() for _ in range(100)]
    for ticket, seconds in enumerate(times):
        pool.pages[0] = pool.now
        assert condemned(pool.wait_until(pool.now + seconds)) == []
        (slot,) = [at for number, at in pool.machine._workers[0].assigned if number == ticket]
        pool.tell(events.Finished(0, 0, ticket, slot))
        pool.tell(events.Taken(ticket))
        pool.tell(events.Released(slot))
    pool.pages[0] = pool.now
    *_, slow_s, slowest_s = sorted(times)
    assert 20 * slow_s > 240.0 and slowest_s < 20.0
    began = pool.now
    assert condemned(pool.wait_until(began + 20 * slow_s - 0.01)) == []
    assert condemned(pool.wait_until(began + 20 * slowest_s + 0.01)) == [0]


def test_a_fixed_deadline() -> None:
    pool = Watched(hang=HangLimits(fixed_s=2.0, first_s=3.0))
    assert condemned(pool.wait_until(START + 2.99)) == []
    assert pool.wait_until(START + 3.0)[-1] == events.Condemn(0, 0, 3.0, 3.0)


def test_infinite_means_never() -> None:
    pool = Watched(hang=HangLimits(fixed_s=math.inf))
    assert pool.wait_until(START + 100_000.0) == []


def test_the_cap() -> None:
    pool = Watched(hang=HangLimits(most_s=240.0))
    assert condemned(pool.wait_until(START + 239.9)) == []
    assert condemned(pool.wait_until(START + 240.0)) == [0]


def test_an_idle_worker_is_not_watched() -> None:
    pool = Watched(workers=1)
    for ticket, slot in ((0, 0), (1, 1), (2, 2)):
        pool.tell(events.Finished(0, 0, ticket, slot))
    assert pool.machine.slots()[SlotState.READY] == 3
    assert pool.machine.next_wake() is None
    pool.now += 100_000.0
    assert pool.tick() == []


def test_it_is_watched_from_the_moment_it_gets_work() -> None:
    pool = Watched(workers=1)
    for ticket, slot in ((0, 0), (1, 1), (2, 2)):
        pool.tell(events.Finished(0, 0, ticket, slot))
    pool.now += 10_000.0
    pool.tell(events.Taken(0))
    assert [type(action) for action in pool.tell(events.Released(0))] == [events.Produce]
    assert condemned(pool.wait_until(START + 10_119.9)) == []
    assert condemned(pool.wait_until(START + 10_120.0)) == [0]


# ---- progress ----


def test_progress_on_the_page_postpones() -> None:
    pool = Watched()
    pool.pages[0] = START + 200.0
    actions = pool.wait_until(START + 300.0)
    assert actions == [events.Inspect(0, 0)]
    assert condemned(pool.wait_until(START + 499.9)) == []
    assert pool.wait_until(START + 500.0)[-1] == events.Condemn(0, 0, 300.0, 300.0)


def test_progress_at_the_last_moment_saves() -> None:
    pool = Watched()
    for _ in range(20):
        pool.pages[0] = pool.now + 299.0
        assert condemned(pool.wait_until(pool.now + 300.0)) == []


def test_each_worker_has_its_own_deadline() -> None:
    pool = Watched(workers=3)
    pool.pages[1] = START + 50.0
    pool.pages[2] = START + 10.0
    assert condemned(pool.wait_until(START + 300.0)) == [0]
    pool.tell(events.Exited(0, 0, Cause.OUTSIDE))
    assert condemned(pool.wait_until(START + 309.9)) == []
    assert condemned(pool.wait_until(START + 310.0)) == [2]
    pool.tell(events.Exited(2, 0, Cause.OUTSIDE))
    assert condemned(pool.wait_until(START + 350.0)) == [1]


# ---- time that nobody saw ----


@pytest.mark.parametrize("asleep_s", [16.0, 290.0, 3600.0, 1e6])
def test_a_supervisor_that_slept_condemns_nobody_for_it(asleep_s: float) -> None:
    pool = Watched()
    pool.wait_until(START + 100.0)
    pool.now += asleep_s
    assert pool.tick() == []
    assert condemned(pool.wait_until(pool.now + 199.9)) == []
    assert condemned(pool.wait_until(pool.now + 0.2)) == [0]


def test_progress_that_only_the_page_knows_of_counts_after_a_sleep_as_well() -> None:
    """The trainer was stopped (Ctrl-Z, a suspended job) five seconds after the worker's last sign of life."""
    pool = Watched()
    pool.wait_until(START + 290.0)
    pool.pages[0] = START + 285.0
    pool.now += 3600.0
    pool.tick()
    woke = pool.now
    assert condemned(pool.wait_until(woke + 294.9)) == []
    assert condemned(pool.wait_until(woke + 295.0)) == [0]


def test_progress_during_the_sleep_counts() -> None:
    """Only the trainer was stopped; its workers went on for a while."""
    pool = Watched()
    pool.pages[0] = START + 1000.0
    pool.now += 3600.0
    pool.tick()
    woke = pool.now
    assert condemned(pool.wait_until(woke + 299.9)) == []
    assert condemned(pool.wait_until(woke + 300.1)) == [0]


def test_it_asks_to_be_called_often_enough_to_notice_a_sleep() -> None:
    pool = Watched()
    assert pool.machine.next_wake() == START + HEARTBEAT_S


def test_two_sleeps() -> None:
    pool = Watched()
    for _ in range(2):
        pool.wait_until(pool.now + 100.0)
        pool.now += 5000.0
        pool.tick()
    assert condemned(pool.wait_until(pool.now + 99.9)) == []
    assert condemned(pool.wait_until(pool.now + 0.1)) == [0]


def test_a_sleep_does_not_make_a_batch_a_slow_one() -> None:
    pool = Watched(workers=1)
    pool.wait_until(START + 100.0)
    pool.now += 36_000.0
    pool.pages[0] = pool.now
    pool.tick()
    pool.tell(events.Finished(0, 0, 0, 0))
    assert condemned(pool.wait_until(pool.now + 1999.0)) == []
    assert condemned(pool.wait_until(pool.now + 1.0)) == [0], "twenty times the hundred seconds that it took"


def test_the_condemned_has_its_five_seconds_after_a_sleep_as_well() -> None:
    pool = Watched(workers=1)
    pool.wait_until(START + 300.0)
    pool.now += 3600.0
    assert pool.tick() == []
    assert pool.machine.next_wake() == pool.now + KILL_S


def test_the_condemned_is_not_asked_to_leave() -> None:
    pool = Watched(workers=1)
    pool.tell(events.Grown(0, 0))
    pool.wait_until(START + 300.0)
    pool.tell(events.Finished(0, 0, 0, 0))
    assert pool.tell(events.Finished(0, 0, 1, 1)) == [events.Deliver(1, 1, False)]


def test_the_trainer_computes_for_long_without_a_pause() -> None:
    """A call that holds the interpreter's lock for ten seconds is no sleep, and kills nobody either."""
    pool = Watched(workers=2)
    for _ in range(100):
        pool.now += 10.0
        pool.pages = dict.fromkeys(pool.pages, pool.now)
        assert condemned(pool.tick()) == []


# ---- what follows ----


def test_the_condemned_is_replaced_when_it_has_ended_and_its_tickets_come_first() -> None:
    pool = Watched(workers=2)
    pool.pages[1] = START + 299.0
    pool.wait_until(START + 300.0)
    pool.now += 0.05
    death = pool.tell(events.Exited(0, 0, Cause.OUTSIDE, ticket=0, case="brain_1"))
    assert death[0] == events.Mourn(0, 0, (0, 1), 0.0, cause=Cause.HUNG, again_in_s=0.5)
    assert events.Start(0, 1) in death
    produced = [action for action in death if isinstance(action, events.Produce)]
    assert produced == [], "the other one has enough to do, and a new one comes"
    pool.now += 0.02
    assert [action.ticket for action in pool.tell(events.Ready(0, 1)) if isinstance(action, events.Produce)] == [1]
    pool.now += 0.5
    assert [action.ticket for action in pool.tell(events.Tick()) if isinstance(action, events.Produce)] == [0]


def test_the_condemned_gets_no_more_tickets_but_may_still_deliver() -> None:
    pool = Watched(workers=1)
    pool.wait_until(START + 300.0)
    late = pool.tell(events.Finished(0, 0, 0, 0))
    assert late == [events.Deliver(0, 0, False)]
    pool.tell(events.Taken(0))
    assert pool.tell(events.Released(0)) == []
    death = pool.tell(events.Exited(0, 0, Cause.OUTSIDE, ticket=1))
    assert death[0] == events.Mourn(0, 0, (1,), 0.0, cause=Cause.HUNG, again_in_s=0.5)


def test_a_worker_that_cannot_be_killed_is_abandoned_and_its_slots_are_not_written_again() -> None:
    pool = Watched(workers=1)
    pool.wait_until(START + 300.0)
    assert pool.machine.next_wake() == START + 300.0 + KILL_S
    assert pool.wait_until(START + 304.9) == []
    pool.now = START + 305.0
    assert pool.tick() == [events.Abandon(0, 0)]
    death = pool.tell(events.Exited(0, 0, Cause.NURSERY, proven=False, ticket=0))
    assert death == [
        events.DiscardSlot(0),
        events.DiscardSlot(1),
        events.Mourn(0, 0, (0, 1), 0.0, cause=Cause.HUNG, again_in_s=0.5),
        events.Start(0, 1),
    ]
    produced = [action for action in pool.tell(events.Ready(0, 1)) if isinstance(action, events.Produce)]
    assert [(action.ticket, action.slot) for action in produced] == [(1, 2), (2, 3)]
    assert pool.machine.slots() == {SlotState.FREE: 0, SlotState.FILLING: 2, SlotState.READY: 0, SlotState.LEASED: 0}


def test_what_the_abandoned_says_later_is_not_heard() -> None:
    pool = Watched(workers=1)
    pool.wait_until(START + 304.9)
    pool.now = START + 305.0
    assert pool.tick() == [events.Abandon(0, 0)]
    pool.tell(events.Exited(0, 0, Cause.NURSERY, proven=False, ticket=0))
    for late in (events.Finished(0, 0, 0, 0), events.Seen(0, 0, pool.now), events.Exited(0, 0), events.Ready(0, 0)):
        assert pool.tell(late) == []


def test_a_worker_that_was_to_leave_and_does_not_is_condemned() -> None:
    pool = Watched(workers=1)
    pool.now += 1.0
    pool.tell(events.Grown(0, 0))
    pool.tell(events.Finished(0, 0, 0, 0))
    assert events.Retire(0, 0) in pool.tell(events.Finished(0, 0, 1, 1))
    assert condemned(pool.wait_until(START + 120.9)) == []
    assert condemned(pool.wait_until(START + 121.0)) == [0]
    death = pool.tell(events.Exited(0, 0, Cause.OUTSIDE))
    assert [type(action) for action in death[:2]] == [events.Mourn, events.Start]


def test_one_that_has_left_and_is_not_replaced_is_not_looked_at() -> None:
    pool = Watched(workers=2)
    pool.tell(events.Grown(1, 0))
    for ticket, slot in list(pool.machine._workers[1].assigned):
        pool.tell(events.Finished(1, 0, ticket, slot))
    pool.tell(events.Budget(1))
    pool.tell(events.Exited(1, 0, Cause.SPENT))
    assert pool.machine.worker_state(1) is WorkerState.DOWN
    pool.pages[0] = START + 10_000.0
    actions = pool.wait_until(START + 1000.0)
    assert {action.worker for action in actions if isinstance(action, events.Inspect)} == {0}


def test_after_the_end_nobody_is_inspected_and_who_does_not_end_is_abandoned() -> None:
    pool = Watched(workers=2, hang=HangLimits(fixed_s=1.0, first_s=1.0))
    stops = pool.tell(events.Close())
    assert stops == [events.Stop(0, 0), events.Stop(1, 0)]
    pool.tell(events.Exited(0, 0, Cause.OUTSIDE))
    assert pool.wait_until(START + 4.9) == []
    pool.now = START + KILL_S
    assert pool.tick() == [events.Abandon(1, 0)]
    pool.tell(events.Exited(1, 0, Cause.NURSERY, proven=False))
    assert pool.machine.stopped and pool.machine.next_wake() is None


def test_a_condemned_worker_is_not_stopped_twice() -> None:
    pool = Watched(workers=1)
    pool.wait_until(START + 300.0)
    assert pool.tell(events.Close()) == []


def test_no_false_kill_in_whole_pools_whose_batches_vary_a_hundredfold() -> None:
    chance = random.Random(0)

    def weather(draw: Draw) -> None:
        pool._batch_s = 0.5 * 100 ** chance.random()

    pool = Simulation(weather, workers=6, num_cached=3)
    pool.run(5000, within_s=math.inf)
    assert len(pool.taken) == 5000
    assert not pool.all(events.Condemn, events.Mourn)
