"""How many workers run: the ladder down, the way back up, what memory allows, and workers that are recycled."""

from __future__ import annotations

import math

import pytest

from safeloader.pool import events
from safeloader.pool.events import Cause, GiveUp, Resize, SwitchMethod, Why
from safeloader.pool.machine import DEATHS_IN_A_ROW, Machine, WorkerState
from safeloader.pool.strength import Strength, StrengthLimits
from tests.unit.simulation import Draw, Simulation, limits


def strength(
    workers: int = 4, *, begin_with: int | None = None, max_restarts: int = 5, other_method: bool = True
) -> Strength:
    begin = workers if begin_with is None else begin_with
    return Strength(StrengthLimits(workers, begin, max_restarts, 600.0, 600.0, other_method))


def die(pool: Strength, times: int, now: float = 0.0, *, starting: bool = False) -> list[object]:
    """So many deaths, each followed by a look at the ladder; what came of it."""
    steps = []
    for _ in range(times):
        pool.died(now, starting=starting)
        steps.append(pool.step_down(now))
    return [step for step in steps if step is not None]


# ---- the ladder ----


def test_the_rungs_each_with_a_fresh_count() -> None:
    pool = strength()
    assert die(pool, 5) == []
    assert die(pool, 1) == [Resize(1, 4, Why.DEATHS)]
    assert die(pool, 5) == []
    assert die(pool, 1) == [SwitchMethod()]
    assert die(pool, 5) == []
    assert die(pool, 1) == [GiveUp(Why.DEATHS, 6)]


def test_one_worker_and_no_other_method_has_one_rung() -> None:
    assert die(strength(1, other_method=False), 6) == [GiveUp(Why.DEATHS, 6)]


def test_starts_that_fail_have_a_ladder_of_their_own() -> None:
    pool = strength(max_restarts=1000)
    assert die(pool, 4 + 2, starting=True) == []
    assert die(pool, 1, starting=True) == [Resize(1, 4, Why.STARTS)]
    assert die(pool, 3, starting=True) == []
    assert die(pool, 1, starting=True) == [SwitchMethod()]
    assert die(pool, 4, starting=True) == [GiveUp(Why.STARTS, 4)]


def test_somebody_who_gets_ready_shows_that_starting_works() -> None:
    pool = strength(max_restarts=1000)
    for _ in range(20):
        assert die(pool, 6, starting=True) == []
        pool.somebody_is_ready()


def test_a_batch_shows_that_it_works() -> None:
    pool = strength()
    for _ in range(100):
        assert die(pool, 5) == []
        pool.batch_was_made()


def test_deaths_far_apart_are_forgotten_but_not_for_ever() -> None:
    """Hangs take minutes each: a pool that never makes a batch must end all the same."""
    pool = strength(other_method=False)
    steps = [step for number in range(100) for step in die(pool, 1, now=300.0 * number)]
    assert steps[:2] == [Resize(1, 4, Why.DEATHS), GiveUp(Why.DEATHS, 11)]


# ---- one less, and back ----


def test_one_less_and_back_after_a_quiet_time() -> None:
    pool = strength()
    assert pool.one_less(Why.MEMORY, 100.0) == Resize(3, 4, Why.MEMORY)
    pool.batch_was_made()
    assert pool.grow_at == 700.0
    assert pool.grow(699.9) is None
    assert pool.grow(700.0) == Resize(4, 3, Why.QUIET)
    assert pool.grow_at == math.inf and pool.grow(10_000.0) is None


def test_it_waits_longer_each_time_that_growing_was_a_mistake() -> None:
    pool, now, waits = strength(), 0.0, []
    for _ in range(7):
        pool.one_less(Why.MEMORY, now)
        pool.batch_was_made()
        waits.append(pool.grow_at - now)
        now = pool.grow_at
        pool.grow(now)
    assert waits == [600.0, 1200.0, 2400.0, 4800.0, 9600.0, 9600.0, 9600.0]


def test_several_kills_at_once_are_one_mistake() -> None:
    pool = strength(12)
    for _ in range(5):
        pool.one_less(Why.MEMORY, 100.0)
    pool.batch_was_made()
    assert (pool.allowed, pool.grow_at) == (7, 700.0)


def test_it_grows_one_by_one() -> None:
    pool = strength()
    die(pool, 6)
    pool.batch_was_made()
    assert [pool.grow(600.0 * step) for step in (1, 2, 3)] == [
        Resize(2, 1, Why.QUIET),
        Resize(3, 2, Why.QUIET),
        Resize(4, 3, Why.QUIET),
    ]
    assert pool.grow(3000.0) is None


def test_it_does_not_grow_before_it_works() -> None:
    """Otherwise a pool in which everything dies slowly would go up and down the ladder for ever."""
    pool = strength()
    die(pool, 6)
    assert pool.grow(10_000.0) is None and pool.grow_at == math.inf
    pool.batch_was_made()
    assert pool.grow(10_000.0) == Resize(2, 1, Why.QUIET)


def test_one_worker_stays() -> None:
    assert strength(1).one_less(Why.MEMORY, 0.0) is None


# ---- memory ----


def test_one_is_measured_and_then_as_many_start_as_fit() -> None:
    pool = strength(begin_with=1)
    assert pool.allowed == 1
    assert pool.budget(3) == Resize(3, 1, Why.MEMORY)
    assert pool.budget(3) is None
    assert pool.budget(100) == Resize(4, 3, Why.MEMORY)
    assert pool.budget(0) == Resize(1, 4, Why.MEMORY)


def test_it_never_grows_beyond_the_budget() -> None:
    pool = strength(begin_with=1)
    pool.budget(3)
    pool.one_less(Why.MEMORY, 0.0)
    pool.batch_was_made()
    assert pool.grow(600.0) == Resize(3, 2, Why.QUIET)
    assert pool.grow(10_000.0) is None


def test_a_budget_after_an_oom_kill_does_not_undo_it() -> None:
    pool = strength()
    pool.one_less(Why.MEMORY, 0.0)
    assert pool.budget(4) is None
    assert pool.allowed == 3
    assert pool.budget(2) == Resize(2, 3, Why.MEMORY)
    pool.batch_was_made()
    assert pool.grow(600.0) is None, "two is what memory allows"


def test_a_budget_that_is_what_runs_already_leaves_nothing_to_grow_to() -> None:
    pool = strength()
    pool.one_less(Why.MEMORY, 0.0)
    assert pool.budget(3) is None
    pool.batch_was_made()
    assert pool.grow(600.0) is None and pool.grow_at == math.inf


# ---- in the machine ----


def running(workers: int = 3, **others: object) -> Machine:
    machine = Machine(limits(workers, 2, **others))
    machine.handle(events.Tick(), 0.0)
    for worker in range(workers):
        machine.handle(events.Ready(worker, 0), 0.0)
    return machine


def down(machine: Machine) -> list[int]:
    count = machine.limits.workers
    return [worker for worker in range(count) if machine.worker_state(worker) is WorkerState.DOWN]


def test_after_an_oom_kill_it_goes_on_with_one_less() -> None:
    machine = running()
    actions = machine.handle(events.Exited(1, 0, Cause.MEMORY, ticket=2, case="brain_1"), 1.0)
    assert actions[:2] == [
        events.Mourn(1, 0, (2, 3), None, cause=Cause.MEMORY),
        Resize(2, 3, Why.MEMORY),
    ]
    assert not any(isinstance(action, events.Start) for action in actions)
    machine.handle(events.Finished(0, 0, 0, 0), 2.0)
    assert machine.next_wake() is not None
    grown = machine.handle(events.Tick(), 601.0)
    assert grown[0] == Resize(3, 2, Why.QUIET)
    assert events.Start(1, 1) in grown


def test_it_is_called_in_time_to_grow_even_if_nobody_has_anything_to_do() -> None:
    machine = running(2)
    machine.handle(events.Exited(1, 0, Cause.MEMORY, ticket=2), 1.0)
    for ticket in (0, 1, *range(2, 6)):
        held = [slot for number, slot in machine._workers[0].assigned if number == ticket]
        machine.handle(events.Finished(0, 0, ticket, held[0]), 2.0)
    assert machine.next_wake() == 601.0


@pytest.mark.parametrize("workers", [1, 2])
def test_an_oom_kill_is_a_cases_fault_only_if_it_was_alone(workers: int) -> None:
    machine = running(workers)
    fates = []
    now = 1.0
    for incarnation in range(3):
        ticket, _ = machine._workers[0].assigned[0]
        fates += machine.handle(events.Exited(0, incarnation, Cause.MEMORY, ticket=ticket, case="brain_7"), now)
        now += 1.0
        machine.handle(events.Tick(), now)
        if machine.worker_state(0) is WorkerState.DOWN:
            break
        machine.handle(events.Ready(0, incarnation + 1), now)
    redrawn = [action.case for action in fates if isinstance(action, events.Redraw)]
    assert redrawn == (["brain_7"] * 2 if workers == 1 else [])


def test_deaths_beyond_those_that_may_run_are_no_evidence() -> None:
    """Twelve workers, one rung down: the eleven that are left over die as well, and that says nothing new."""
    machine = running(12, max_restarts=3, other_method=True)
    actions = []
    for worker in range(12):
        ticket, _ = machine._workers[worker].assigned[0]
        actions += machine.handle(events.Exited(worker, 0, Cause.ITSELF, ticket=ticket), 1.0)
        if worker == 3:
            machine.handle(events.Tick(), 1.0)
    assert [type(action) for action in actions if isinstance(action, Resize | SwitchMethod | GiveUp)] == [Resize]


def test_a_worker_that_never_starts_beside_others_that_work() -> None:
    machine = running()
    now, resizes, starts, ticket = 1.0, [], 0, 0
    for incarnation in range(20):
        for action in machine.handle(events.Exited(0, incarnation, Cause.ITSELF), now):
            resizes += [action] if isinstance(action, Resize) else []
        for other in (1, 2):  # the others go on
            ticket, slot = machine._workers[other].assigned[0]
            machine.handle(events.Finished(other, 0, ticket, slot), now)
            machine.handle(events.Taken(ticket), now)
            machine.handle(events.Released(slot), now)
        now += 5.0
        starts += events.Start(0, incarnation + 1) in machine.handle(events.Tick(), now)
        if resizes:
            break
    assert resizes == [Resize(2, 3, Why.STARTS)]
    assert down(machine) == [0]
    assert incarnation == DEATHS_IN_A_ROW - 1


def test_the_least_troubled_are_started_first() -> None:
    machine = running()
    machine.handle(events.Exited(0, 0, Cause.MEMORY), 1.0)
    assert machine.allowed == 2 and down(machine) == [0]
    machine.handle(events.Exited(2, 0, Cause.OUTSIDE), 2.0)
    assert down(machine) in ([0], [2])
    for incarnation in range(1, 5):
        machine.handle(events.Exited(1, incarnation - 1, Cause.ITSELF), 10.0 * incarnation)
        machine.handle(events.Tick(), 10.0 * incarnation + 5.0)
        if machine.incarnation(1) != incarnation:
            break
    assert down(machine) == [1], "it has died most often"


def test_a_pool_that_never_makes_a_batch_ends() -> None:
    """Whatever it is, and however slowly it kills."""
    for seconds in (0.05, 20.0, 200.0):
        pool = Simulation(lambda draw: Cause.ITSELF, workers=4, batch_s=seconds, other_method=True)
        pool.run(1, within_s=100_000.0)
        assert [type(action) for action in pool.all(Resize, SwitchMethod, GiveUp)] == [Resize, SwitchMethod, GiveUp]


def test_one_worker_whose_every_batch_hangs_ends_as_an_outage() -> None:
    pool = Simulation(lambda draw: Cause.HUNG, workers=1)
    pool.run(1, within_s=100_000.0)
    (end,) = pool.all(GiveUp)
    assert end.why in (Why.OUTAGE, Why.DEATHS)
    assert pool.now < 3 * 3600.0


def test_memory_that_suffices_for_two_of_four() -> None:
    """Three at once are too many; two go on, and now and then one more is tried."""

    def weather(draw: Draw) -> Cause | None:
        state = pool.machine.worker_state
        running = [worker for worker in range(4) if state(worker) is WorkerState.READY]
        return Cause.MEMORY if len(running) > 2 and draw.worker == running[-1] else None

    pool = Simulation(weather, workers=4)
    pool.run(20_000)
    assert [draw.ticket for draw in pool.taken] == list(range(20_000))
    assert not pool.all(GiveUp, events.Quarantine, events.Redraw)
    assert min(action.workers for action in pool.all(Resize)) == 2
    assert 2 < len(pool.all(Resize)) < 12


# ---- recycling ----


def test_a_worker_that_has_grown_finishes_what_it_has_leaves_and_is_started_at_once() -> None:
    machine = running(1)
    assert machine.handle(events.Grown(0, 0), 1.0) == []
    assert machine.handle(events.Finished(0, 0, 0, 0), 2.0) == [events.Deliver(0, 0, False)]
    assert machine.handle(events.Finished(0, 0, 1, 1), 3.0) == [events.Deliver(1, 1, False), events.Retire(0, 0)]
    assert machine.handle(events.Tick(), 3.5) == [], "it is asked once"
    assert machine.handle(events.Exited(0, 0, Cause.SPENT), 4.0) == [events.Start(0, 1)]
    assert machine.restarts == 0
    produced = machine.handle(events.Ready(0, 1), 4.1)
    assert [action.ticket for action in produced if isinstance(action, events.Produce)] == [2], "of slow batches one"


def test_one_that_is_idle_leaves_at_once() -> None:
    machine = running(1)
    for ticket in range(5):
        machine.handle(events.Finished(0, 0, ticket, ticket), 1.0)
    assert machine.handle(events.Grown(0, 0), 2.0) == [events.Retire(0, 0)]


def test_one_that_dies_before_it_could_leave_is_a_death_as_any_other() -> None:
    machine = running(1)
    machine.handle(events.Grown(0, 0), 1.0)
    death = machine.handle(events.Exited(0, 0, Cause.ITSELF, ticket=0), 2.0)
    assert death == [events.Mourn(0, 0, (0, 1), 0.0), events.Start(0, 1)]
    assert machine.restarts == 1
    again = machine.handle(events.Ready(0, 1), 2.1)
    assert [action.ticket for action in again if isinstance(action, events.Produce)] == [0, 1], "the new one stays"


def test_a_loader_that_cannot_go_on_after_an_exception() -> None:
    """A generator: the worker says what went wrong, and leaves."""
    machine = running(1)
    failed = machine.handle(events.Finished(0, 0, 0, 0, failure=events.Failure("OSError", "brain_1", True)), 1.0)
    assert failed[0] == events.Retry(0, 0, 0, 0.5)
    left = machine.handle(events.Exited(0, 0, Cause.SPENT, ticket=0, case="brain_1"), 1.0)
    assert left == [events.Start(0, 1)]
    assert machine.restarts == 0
