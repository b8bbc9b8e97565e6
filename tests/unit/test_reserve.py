"""A ticket that takes long holds up those behind it: then there are more slots, if memory has room for them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from safeloader.faults import memory
from safeloader.faults.memory import MemoryBudget
from safeloader.pool import events, memory_watch
from safeloader.pool.events import Cause, Failure
from safeloader.pool.machine import QUICK_S, RESERVE, Machine
from safeloader.pool.memory_watch import Fit, Ring, fit
from tests.unit.simulation import limits

WORKERS, CACHED = 2, 1
USUAL, MOST = WORKERS + 2 * CACHED, RESERVE * WORKERS
GIB = 2**30


def held_up(reserve: int | None, batch_s: float = 2 * QUICK_S, **others: object) -> Machine:
    """Worker 0 is busy with ticket 0 for ever; worker 1 has made all that it may. None: memory was not measured yet."""
    machine = Machine(limits(WORKERS, CACHED, **others))
    machine.handle(events.Tick(), 0.0)
    machine.handle(events.Ready(0, 0), 0.0)
    if reserve is not None:
        machine.handle(events.Budget(WORKERS, reserve), 0.0)
    machine.handle(events.Ready(1, 0), 0.0)
    work_on(machine, 1, batch_s=batch_s)
    return machine


def work_on(machine: Machine, *workers: int, batch_s: float = 2 * QUICK_S) -> None:
    """These make what they have and get, in order, until there is nothing more."""
    while busy := [worker for number in workers if (worker := machine._workers[number]).assigned]:
        first = min(busy, key=lambda worker: worker.assigned[0])
        at = max(machine._last, first.began + batch_s)
        machine.handle(events.Finished(first.index, first.incarnation, *first.assigned[0]), at)
        machine.validate()


def take(machine: Machine) -> None:
    """The next batch, and let it go."""
    ticket, slot = min((slot.ticket, number) for number, slot in machine._lanes[0].slots if slot.ticket is not None)
    machine.handle(events.Taken(ticket), machine._last)
    machine.handle(events.Released(slot), machine._last)


def in_use(machine: Machine) -> int:
    return sum(number for state, number in machine.slots().items() if state.name != "FREE")


@pytest.mark.parametrize(("reserve", "more"), [(None, 0), (0, 0), (3, 3), (100, MOST)])
def test_what_is_held_up_gets_the_reserve_that_memory_allows(reserve: int | None, more: int) -> None:
    machine = held_up(reserve)
    assert in_use(machine) == USUAL + more


def test_quick_batches_have_none() -> None:
    assert in_use(held_up(MOST, batch_s=QUICK_S / 2)) == USUAL


def test_what_was_held_up_once_keeps_the_reserve() -> None:
    """The next ticket that takes long is met with more batches made ahead."""
    machine = held_up(MOST)
    work_on(machine, 0, 1)
    assert in_use(machine) == USUAL + MOST
    for _ in range(50):
        take(machine)
        assert in_use(machine) == USUAL + MOST, "a new ticket has it"
        work_on(machine, 0, 1)


def test_a_ring_that_nothing_holds_up_is_as_large_as_ever() -> None:
    """The consumer is slower than the workers, and the next batch is always there."""
    machine = Machine(limits(WORKERS, CACHED))
    machine.handle(events.Tick(), 0.0)
    for worker in range(WORKERS):
        machine.handle(events.Ready(worker, 0), 0.0)
    machine.handle(events.Budget(WORKERS, MOST), 0.0)
    for _ in range(50):
        work_on(machine, 0, 1)
        assert in_use(machine) == USUAL
        take(machine)


def test_a_release_that_comes_before_it_was_told_what_was_taken() -> None:
    machine = held_up(MOST)
    (ticket, slot), *_ = machine._workers[0].assigned
    machine.handle(events.Finished(0, 0, ticket, slot), 2.0)
    machine.handle(events.Released(slot), 3.0)
    assert machine._lanes[0].slots._to_take == 1
    machine.handle(events.Taken(ticket), 3.0)
    assert machine._lanes[0].slots._to_take == 1


def test_the_one_that_holds_up_dies_and_its_ticket_has_a_slot() -> None:
    machine = held_up(MOST)
    actions = machine.handle(events.Exited(0, 0, Cause.OUTSIDE, ticket=0), 2.0)
    machine.validate()
    (again,) = [action for action in actions if isinstance(action, events.Produce)]
    assert (again.worker, again.ticket) == (1, 0)


def test_while_a_ticket_that_failed_is_made_again_there_is_none() -> None:
    machine = held_up(0)
    unreadable = Failure("OSError at dataset.py:71", "brain_001", reading=True)
    (ticket, slot), *_ = machine._workers[0].assigned
    machine.handle(events.Finished(0, 0, ticket, slot, failure=unreadable), 2.0)
    machine.handle(events.Budget(WORKERS, MOST), 2.0)
    work_on(machine, 1)
    assert in_use(machine) == USUAL - 1, "its slot is kept for it"


def test_a_kill_from_outside_says_nothing_about_the_ticket() -> None:
    machine = held_up(MOST // 2)
    machine.handle(events.Budget(WORKERS, MOST), 1.0)
    machine.handle(events.Exited(0, 0, Cause.OUTSIDE, ticket=0), 2.0)
    assert machine._workers[1].assigned, "the lost one"
    work_on(machine, 1)
    assert in_use(machine) == USUAL + MOST


def test_an_oom_kill_closes_the_reserve() -> None:
    machine = held_up(2)
    machine.handle(events.Budget(WORKERS, 100), 1.0)
    machine.handle(events.Exited(1, 0, Cause.MEMORY), 2.0)
    before = in_use(machine)
    machine.handle(events.Ready(1, 1), 3.0)
    work_on(machine, 1)
    assert in_use(machine) == before


def test_lanes_of_their_own_have_none() -> None:
    machine = held_up(100, own_lanes=True)
    assert in_use(machine) == 1 + (1 + 2 * CACHED)


@pytest.mark.parametrize(
    ("left_gib", "expected"),
    [(100, Fit(4, 12, "")), (10.0, Fit(4, 5, "")), (6.0, Fit(4, 1, "")), (3.0, Fit(2, 0, ""))],
)
def test_it_takes_at_most_half_of_what_workers_and_ring_leave(
    left_gib: float, expected: Fit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of 1 GiB, slots of half a GiB, and a tenth that is left free for all."""
    smaps: Callable[[Path], str] = lambda path: "Private_Dirty: 1048576 kB\n"  # noqa: E731
    monkeypatch.setattr(memory_watch, "read", smaps)
    monkeypatch.setattr(memory, "worker_nbytes", lambda pid: GIB)
    monkeypatch.setattr(memory, "available", lambda: MemoryBudget(int((left_gib - 1) * GIB), "so it is"))
    fitting = fit(1, Ring(0, GIB // 2, GIB // 2), wanted=4, reserve=12)
    assert fitting is not None
    assert fitting[:2] == expected[:2]
