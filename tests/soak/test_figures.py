"""The figures that the README quotes: how soon a hang ends, that slow is not hung, that an incident names its cause.

    pytest -m soak tests/soak/test_figures.py -s

Each prints one line that begins with `figure:`. The time limits hold on a machine that does nothing else.
"""

from __future__ import annotations

import faulthandler
import functools
import math
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safeloader import SafeAugmenter, note_case
from safeloader.faults.incident import Incident
from safeloader.pool import events, patience
from safeloader.pool.machine import Limits, Machine
from safeloader.pool.pool import Pool
from safeloader.pool.seeding import seed_everything
from safeloader.testing import Orders, wait_until
from tests import loaders
from tests.loaders import RandomLoader

pytestmark = [pytest.mark.soak, pytest.mark.usefixtures("warm_nursery")]

EACH = int(os.environ.get("SAFELOADER_FIGURES_EACH", "50"))
BATCHES = int(os.environ.get("SAFELOADER_FIGURES_BATCHES", "100000"))
SEED = 5
DEADLINE_S = 0.5
WITHIN_S = 0.1
OPTIONS: dict[str, Any] = {"seed": SEED, "on_bad_case": "retry", "hang_timeout_s": DEADLINE_S}


class Obedient(RandomLoader):
    """Notes a case that follows from the ticket, and does what it is ordered."""

    def __init__(self, orders: Orders) -> None:
        super().__init__()
        self.orders = orders
        self.made = 0

    def __next__(self) -> dict[str, Any]:
        note_case(_draw_case())
        self.made += 1
        if self.made > 2:  # before, a worker has the patience for a start
            self.orders.obey("loading")
        return super().__next__()


def _note_and_do(struck: Path, deed: Callable[[], object]) -> None:
    struck.write_text(str(time.monotonic()))
    deed()


def _draw_case() -> str:
    return f"case_{np.random.randint(100):03d}"


def _case_of(ticket: int) -> str:
    seed_everything(SEED, 0, ticket)
    return _draw_case()


def _load() -> str:
    return f"load average {os.getloadavg()[0]:.2f} on {os.cpu_count()} CPUs"


def _one_after_another(augmenter: SafeAugmenter, orders: Orders, deed: str) -> Iterator[Incident]:
    """Order the deed, wait for its incident and the replacement; `EACH` times."""

    def happened() -> int:
        return sum(augmenter.report().incident_counts.values())

    next(augmenter)
    for number in range(EACH):
        wait_until(lambda: all(worker.state == "ready" for worker in augmenter.workers()))
        orders.give(deed, "loading")
        while happened() == number:
            next(augmenter)
        yield augmenter.report().incidents[-1]


# ---- how fast a hang is found ----


@dataclass(frozen=True)
class Hang:
    deed: Callable[[], object]
    function: str


HANGS = {
    "stopped": Hang(functools.partial(loaders.send_self, int(signal.SIGSTOP)), "send_self"),
    "sleeping": Hang(loaders.sleep_for_ever, "sleep_for_ever"),
    "spinning": Hang(loaders.spin_for_ever, "spin_for_ever"),
    "deadlocked": Hang(loaders.lock_twice, "lock_twice"),
}


@pytest.mark.parametrize("name", HANGS)
def test_a_hang_is_replaced_within_the_deadline_and_a_tenth_of_a_second(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the deed, a moment after the last progress, to the request to fork the replacement."""
    hang = HANGS[name]
    started: dict[tuple[int, int], float] = {}
    start = Pool._start

    def note_start(self: Pool, worker: int, incarnation: int) -> None:
        started[worker, incarnation] = time.monotonic()
        start(self, worker, incarnation)

    monkeypatch.setattr(Pool, "_start", note_start)
    struck = tmp_path / "struck"
    orders = Orders(tmp_path / "orders", {name: functools.partial(_note_and_do, struck, hang.deed)})
    took = []
    with SafeAugmenter(Obedient(orders), None, 2, 2, **OPTIONS) as augmenter:
        for incident in _one_after_another(augmenter, orders, name):
            assert incident.kind == "worker-hang"
            assert incident.stacks is not None and f"in {hang.function}" in incident.stacks, incident.stacks
            assert incident.worker is not None
            replacement = incident.worker, incident.incarnation + 1
            wait_until(lambda: replacement in started)  # noqa: B023 - used at once
            took.append(started[replacement] - float(struck.read_text()) - DEADLINE_S)
        report = augmenter.report()
    assert report.incident_counts == {"worker-hang": EACH}, "nobody else was replaced"
    in_time = sum(seconds <= WITHIN_S for seconds in took)
    ordered = sorted(1000 * seconds for seconds in took)
    print(
        f"\nfigure: {name}: {in_time} of {EACH} replaced within the deadline + 100 ms, each with its stack; "
        f"beyond the deadline: median {statistics.median(ordered):.0f} ms, 90th percentile "
        f"{ordered[int(0.9 * EACH)]:.0f} ms, longest {ordered[-1]:.0f} ms; {_load()}"
    )
    assert in_time == EACH, ordered
    assert ordered[0] >= 0, "before the deadline nobody is replaced"


# ---- slow is not hung ----


def _seconds(uniform: Callable[[float, float], float]) -> float:
    """Log-uniform from 0.1 to 10 ms."""
    return math.exp(uniform(math.log(1e-4), math.log(1e-2)))


class Uneven(RandomLoader):
    def __next__(self) -> dict[str, Any]:
        time.sleep(_seconds(np.random.uniform))
        return super().__next__()


def test_no_false_kill_in_batches_whose_time_varies_a_hundredfold(monkeypatch: pytest.MonkeyPatch) -> None:
    """The adaptive deadline, but at least half a second instead of two minutes: otherwise it would show nothing."""
    monkeypatch.setattr(patience, "_LEAST_S", DEADLINE_S)
    faulthandler.cancel_dump_traceback_later()  # pytest's limit for a test: this takes minutes
    started = time.monotonic()
    with SafeAugmenter(Uneven((1, 1, 2, 2, 2)), None, 2, 4, seed=SEED) as augmenter:
        for _ in range(BATCHES):
            next(augmenter)
        report = augmenter.report()
    print(
        f"\nfigure: {len(report.incidents)} false kills in {BATCHES} batches of 0.1 to 10 ms with an adaptive "
        f"deadline of at least {DEADLINE_S} s, in {time.monotonic() - started:.0f} s; {_load()}"
    )
    assert (report.incidents, report.restarts) == ((), 0)


def test_no_false_kill_by_the_adaptive_deadline_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the machine, on a simulated clock, with no least deadline at all: twenty times the 99th percentile is enough.

    One worker with one ticket after another; the watchdog is asked whenever it wants to be.
    """
    monkeypatch.setattr(patience, "_LEAST_S", 0.0)
    limits = Limits(1, 1, 5, 600.0, 0.1, 5.0, hang=patience.HangLimits(first_s=1.0))
    machine, now, rng = Machine(limits), 0.0, np.random.RandomState(SEED)
    work: list[events.Produce] = []
    condemned = made = 0
    began = 0.0

    def feed(event: events.Event) -> None:
        nonlocal condemned, began
        for action in machine.handle(event, now):
            match action:
                case events.Start(worker, incarnation):
                    feed(events.Ready(worker, incarnation, None))
                case events.Produce():
                    work.append(action)
                    began = now if len(work) == 1 else began
                case events.Inspect(worker, incarnation):
                    feed(events.Seen(worker, incarnation, began))
                case events.Condemn():
                    condemned += 1

    feed(events.Tick())
    while made < BATCHES:
        ends = now + _seconds(rng.uniform)
        while (wake := machine.next_wake()) is not None and wake < ends:
            now = max(now, wake)
            feed(events.Tick())
        now = began = ends
        job = work.pop(0)
        feed(events.Finished(job.worker, 0, job.ticket, job.slot, ()))
        feed(events.Taken(job.ticket))
        feed(events.Released(job.slot))
        made += 1
        machine.validate()
    deadline_s = machine._patience.allowed_s(first=False)
    print(f"\nfigure: {condemned} false kills in {made} simulated batches; the adaptive deadline is {deadline_s:.3f} s")
    assert condemned == 0
    now += 1.1 * deadline_s
    feed(events.Tick())
    assert condemned == 1, "one that takes longer is condemned"


# ---- an incident names its cause ----


@dataclass(frozen=True)
class Fault:
    deed: Callable[[], object]
    signal: str | None = None
    exit_code: int | None = None
    kind: str = "worker-death"
    words: str = ""


FAULTS = {
    "SIGKILL": Fault(functools.partial(loaders.send_self, int(signal.SIGKILL)), "SIGKILL"),
    "SIGSEGV, a null read": Fault(loaders.read_null, "SIGSEGV"),
    "SIGBUS, a truncated mmap": Fault(loaders.read_truncated_mmap, "SIGBUS"),
    "SIGABRT, a double free": Fault(loaders.free_twice, "SIGABRT"),
    "os._exit": Fault(functools.partial(os._exit, 3), exit_code=3),
    "SIGSTOP": Fault(HANGS["stopped"].deed, kind="worker-hang", words="stopped by a signal (SIGSTOP)"),
    "a hang": Fault(loaders.sleep_for_ever, kind="worker-hang", words="in sleep_for_ever"),
}
GLIBC = "free(): double free detected"


@pytest.mark.parametrize("name", FAULTS)
def test_each_incident_names_its_cause(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fault, struck = FAULTS[name], tmp_path / "struck"
    orders = Orders(tmp_path / "orders", {name: functools.partial(_note_and_do, struck, fault.deed)})
    incidents, took = [], []
    with SafeAugmenter(Obedient(orders), None, 2, 2, **OPTIONS) as augmenter:
        for incident in _one_after_another(augmenter, orders, name):
            incidents.append(incident)
            assert incident.ticket is not None
            while augmenter.report().next_ticket <= incident.ticket:
                next(augmenter)
            took.append(1000 * (time.monotonic() - float(struck.read_text())))
        report = augmenter.report()
    assert report.incident_counts.pop(fault.kind) == EACH
    assert not report.incident_counts, "nothing else has happened"
    for incident in incidents:
        assert (incident.kind, incident.stage) == (fault.kind, "loading")
        if fault.kind == "worker-death":
            assert (incident.signal, incident.exit_code) == (fault.signal, fault.exit_code)
            assert (fault.signal or f"exited with code {fault.exit_code}") in incident.message
        assert incident.ticket is not None
        assert incident.case == _case_of(incident.ticket)
        for word in (f"ticket {incident.ticket}", f"case {incident.case}", fault.words):
            assert word in incident.message
    if fault.deed is loaders.free_twice:
        assert all(GLIBC in (incident.stderr_tail or "") for incident in incidents)
        # The relay drains a worker's stderr before its incident is made, and its own thread writes it out.
        told = ""

        def all_told() -> bool:
            nonlocal told
            told += capfd.readouterr().err
            return told.count(GLIBC) >= EACH

        wait_until(all_told, what="glibc's words on the trainer's stderr")
    with capfd.disabled():
        print(
            f"\nfigure: {name}: {EACH} of {EACH} incidents name {_named(fault)}, ticket, stage and case; "
            f"its batch came after {statistics.median(took):.0f} ms (median), {max(took):.0f} ms at most; {_load()}"
        )


def _named(fault: Fault) -> str:
    return fault.signal or (f"exit code {fault.exit_code}" if fault.exit_code is not None else f"“{fault.words}”")
