"""Workers that have nothing to do leave, and are started again when there is work: memory is what the work needs."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest

from safeloader.config import OnBadCase
from safeloader.pool import events
from safeloader.pool.blame import Policy
from safeloader.pool.events import Cause, Resize, Rest, Retire, Start, Why
from safeloader.pool.machine import KILL_S, Machine
from safeloader.pool.slots import SlotState
from tests.unit.simulation import Draw, Simulation, limits

REST_S = 20.0


def full(workers: int = 3, now: float = 0.0, **others: object) -> Machine:
    """A pool whose ring is full, with every worker idle since `now`; slots and tickets have the same numbers."""
    machine = Machine(limits(workers, 2, rest_after_s=REST_S, **others))
    machine.handle(events.Tick(), now)
    for worker in range(workers):
        machine.handle(events.Ready(worker, 0), now)
    while any(worker.assigned for worker in machine._workers):
        for worker in machine._workers:
            for ticket, slot in list(worker.assigned):
                machine.handle(events.Finished(worker.index, 0, ticket, slot), now)
    assert machine.slots()[SlotState.READY] == machine.limits.slots
    return machine


def asleep(workers: int = 3, **others: object) -> Machine:
    """The same, at 21 s: all rest."""
    machine = full(workers, **others)
    assert machine.handle(events.Tick(), REST_S) == [Retire(worker, 0, rests=True) for worker in range(workers)]
    for worker in range(workers):
        machine.handle(events.Exited(worker, 0, Cause.SPENT), REST_S + 1)
    assert states(machine) == ["resting"] * workers
    return machine


def take(machine: Machine, ticket: int, now: float) -> list[events.Action]:
    """The consumer takes a batch and lets it go."""
    return [*machine.handle(events.Taken(ticket), now), *machine.handle(events.Released(ticket), now)]


def states(machine: Machine) -> list[str]:
    machine.validate()
    return [machine.worker_state(worker).value for worker in range(machine.limits.workers)]


# ---- who goes, and when ----


def test_who_has_nothing_to_do_is_asked_to_leave_once() -> None:
    machine = full(2)
    assert machine.next_wake() == REST_S, "it wants to be called, and not before"
    assert machine.handle(events.Tick(), REST_S - 0.1) == []
    assert machine.handle(events.Tick(), REST_S) == [Retire(0, 0, rests=True), Retire(1, 0, rests=True)]
    assert machine.handle(events.Tick(), REST_S + 1) == []
    assert states(machine) == ["ready", "ready"], "they are there until they have left"


def test_it_rests_without_a_restart_a_death_or_an_incident() -> None:
    machine = full(2)
    machine.handle(events.Tick(), REST_S)
    assert machine.handle(events.Exited(0, 0, Cause.SPENT), 21.0) == [], "no Mourn, and nobody is started"
    assert machine.handle(events.Exited(1, 0, Cause.SPENT), 21.0) == [Rest(2, 2)]
    assert (states(machine), machine.restarts, machine.allowed) == (["resting"] * 2, 0, 2)
    assert machine.next_wake() is None, "nothing happens by itself"


def test_work_that_comes_in_time_keeps_it() -> None:
    machine = full(2)
    produced = take(machine, 0, REST_S - 1)
    assert produced == [events.Produce(0, 7 - 1, 0)]
    assert machine.handle(events.Tick(), REST_S) == [Retire(1, 0, rests=True)], "the other one goes"
    machine.handle(events.Finished(0, 0, 6, 0), REST_S)
    assert machine.next_wake() is not None
    assert machine.handle(events.Tick(), 2 * REST_S - 0.1) == []
    assert machine.handle(events.Tick(), 2 * REST_S) == [Retire(0, 0, rests=True)]


@pytest.mark.parametrize("others", [{"own_lanes": True}, {"rest_after_s": math.inf}], ids=["own-lanes", "switched-off"])
def test_who_never_rests(others: dict[str, object]) -> None:
    pool = Simulation(workers=3, train_s=100.0, **{"rest_after_s": 0.5, **others})
    pool.run(20)
    assert len(pool.taken) == 20
    assert not pool.all(Retire, Rest)


def test_nobody_rests_before_a_worker_was_measured() -> None:
    machine = Machine(limits(2, 1, rest_after_s=REST_S, begin_with=1))
    machine.handle(events.Tick(), 0.0)
    machine.handle(events.Ready(0, 0), 0.0)
    for ticket in range(4):
        machine.handle(events.Finished(0, 0, ticket, ticket), 0.0)
    assert machine.handle(events.Tick(), 10 * REST_S) == []
    assert machine.handle(events.Budget(2), 10 * REST_S) == [Resize(2, 1, Why.MEMORY), Start(1, 0)]
    assert machine.handle(events.Tick(), 10 * REST_S) == [Retire(0, 0, rests=True)]


# ---- who comes back, and when ----


def test_a_slot_that_gets_free_starts_one() -> None:
    machine = asleep()
    assert take(machine, 0, 30.0) == [Start(0, 1)]
    assert states(machine) == ["starting", "resting", "resting"]
    assert machine.restarts == 0
    assert machine.handle(events.Ready(0, 1), 30.1) == [events.Produce(0, 7, 0)]
    assert machine.handle(events.Finished(0, 1, 7, 0), 30.2) == [events.Deliver(7, 0, False)]


def test_only_as_many_as_there_is_work_for() -> None:
    """Batches were quick, so that each takes two tickets."""
    machine = asleep(6)
    assert [take(machine, ticket, 30.0) for ticket in range(5)] == [[Start(0, 1)], [], [Start(1, 1)], [], [Start(2, 1)]]


def test_those_that_run_come_first() -> None:
    machine = full(3)
    machine.handle(events.Tick(), 10.0)
    given = [action.worker for number in range(6) for action in take(machine, number, 10.0)]
    assert given == [0, 1, 2, 0, 1, 2]
    assert machine.handle(events.Tick(), REST_S) == []


def test_one_that_is_leaving_gets_nothing_and_another_starts() -> None:
    machine = full(2)
    machine.handle(events.Tick(), REST_S)
    machine.handle(events.Exited(1, 0, Cause.SPENT), REST_S)
    assert take(machine, 0, REST_S) == [Start(1, 1)]
    assert machine.handle(events.Exited(0, 0, Cause.SPENT), REST_S) == [Rest(1, 2)]


def test_work_that_comes_while_the_last_one_leaves() -> None:
    machine = full(1)
    machine.handle(events.Tick(), REST_S)
    assert take(machine, 0, REST_S) == [], "one process per worker"
    assert machine.handle(events.Exited(0, 0, Cause.SPENT), REST_S) == [Start(0, 1)]


def test_a_lost_ticket_is_made_at_once_while_the_others_rest() -> None:
    machine = asleep()
    take(machine, 0, 30.0)
    machine.handle(events.Ready(0, 1), 30.0)
    lost = machine.handle(events.Exited(0, 1, Cause.OUTSIDE, ticket=7), 30.1)
    assert lost == [events.Mourn(0, 1, (7,), 0.0, cause=Cause.OUTSIDE), Start(0, 2)]
    assert states(machine) == ["starting", "resting", "resting"]
    mourn, start = machine.handle(events.Exited(0, 2, Cause.ITSELF), 30.2)
    assert mourn.restart_in_s == pytest.approx(0.1)
    assert start == Start(1, 1), "its back-off delays it, and not the ticket"
    assert machine.handle(events.Ready(1, 1), 30.25) == [events.Produce(1, 7, 0)]


def test_a_ticket_that_waits_for_its_time_wakes_somebody_then() -> None:
    machine = asleep(1)
    take(machine, 0, 30.0)
    machine.handle(events.Ready(0, 1), 30.0)
    failure = events.Failure("OSError", "brain_1", reading=True)
    (retry,) = machine.handle(events.Finished(0, 1, 5, 0, failure=failure), 30.0)
    assert retry == events.Retry(0, 1, 5, 0.5)
    machine._lanes[0].lose(5, 100.0)  # later than its rest
    machine.handle(events.Tick(), 50.0)
    assert machine.handle(events.Exited(0, 1, Cause.SPENT), 50.0) == []
    assert machine.next_wake() == 100.0
    assert machine.handle(events.Tick(), 100.0) == [Start(0, 2)]


def test_it_has_no_back_off_and_its_start_is_watched() -> None:
    machine = asleep(1)
    for _ in range(3):
        machine._workers[0].died(29.0, at_work=False, window_s=600.0)
    assert take(machine, 0, 30.0) == [Start(0, 1)]
    for now in range(35, 330, 5):
        assert machine.handle(events.Tick(), float(now)) == []
    assert machine.handle(events.Tick(), 330.0) == [events.Inspect(0, 1)]


# ---- beside everything else ----


@pytest.mark.parametrize("cause", [Cause.OUTSIDE, Cause.NURSERY, Cause.ITSELF])
def test_one_that_dies_while_it_is_leaving_is_a_death_as_any_other(cause: Cause) -> None:
    machine = full(2)
    machine.handle(events.Tick(), REST_S)
    death = machine.handle(events.Exited(0, 0, cause), REST_S)
    assert death == [events.Mourn(0, 0, (), 0.0, cause=cause), Start(0, 1)]
    assert machine.restarts == 1


def test_one_that_does_not_leave_is_hung() -> None:
    machine = full(1)
    machine.handle(events.Tick(), REST_S)
    now, actions = REST_S, []
    while not actions:
        now += 5.0
        actions = machine.handle(events.Tick(), now)
    assert (actions, now) == ([events.Inspect(0, 0)], REST_S + 120.0)
    (condemn,) = machine.handle(events.Seen(0, 0, 0.0), now)
    assert condemn == events.Condemn(0, 0, 120.0, 120.0)
    assert machine.handle(events.Tick(), now + KILL_S) == [events.Abandon(0, 0)]
    mourn, start = machine.handle(events.Exited(0, 0, Cause.NURSERY, proven=False), now + KILL_S)
    assert isinstance(mourn, events.Mourn) and start == Start(0, 1)


def test_a_worker_that_has_grown_is_replaced_and_not_sent_to_rest() -> None:
    machine = full(2)
    assert machine.handle(events.Grown(0, 0), 5.0) == [Retire(0, 0)]
    assert machine.handle(events.Exited(0, 0, Cause.SPENT), 5.1) == [Start(0, 1)]
    assert machine.handle(events.Tick(), REST_S) == [Retire(1, 0, rests=True)]
    assert machine.handle(events.Grown(1, 0), REST_S) == [], "it leaves anyway"
    machine.handle(events.Exited(1, 0, Cause.SPENT), REST_S)
    assert states(machine) == ["starting", "resting"]


def test_an_oom_kill_is_about_those_that_ran() -> None:
    """Eight of twelve rest, and four are too many: three go on, not eleven."""
    machine = full(12)
    for number in range(4):
        take(machine, number, REST_S - 1)
        machine._patience.typical_s = 1.0  # one ticket each
    machine.handle(events.Tick(), REST_S)
    for worker in range(4, 12):
        machine.handle(events.Exited(worker, 0, Cause.SPENT), REST_S)
    assert machine.resting == 8
    ticket, _ = machine._workers[3].assigned[0]
    killed = machine.handle(events.Exited(3, 0, Cause.MEMORY, ticket=ticket), REST_S + 1)
    assert killed == [events.Mourn(3, 0, (ticket,), None, cause=Cause.MEMORY), Resize(3, 12, Why.MEMORY)]
    assert machine.running == 3, "the ticket waits for one of them"


def test_fewer_may_run_than_rest() -> None:
    machine = asleep(3)
    assert machine.handle(events.Budget(1), 25.0) == [Resize(1, 3, Why.MEMORY)]
    assert take(machine, 0, 30.0) == [Start(0, 1)]
    assert [take(machine, ticket, 30.0) for ticket in (1, 2, 3)] == [[], [], []]
    gone = machine.handle(events.Exited(0, 1, Cause.OUTSIDE), 30.1)
    assert gone == [events.Mourn(0, 1, (), None, cause=Cause.OUTSIDE), Start(1, 1)], "one that rests takes its place"


def test_growing_back_needs_nobody_while_enough_rest() -> None:
    machine = asleep(3)
    machine.handle(events.Budget(3), 25.0)
    take(machine, 0, 30.0)
    machine.handle(events.Ready(0, 1), 30.0)
    machine.handle(events.Exited(0, 1, Cause.MEMORY, ticket=7), 30.1)
    assert machine.allowed == 1
    machine.handle(events.Ready(1, 1), 30.2)
    machine.handle(events.Finished(1, 1, 7, machine._workers[1].assigned[0][1]), 30.3)
    assert machine.handle(events.Tick(), 630.2)[0] == Resize(2, 1, Why.QUIET)
    assert machine.running <= 1 and not machine._crew.up_next(machine.allowed)


def test_a_pool_that_ends_while_all_rest_is_gone_at_once() -> None:
    machine = asleep()
    assert not machine.stopped
    ended = machine.handle(events.Close(), 30.0)
    assert {type(action) for action in ended} == {events.DiscardSlot}
    assert machine.stopped and states(machine) == ["down"] * 3


def test_a_pool_that_ends_while_somebody_leaves() -> None:
    machine = full(2)
    machine.handle(events.Tick(), REST_S)
    machine.handle(events.Exited(0, 0, Cause.SPENT), REST_S)
    assert events.Stop(1, 0) in machine.handle(events.Close(), REST_S)
    assert not machine.stopped
    assert machine.handle(events.Exited(1, 0, Cause.SPENT), REST_S) == []
    assert machine.stopped and states(machine) == ["down"] * 2


def test_after_a_suspension_all_may_rest_and_all_may_come_back() -> None:
    """Nobody was called, so nobody knows whether they slept: a start costs little."""
    machine = full(2)
    assert len(machine.handle(events.Tick(), 30_000.0)) == 2
    for worker in range(2):
        machine.handle(events.Exited(worker, 0, Cause.SPENT), 30_000.0)
    assert take(machine, 0, 30_000.0) == [Start(0, 1)]


# ---- a training ----


def starts(pool: Simulation) -> Counter[int]:
    return Counter(action.worker for action in pool.all(Start))


def test_a_training_that_waits_for_its_gpu_keeps_as_many_as_it_needs() -> None:
    """Batches of 0.3 s, one taken each 0.1 s: three workers are busy all the time, and a fourth now and then."""
    pool = Simulation(workers=12, num_cached=3, batch_s=0.3, train_s=0.1, rest_after_s=REST_S)
    pool.run(20_000)
    assert [draw.ticket for draw in pool.taken] == list(range(20_000))
    assert 3 <= pool.machine.running <= 5
    assert sum(starts(pool).values()) <= 12 + 5, "they come and go once"
    assert pool.machine.restarts == 0
    (said,) = pool.all(Rest)
    assert said.resting >= 7


def test_a_training_that_waits_for_its_workers_keeps_them_all() -> None:
    pool = Simulation(workers=4, batch_s=1.0, train_s=0.01, rest_after_s=1.0)
    pool.run(2000)
    assert not pool.all(Retire)
    assert starts(pool) == {0: 1, 1: 1, 2: 1, 3: 1}


def test_a_pool_that_is_needed_once_in_a_while() -> None:
    """A validation: fifty batches, then nothing for minutes."""
    pool = Simulation(workers=6, num_cached=3, batch_s=0.3, train_s=0.05, rest_after_s=REST_S)
    for epoch in range(1, 6):
        pool.run(50 * epoch)
        assert pool.machine.running == 6, "as fast as ever"
        pool._train_s, before = 0.05, len(pool.taken)
        pool._training_until = pool.now + 300.0
        pool._after(300.0, pool._train)
        pool.run(10_000, within_s=290.0)
        assert (pool.machine.running, len(pool.taken)) == (0, before)
    assert [draw.ticket for draw in pool.taken] == list(range(250))


@pytest.mark.parametrize("seed", range(5))
def test_whoever_rests_and_whoever_is_killed_every_batch_comes(seed: int) -> None:
    """A consumer that takes now and then, and workers that are killed in all states."""
    chance = random.Random(seed)

    def weather(draw: Draw) -> Cause | None:
        pool._batch_s = chance.choice([0.01, 0.05, 1.0])
        return chance.choice([Cause.OUTSIDE, Cause.MEMORY]) if chance.random() < 0.05 else None

    policy = Policy(OnBadCase.RETRY)  # nobody is to blame
    pool = Simulation(weather, workers=5, num_cached=1, rest_after_s=0.5, grow_back_s=5.0, policy=policy)
    while len(pool.taken) < 1000:
        assert not pool.ended
        pool._train_s = chance.choice([0.01, 0.3, 2.0, 8.0])
        pool.run(len(pool.taken) + 1, within_s=60.0)
        if pool._workers and chance.random() < 0.05:
            pool.kill(chance.choice(sorted(pool._workers)))
    assert [draw.ticket for draw in pool.taken] == list(range(1000))
    assert len(pool.all(Retire)) > 100, "it did happen"
