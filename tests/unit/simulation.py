"""A pool without processes: a machine, a clock, workers and a training loop that take their time.

The workers do what they are told and what `fault` says; everything else is the machine's decision. A test describes
the weather and looks at what became of the stream.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from safeloader.pool import events
from safeloader.pool.blame import Policy
from safeloader.pool.events import Cause, Failure
from safeloader.pool.machine import Limits, Machine
from safeloader.pool.patience import HangLimits

HANG: Final = Cause.HUNG
"""What a fault returns for a worker that gets stuck."""
START_S: Final = 0.02
KILL_S: Final = 0.01


def limits(workers: int = 2, num_cached: int = 2, **others: Any) -> Limits:
    """As `open_pool` makes them by default."""
    defaults: dict[str, Any] = {
        "max_restarts": 5 + 2 * workers,
        "window_s": 600.0,
        "backoff_first_s": 0.1,
        "backoff_max_s": 5.0,
        "hang": HangLimits(),
        "policy": Policy(),
    }
    return Limits(workers, num_cached, **{**defaults, **others})


@dataclass(frozen=True)
class Draw:
    """What a worker is about to make."""

    ticket: int
    attempt: int
    cases: tuple[str, ...]
    worker: int
    now: float


Fault = Callable[[Draw], Failure | Cause | None]


@dataclass
class _Worker:
    incarnation: int
    since: float
    ready: bool = False
    queue: deque[tuple[int, int, int]] = field(default_factory=deque)  # (ticket, slot, attempt)
    in_hand: Draw | None = None


class Simulation:
    """See the module.

    Attributes:
        log: what the machine has decided, with the time.
        taken: the draws that the training loop got, in order.
        raised: the failure that it got instead, or None.
        ended: whether the stream has.
    """

    def __init__(
        self,
        fault: Fault = lambda draw: None,
        *,
        cases: int = 100,
        batch: int = 1,
        batch_s: float = 0.3,
        train_s: float = 0.1,
        reports_cases: bool = True,
        seed: int = 0,
        **limits_: Any,
    ) -> None:
        self.limits = limits(**limits_)
        self.machine = Machine(self.limits)
        self.now = 0.0
        self.log: list[tuple[float, events.Action]] = []
        self.taken: list[Draw] = []
        self.raised: Failure | None = None
        self.ended = False
        self.cases = [f"brain_{number:03}" for number in range(cases)]
        self._fault = fault
        self._batch, self._batch_s, self._train_s, self._reports_cases = batch, batch_s, train_s, reports_cases
        self._seed = seed
        self._workers: dict[int, _Worker] = {}
        self._made: dict[int, tuple[int, Draw, Failure | None]] = {}
        self._made_last: tuple[Draw, Failure | None]
        self._lease: int | None = None
        self._training_until = 0.0
        self._order = itertools.count()
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._news: list[events.Taken | events.Released] = []
        self._feed(events.Tick())

    # ---- what tests ask ----

    def run(self, batches: int, within_s: float = 36_000.0) -> Simulation:
        """Train until so many batches were taken, the stream has ended, or the time is over."""
        until = self.now + within_s
        while len(self.taken) < batches and not self.ended:
            wake = self.machine.next_wake()
            times = [self._agenda[0][0]] if self._agenda else []
            times += [] if wake is None else [max(wake, self.now)]
            if not times or min(times) > until:
                self.now = until
                break
            self.now = min(times)
            while self._agenda and self._agenda[0][0] <= self.now:
                heapq.heappop(self._agenda)[2]()
            self._feed(events.Tick())
        return self

    def all(self, *kinds: type) -> list[Any]:
        """The machine's decisions of these kinds."""
        return [action for _, action in self.log if isinstance(action, kinds)]

    def at(self, kind: type) -> float:
        """When the first of a kind was made."""
        return next(now for now, action in self.log if isinstance(action, kind))

    # ---- the pool ----

    def _after(self, seconds: float, then: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (self.now + seconds, next(self._order), then))

    def _feed(self, event: events.Event) -> None:
        queue = deque([event])
        while queue:
            news, self._news = self._news, []
            for action in self.machine.handle(queue.popleft(), self.now, news):
                self.log.append((self.now, action))
                queue.extend(self._carry_out(action))
            self.machine.validate()

    def _carry_out(self, action: events.Action) -> list[events.Event]:
        match action:
            case events.Start(worker, incarnation):
                self._workers[worker] = _Worker(incarnation, self.now)
                self._after(START_S, lambda: self._on_started(worker, incarnation))
            case events.Stop(worker, incarnation) | events.Condemn(worker, incarnation):
                self._after(KILL_S, lambda: self._exit(worker, incarnation, Cause.OUTSIDE))
            case events.Inspect(worker, incarnation):
                return [events.Seen(worker, incarnation, self._workers[worker].since)]
            case events.Retire(worker, incarnation):
                self._after(KILL_S, lambda: self._exit(worker, incarnation, Cause.SPENT))
            case events.Produce(worker, ticket, slot, attempt):
                self._workers[worker].queue.append((ticket, slot, attempt))
                self._work(worker)
            case events.GiveUp():
                self.ended = True
            case events.Deliver(ticket, slot):
                self._made[ticket] = (slot, *self._made_last)
                self._after(0.0, self._train)
        return []

    def _current(self, worker: int, incarnation: int) -> _Worker | None:
        life = self._workers.get(worker)
        return life if life is not None and life.incarnation == incarnation else None

    def _on_started(self, worker: int, incarnation: int) -> None:
        life = self._current(worker, incarnation)
        if life is not None:
            life.ready, life.since = True, self.now
            self._feed(events.Ready(worker, incarnation, len(self.cases)))

    def _exit(self, worker: int, incarnation: int, cause: Cause) -> None:
        life = self._current(worker, incarnation)
        if life is not None:
            del self._workers[worker]
            ticket = None if life.in_hand is None else life.in_hand.ticket
            case = life.in_hand.cases[0] if life.in_hand is not None and len(life.in_hand.cases) == 1 else None
            self._feed(events.Exited(worker, incarnation, cause, ticket=ticket, case=case))

    def kill(self, worker: int) -> None:
        """Kill it from outside, now."""
        self._exit(worker, self._workers[worker].incarnation, Cause.OUTSIDE)

    def _work(self, worker: int) -> None:
        life = self._workers[worker]
        if life.in_hand is None and life.queue:
            ticket, slot, attempt = life.queue[0]
            life.in_hand, life.since = self._draw(ticket, attempt, worker), self.now
            fault = self._fault(life.in_hand)
            if fault is not HANG:
                self._after(self._batch_s, lambda: self._on_done(worker, life, slot, fault))

    def _draw(self, ticket: int, attempt: int, worker: int) -> Draw:
        """The first draw from `attempt` on that holds no quarantined case, as a worker does it."""
        while True:
            chance = random.Random(f"{self._seed}.{ticket}.{attempt}")
            cases = tuple(chance.choices(self.cases, k=self._batch))
            if not set(cases) & self.machine.blame.quarantined.keys():
                return Draw(ticket, attempt, cases, worker, self.now)
            attempt += 1

    def _on_done(self, worker: int, life: _Worker, slot: int, fault: Failure | Cause | None) -> None:
        if self._workers.get(worker) is not life:
            return
        assert life.in_hand is not None
        draw = life.in_hand
        if isinstance(fault, Cause):
            self._exit(worker, life.incarnation, fault)
            return
        life.queue.popleft()
        life.in_hand, life.since = None, self.now
        if fault is not None and fault.case == "?":
            fault = dataclasses.replace(fault, case=draw.cases[0])
        self._made_last = (draw, fault)
        cases = draw.cases if self._reports_cases else ()
        self._feed(events.Finished(worker, life.incarnation, draw.ticket, slot, cases if fault is None else (), fault))
        self._work(worker)

    # ---- the training loop ----

    def _train(self) -> None:
        ticket = len(self.taken)
        if self.now < self._training_until or ticket not in self._made or self.ended:
            return
        slot, draw, failure = self._made.pop(ticket)
        released, self._lease = self._lease, slot
        self.taken.append(draw)
        self._training_until = self.now + self._train_s
        self._news.append(events.Taken(ticket))
        if released is not None:
            self._news.append(events.Released(released))
        if self.machine.wants_slots:
            self._feed(events.Tick())
        if failure is not None:
            self.taken.pop()
            self.raised, self.ended = failure, True
            self._feed(events.Close(failed=True))
        self._after(self._train_s, self._train)


def unreadable(*, broken: bool = False) -> Failure:
    """An exception from reading the case in hand."""
    return Failure("OSError at dataset.py:71 in load_case", "?", reading=True, broken=broken)


def bug(place: str = "ValueError at user.py:9 in transform") -> Failure:
    """An exception in the user's code, with the case in hand."""
    return Failure(place, "?")


def bad(cases: Sequence[str], fault: Failure | Cause) -> Fault:
    """These cases always fail in this way."""
    return lambda draw: fault if set(cases) & set(draw.cases) else None
