"""No more workers at work than keep the CPUs busy: others would take memory, and make each batch take longer."""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from pathlib import Path

import pytest

from safeloader.pool import events, stopwatch
from safeloader.pool.crowd import Crowd, Effort
from safeloader.pool.events import Cause, Produce, Rest, Start
from safeloader.pool.machine import Machine
from safeloader.pool.stopwatch import Stopwatch, cpus_of_this_process
from tests.loaders import compute
from tests.unit.simulation import limits

COMPUTES, WAITS = Effort(1.0, 1.0), Effort(0.1, 1.0)


def crowd(cpus: int, *efforts: Effort, quota: float = math.inf) -> Crowd:
    made = Crowd(quota)
    made.has((1 << cpus) - 1)
    for effort in efforts:
        made.took(effort)
    return made


# ---- how many are enough ----


def test_nothing_is_known_of_workers_that_cannot_measure() -> None:
    silent = Crowd(2.0)
    assert silent.enough == math.inf
    silent.has(0)
    assert silent.enough == math.inf


@pytest.mark.parametrize("cpus", [1, 2, 8, 64])
def test_where_workers_compute_it_is_one_more_than_cpus(cpus: int) -> None:
    assert crowd(cpus).enough == cpus + 1, "before the first batch as well"
    assert crowd(cpus, *[COMPUTES] * 30).enough == cpus + 1


def test_where_they_wait_it_takes_many() -> None:
    assert crowd(2, WAITS).enough > 20 + 10, "twenty on average, and more to be sure"
    assert crowd(2, Effort(0.5, 1.0)).enough == 9
    assert crowd(2, Effort(0.99, 1.0)).enough == 3
    assert crowd(2, Effort(0.0, 1.0)).enough > 1000


def test_more_threads_than_one_are_no_reason_to_have_fewer_workers() -> None:
    assert crowd(2, Effort(8.0, 1.0)).enough == 3


def test_it_follows_when_the_work_changes() -> None:
    changed = crowd(2, *[COMPUTES] * 1000, *[WAITS] * 20)
    assert changed.enough > 8
    for _ in range(40):
        changed.took(COMPUTES)
    assert changed.enough <= 4


def test_the_quota_counts_if_it_is_less() -> None:
    assert crowd(64, quota=4.0).enough == 5
    assert crowd(64, quota=1.5).enough == 2
    assert crowd(2, quota=16.0).enough == 3


def test_workers_that_are_pinned_to_one_cpu_each() -> None:
    pinned = Crowd(math.inf)
    for worker in range(12):
        pinned.has(1 << worker)
    assert pinned.enough == 13


# ---- in the machine ----


def ready(workers: int, cpus: int = 0b11, **others: object) -> tuple[Machine, list[events.Action]]:
    """All of them are, in order; what that led to."""
    machine = Machine(limits(workers, 6, **others))
    machine.handle(events.Tick(), 0.0)
    actions = [
        action for worker in range(workers) for action in machine.handle(events.Ready(worker, 0, None, cpus), 0.0)
    ]
    machine.validate()
    return machine, actions


def finish(machine: Machine, worker: int, now: float, effort: Effort | None = COMPUTES) -> list[events.Action]:
    made = machine._workers[worker]
    actions = machine.handle(events.Finished(worker, made.incarnation, *made.assigned[0], effort=effort), now)
    machine.validate()
    return actions


def train(machine: Machine, until: float) -> None:
    """A consumer that takes whatever is made, and workers that take 0.2 s, up to and with this time."""
    for step in range(1, round(until / 0.2) + 1):
        now = 0.2 * step
        for worker in at_work(machine):
            finish(machine, worker, now)
        for slot_id, slot in machine._lanes[0].slots:
            if slot.ticket is not None and slot.worker is None:
                machine.handle(events.Taken(slot.ticket), now)
                machine.handle(events.Released(slot_id), now)


def at_work(machine: Machine) -> list[int]:
    return [worker.index for worker in machine._workers if worker.assigned]


def test_as_many_begin_as_there_are_cpus_and_one_more() -> None:
    machine, actions = ready(12)
    assert at_work(machine) == [0, 1, 2]
    tickets = [action.ticket for action in actions if isinstance(action, Produce)]
    assert tickets == list(range(6)), "and they have their next tickets"
    for now in range(1, 6):
        finish(machine, 0, now / 10)
        assert at_work(machine) == [0, 1, 2]


@pytest.mark.parametrize(("cpus", "own_lanes"), [(0, False), (0b11, True)], ids=["cannot-measure", "own-lanes"])
def test_all_begin(cpus: int, own_lanes: bool) -> None:
    machine, _ = ready(12, cpus, own_lanes=own_lanes)
    assert at_work(machine) == list(range(12))


def test_all_begin_once_it_is_known_that_they_wait() -> None:
    machine, _ = ready(12)
    finish(machine, 0, 3.0, WAITS)
    assert at_work(machine) == list(range(12))


def test_one_that_is_stuck_makes_room_for_another() -> None:
    """It waits for storage, or hangs: either way it keeps no CPU busy."""
    machine, _ = ready(12)
    assert machine.next_wake() == 5.0, "a heartbeat"
    machine.handle(events.Tick(), 4.9)
    assert at_work(machine) == [0, 1, 2]
    machine.handle(events.Tick(), 5.0)
    machine.validate()
    assert at_work(machine) == [0, 1, 2, 3, 4, 5]
    assert machine.next_wake() == 10.0


def test_what_is_long_depends_on_what_is_usual() -> None:
    machine, _ = ready(12)
    finish(machine, 0, 4.0)
    for now in (12.0, 19.9):
        machine.handle(events.Tick(), now)
        assert at_work(machine) == [0, 1, 2]
    machine.handle(events.Tick(), 20.0)
    assert at_work(machine) == [0, 1, 2, 3, 4], "five times as long"


def test_a_lost_ticket_is_made_by_anybody() -> None:
    machine, _ = ready(12)
    actions = machine.handle(events.Exited(1, 0, Cause.OUTSIDE, ticket=2), 1.0)
    again = [(action.worker, action.ticket) for action in actions if isinstance(action, Produce)]
    assert again[:2] == [(3, 2), (4, 3)]
    assert Start(1, 1) in actions
    machine.validate()
    machine.handle(events.Ready(1, 1, None, 0b11), 1.1)
    assert at_work(machine) == [0, 2, 3, 4], "and nobody else begins"


def test_those_beyond_that_rest_and_it_is_said_why() -> None:
    machine, _ = ready(12, rest_after_s=20.0)
    train(machine, until=21.0)
    retired = [action.worker for action in machine.handle(events.Tick(), 21.0) if isinstance(action, events.Retire)]
    assert retired == list(range(3, 12))
    said = [action for worker in retired for action in machine.handle(events.Exited(worker, 0, Cause.SPENT), 21.0)]
    assert said == [Rest(9, 12, at_work=3)]
    assert machine.resting == 9
    finish(machine, 0, 21.1, None)
    machine.handle(events.Exited(2, 0, Cause.OUTSIDE), 21.2)
    machine.validate()
    assert machine.resting == 9, "its own replacement is enough"
    for number in range(10):
        finish(machine, 0, 21.3 + number / 10, WAITS)
    assert machine.resting < 9, "they are needed after all"


def test_one_that_is_stuck_brings_back_one_that_rests() -> None:
    machine, _ = ready(4, rest_after_s=20.0)
    train(machine, until=20.0)
    machine.handle(events.Tick(), 20.0)
    machine.handle(events.Exited(3, 0, Cause.SPENT), 20.0)
    assert machine.resting == 1
    assert machine.next_wake() == 25.0
    assert Start(3, 1) in machine.handle(events.Tick(), 25.0)


# ---- what a worker measures ----


def test_the_share_of_one_that_computes_and_of_one_that_waits() -> None:
    watch = Stopwatch()
    if not watch.works:
        pytest.skip("this kernel has no /proc/self/schedstat")
    watch.start()
    compute(0.2)
    effort = watch.stop()
    assert effort is not None and effort.cpu_s >= 0.2 and effort.cpu_s / effort.alone_s > 0.6
    watch.start()
    time.sleep(0.2)
    effort = watch.stop()
    assert effort is not None and effort.alone_s > 0.15 and effort.cpu_s < 0.1


def test_a_kernel_that_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (None, "", "12345\n", "what?\n"):
        file = tmp_path / "schedstat"
        if text is not None:
            file.write_text(text)
        monkeypatch.setattr(stopwatch, "_SCHEDSTAT", str(file))
        watch = Stopwatch()
        watch.start()
        assert (watch.works, watch.stop()) == (False, None)


def test_the_cpus_are_those_of_the_affinity() -> None:
    assert {cpu for cpu in range(4096) if cpus_of_this_process() >> cpu & 1} == os.sched_getaffinity(0)


def test_four_processes_on_one_cpu_each_want_all_of_it() -> None:
    """What the queue for a CPU takes is not counted as waiting for something else."""
    if not Stopwatch().works:
        pytest.skip("this kernel has no /proc/self/schedstat")
    readers = []
    for _ in range(4):
        read, write = os.pipe()
        if os.fork() == 0:
            os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
            watch = Stopwatch()
            watch.start()
            compute(0.2)
            effort = watch.stop()
            os.write(write, repr(tuple(effort or ())).encode())
            os._exit(0)
        os.close(write)
        readers.append(read)
    shares = Counter()
    for read in readers:
        cpu_s, alone_s = eval(os.read(read, 1000))
        os.close(read)
        shares[cpu_s / alone_s > 0.6] += 1
    for _ in range(4):
        os.wait()
    assert shares == {True: 4}
