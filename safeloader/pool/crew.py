"""The workers' book: who is in which state, and who is started next. Pure; part of the machine.

    STARTING ──Ready──► READY ──Exited, asked to rest──► RESTING ──there is work for it──► STARTING (next incarnation)
        │                 └─────Exited────────┐
        └───────────────Exited────────────────┴────────► DOWN ─────its time comes────────► STARTING (next incarnation)

A worker that is down is to be started; one that rests may be, once there is work that those who run have no room for.
Both is done in the same order: the least troubled first, and of them the first. So does the machine give out its
tickets, and what little work there is keeps the same few workers busy: the others really have nothing to do.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum, auto


class WorkerState(str, Enum):
    """See the module's diagram."""

    STARTING = "starting"
    READY = "ready"
    DOWN = "down"
    RESTING = "resting"


class Leave(Enum):
    """Why a worker gets no more tickets, and is asked to leave as soon as it has none."""

    REPLACED = auto()
    """Its memory has grown: another one comes at once."""
    RESTS = auto()
    """It has nothing to do."""


@dataclass
class Worker:
    """What the machine knows of one worker; times are on the machine's clock."""

    index: int
    state: WorkerState = WorkerState.DOWN
    incarnation: int = -1
    restart_at: float = 0.0
    spent: bool = False  # it left by agreement: the next life is no restart
    assigned: deque[tuple[int, int]] = field(default_factory=deque)  # (ticket, slot), oldest first
    deaths: deque[tuple[float, bool]] = field(default_factory=deque)  # since its last batch: when, and was it at work
    fresh: bool = True  # no batch in this life yet
    began: float = 0.0  # what it does now
    since: float = 0.0  # its last sign of progress
    condemned_at: float | None = None
    leaves: Leave | None = None
    asked: bool = False  # to leave

    @property
    def watched(self) -> bool:
        """Whether progress is expected of it."""
        return self.condemned_at is None and (bool(self.assigned) or self.state is WorkerState.STARTING or self.asked)

    @property
    def idle(self) -> bool:
        """Whether it waits for something to do."""
        return self.state is WorkerState.READY and not self.assigned and not self.asked and self.condemned_at is None

    @property
    def takes_tickets(self) -> bool:
        """Whether it takes another one, if it has room for it."""
        return self.state is WorkerState.READY and self.leaves is None and self.condemned_at is None

    def begins(self, now: float) -> None:
        """It begins with something."""
        self.began = self.since = now

    def died(self, now: float, *, at_work: bool, window_s: float) -> None:
        """It has died; deaths longer ago than the window are forgotten."""
        while self.deaths and self.deaths[0][0] < now - window_s:
            self.deaths.popleft()
        self.deaths.append((now, at_work))


class Crew:
    """The workers of one pool, counted by state, so that an event that concerns one of them costs no look at all.

    Attributes:
        workers: by index. down, resting, starting: how many are.
    """

    def __init__(self, workers: int) -> None:
        self.workers = [Worker(index) for index in range(workers)]
        self.down = workers
        self.resting = 0
        self.starting = 0

    @property
    def running(self) -> int:
        """How many have a process, or are about to."""
        return len(self.workers) - self.down - self.resting

    def enter(self, worker: Worker, state: WorkerState) -> None:
        """The worker is in this state from now on."""
        self._count(worker.state, -1)
        self._count(state, 1)
        worker.state = state

    def _count(self, state: WorkerState, by: int) -> None:
        if state is WorkerState.DOWN:
            self.down += by
        elif state is WorkerState.RESTING:
            self.resting += by
        elif state is WorkerState.STARTING:
            self.starting += by

    def up_next(self, allowed: int) -> list[Worker]:
        """Who is started when its time comes: as many as are missing. Those that rest are not missing."""
        if not self.down:
            return []
        return self._first(WorkerState.DOWN, allowed - self.running - self.resting)

    def called_back(self, workers: int, allowed: int) -> list[Worker]:
        """Who rests no longer, if so many are needed."""
        return self._first(WorkerState.RESTING, min(workers, allowed - self.running))

    def _first(self, state: WorkerState, count: int) -> list[Worker]:
        there = [worker for worker in self.workers if worker.state is state]
        return sorted(there, key=lambda worker: len(worker.deaths))[: max(0, count)]

    def validate(self) -> None:
        """Check that the counts are right, and that who has no process has nothing else either."""
        states = [worker.state for worker in self.workers]
        counted = tuple(states.count(s) for s in (WorkerState.DOWN, WorkerState.RESTING, WorkerState.STARTING))
        assert counted == (self.down, self.resting, self.starting), "each is counted once"
        for worker in self.workers:
            assert not worker.assigned or worker.state is WorkerState.READY
            if worker.state in (WorkerState.DOWN, WorkerState.RESTING):
                assert (worker.leaves, worker.asked, worker.condemned_at) == (None, False, None)
            assert not worker.asked or (worker.leaves is not None and not worker.assigned), "who leaves holds nothing"
            assert worker.state is not WorkerState.RESTING or worker.spent, "it has left by agreement"
