"""Which ticket is given to whom: two ahead or one, one lane for all or one for each."""

from __future__ import annotations

import pytest

from safeloader.pool import events
from safeloader.pool.events import Cause, Failure
from safeloader.pool.machine import DEATHS_IN_A_ROW, QUICK_S, Machine
from tests.unit.simulation import limits


def running(workers: int, **others: object) -> tuple[Machine, list[events.Produce]]:
    """All workers are ready; also what they were given."""
    machine = Machine(limits(workers, **others))
    machine.handle(events.Tick(), 0.0)
    return machine, [p for w in range(workers) for p in produced(machine.handle(events.Ready(w, 0), 0.0))]


def produced(actions: list[events.Action]) -> list[events.Produce]:
    return [action for action in actions if isinstance(action, events.Produce)]


@pytest.mark.parametrize(("batch_s", "ahead"), [(QUICK_S / 2, 2), (QUICK_S * 2, 1)])
def test_of_slow_batches_a_worker_holds_one(batch_s: float, ahead: int) -> None:
    machine, work = running(1, num_cached=20)
    held, now = list(work), 0.0
    for _ in range(20):
        now += batch_s
        job = held.pop(0)
        held += produced(machine.handle(events.Finished(0, 0, job.ticket, job.slot), now))
        machine.validate()
    assert len(held) == ahead


def test_in_lanes_of_their_own_each_worker_has_its_tickets_one_after_the_other() -> None:
    machine, work = running(3, own_lanes=True)
    assert [(job.worker, job.ticket) for job in work] == [(0, 0), (1, 1), (2, 2)]
    (job,) = produced(machine.handle(events.Finished(1, 0, 1, work[1].slot), 0.1))
    assert (job.worker, job.ticket) == (1, 4)


def test_in_a_lane_nothing_is_made_before_what_failed() -> None:
    machine, work = running(2, own_lanes=True)
    machine.handle(events.Finished(0, 0, 0, work[0].slot), 0.1)
    unreadable = Failure("OSError at dataset.py:71", "brain_001", reading=True)
    slot = next(iter(machine._workers[0].assigned))[1]
    assert produced(machine.handle(events.Finished(0, 0, 2, slot, failure=unreadable), 0.2)) == []
    (again,) = produced(machine.handle(events.Tick(), 0.71))
    assert (again.worker, again.ticket) == (0, 2)


def test_in_a_lane_the_replacement_goes_on_where_the_dead_was() -> None:
    machine, _ = running(2, own_lanes=True)
    actions = machine.handle(events.Exited(1, 0, Cause.OUTSIDE, ticket=1), 0.1)
    assert events.Start(1, 1) in actions and not produced(actions), "nobody else can make it"
    (again,) = produced(machine.handle(events.Ready(1, 1), 0.2))
    assert (again.worker, again.ticket) == (1, 1)


def test_a_full_lane_does_not_hold_up_another() -> None:
    machine, work = running(2, own_lanes=True, num_cached=1)
    job, made = work[0], 0
    while True:
        made += 1
        more = produced(machine.handle(events.Finished(0, 0, job.ticket, job.slot), made / 10))
        if not more:
            break
        (job,) = more
    assert made == 3
    assert len(produced(machine.handle(events.Finished(1, 0, 1, work[1].slot), 1.0))) == 1


def test_in_lanes_an_oom_kill_takes_no_worker_away() -> None:
    machine, _ = running(2, own_lanes=True)
    actions = machine.handle(events.Exited(0, 0, Cause.MEMORY, ticket=0), 0.1)
    assert machine.allowed == 2
    assert not any(isinstance(action, events.Resize) for action in actions)


def test_a_worker_that_is_killed_while_it_has_nothing_to_do_is_no_reason_to_go_on_without_it() -> None:
    """The ring is full and memory has no room for more, so it makes no batch in between."""
    machine, work = running(2, num_cached=1)
    machine.handle(events.Budget(2, reserve=0), 0.0)
    held = [job for job in work if job.worker == 0]
    for job in [job for job in work if job.worker == 1]:
        machine.handle(events.Finished(1, 0, job.ticket, job.slot), 0.1)
    assert held and not produced(machine.handle(events.Tick(), 0.2)), "the ring is full"
    for life in range(3 * DEATHS_IN_A_ROW):
        now = 10.0 * (life + 1)
        actions = machine.handle(events.Exited(1, life, Cause.OUTSIDE), now)
        assert not any(isinstance(action, events.Resize) for action in actions)
        machine.handle(events.Tick(), now + 6.0)
        machine.handle(events.Ready(1, life + 1), now + 6.1)
        for slot in [slot_id for slot_id, slot in machine._lanes[0].slots if slot.worker == 0][:1]:
            assert slot in [job.slot for job in held], "the other one is at work all the time"
    assert machine.allowed == 2
