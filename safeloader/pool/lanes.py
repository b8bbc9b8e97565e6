"""The tickets' book: which comes next, which were lost, and the slots kept for them. Pure; part of the machine.

    all workers share one lane (SafeAugmenter)      each worker has its own (SafeMultiThreadedAugmenter)

    lane 0: 0 1 2 3 4 …  ◄── whoever is free        lane 0: 0 2 4 …  ◄── worker 0, one after the other
                                                    lane 1: 1 3 5 …  ◄── worker 1, one after the other

A ticket is issued in ascending order, lost tickets first. It is lost with its worker, or ends in an exception that is
not raised; then it is made again at once or after a while, and a slot stays kept for it.

In a lane of its own a worker goes on from batch to batch: what it makes depends on what it has made before. So its
tickets are made strictly in order, and none is given out while an earlier one is still to be made.
"""

from __future__ import annotations

import heapq

from safeloader.pool.slots import Slots


class Lane:
    """One lane.

    Attributes:
        number: from 0. slots: its part of the ring.
        ordered: whether each ticket waits for the one before it.
    """

    def __init__(self, number: int, step: int, first_ticket: int, slots: Slots, *, ordered: bool) -> None:
        self.number = number
        self.slots = slots
        self.ordered = ordered
        self._step = step
        self._next = first_ticket
        self._lost: list[int] = []  # a heap
        self._later: dict[int, float] = {}  # lost tickets whose time has not come

    @property
    def lost(self) -> list[int]:
        """Tickets that must be made again, whenever that is."""
        return [*self._lost, *self._later]

    @property
    def wakes(self) -> list[float]:
        """When lost tickets' times come."""
        return list(self._later.values())

    def issued(self, ticket: int) -> bool:
        """Whether the ticket was ever given out."""
        return ticket < self._next and (ticket - self._next) % self._step == 0

    def lose(self, ticket: int, again_at: float, *, failed: bool = False) -> None:
        """The ticket must be made again; the second time it is named, only the time changes.

        Args:
            ticket: whose worker has ended.
            again_at: not before.
            failed: it was the ticket's fault, perhaps.
        """
        if failed:
            self.slots.failed(ticket)
        if ticket not in self._later and ticket in self._lost:
            self._lost.remove(ticket)
            heapq.heapify(self._lost)
        self._later[ticket] = again_at

    def has_lost(self, now: float) -> bool:
        """Whether a lost ticket can be made again now."""
        if self._later:
            for ticket in [ticket for ticket, at in self._later.items() if at <= now]:
                del self._later[ticket]
                heapq.heappush(self._lost, ticket)
        return bool(self._lost)

    def next_lost(self) -> int:
        """The first of them: it is given out."""
        return heapq.heappop(self._lost)

    def next_new(self) -> int:
        """The next ticket: it is given out."""
        ticket, self._next = self._next, self._next + self._step
        return ticket

    @property
    def has_new(self) -> bool:
        """Whether a new ticket may be given out: there is a slot for it beside those that are kept for lost ones."""
        waits = self.ordered and (self._lost or self._later)
        return not waits and self.slots.room > len(self._lost) + len(self._later)

    @property
    def waiting(self) -> int:
        """How many tickets could be given out now, lost and new ones: each has a slot, and none of the reserve."""
        return max(len(self._lost), self.slots.usual - len(self._later))

    def clear(self) -> None:
        """Nothing is made any more."""
        self._lost.clear()
        self._later.clear()
