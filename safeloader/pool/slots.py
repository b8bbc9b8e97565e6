"""The ring's books: which slot belongs to whom. Pure; part of the machine.

    FREE ──fill──► FILLING(worker, ticket) ──ready──► READY ──taken──► LEASED ──released──► FREE
      ▲                     │ free: its worker has ended
      └─────────────────────┘   (discarded instead if nobody can prove that the worker writes no more)

A slot has one owner at any time, and only a FREE or FILLING slot is written to.

Tickets are taken in order, so one that takes long holds up those that are READY behind it. A ring that is full of them
leaves workers idle until it comes, while the consumer waits; and what a consumer that is as fast as the workers has
lost then can't be made up for. So when a ticket holds up a full ring, new tickets may have slots of a reserve, where
batches take long enough for that to matter. From then on they may have them always: while the next slow one is made,
the consumer lives on what was made ahead before. Not while a ticket that has failed is made again: what fails is soon
found out, and a ring full of failures would look like an outage of the storage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto


class SlotState(Enum):
    """See the module's diagram."""

    FREE = auto()
    FILLING = auto()
    READY = auto()
    LEASED = auto()


@dataclass
class Slot:
    """One slot; `worker` only while it is filled, `ticket` until it is taken."""

    state: SlotState = SlotState.FREE
    worker: int | None = None
    ticket: int | None = None

    def becomes(self, state: SlotState, worker: int | None, ticket: int | None) -> None:
        """It goes over into another state."""
        self.state, self.worker, self.ticket = state, worker, ticket


class Slots:
    """The slots of a lane; no id (`first`, `first` + `step`, …) is ever used again.

    Args:
        limit: how many are in use at a time, if nothing is held up.
        first: the first slot's id. step: from one id to the next, and from one ticket of the lane to the next.
        reserve: how many more there are at most.
        ticket: the first that will be taken.

    Attributes:
        granted: how many more there may be now, from the first time on that a ticket has held up others; 0 until
            somebody sets it.
    """

    def __init__(self, limit: int, first: int = 0, step: int = 1, *, reserve: int = 0, ticket: int = 0) -> None:
        self.granted = 0
        self._limit = limit
        self._most = limit + reserve
        self._to_take = ticket
        self._failed: set[int] = set()  # tickets that have, until they are READY
        self._slots: dict[int, Slot] = {}
        self._free: dict[int, None] = {}  # those of them that are FREE, the last one to become it last
        self._ready: dict[int, int] = {}  # those of them that are READY, by ticket
        self._next, self._step = first, step

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, slot: int) -> Slot:
        return self._slots[slot]

    def __iter__(self) -> Iterator[tuple[int, Slot]]:
        return iter(list(self._slots.items()))

    def counts(self) -> dict[SlotState, int]:
        """How many slots are in each state."""
        return {state: sum(slot.state is state for slot in self._slots.values()) for state in SlotState}

    @property
    def obtainable(self) -> int:
        """How many slots are free, or could be made: what tickets that were given out before can count on."""
        return self._most - self._in_use

    @property
    def usual(self) -> int:
        """How many a new ticket may have without the reserve."""
        return max(0, self._limit - self._in_use)

    @property
    def room(self) -> int:
        """How many a new ticket may have now."""
        most = self._limit + self.granted if self.granted and self._is_open else self._limit
        return max(0, most - self._in_use)

    @property
    def _is_open(self) -> bool:
        """Whether the reserve may be used now."""
        used_before = len(self._slots) > self._limit  # free slots are taken before another is made
        return not self._failed and (used_before or self._held_up)

    @property
    def _held_up(self) -> bool:
        """Whether batches are READY, but not the one that must be taken before them."""
        return bool(self._ready) and self._to_take not in self._ready

    @property
    def _in_use(self) -> int:
        return len(self._slots) - len(self._free)

    def obtain(self) -> tuple[int, bool] | None:
        """A free slot, the last one used if possible, and whether it was made just now; None if there is none."""
        if self._free:
            return next(reversed(self._free)), False
        if len(self._slots) >= self._most:
            return None
        slot_id, self._next = self._next, self._next + self._step
        self._slots[slot_id] = Slot()
        self._free[slot_id] = None
        return slot_id, True

    def fill(self, slot: int, worker: int, ticket: int) -> None:
        """FREE → FILLING."""
        del self._free[slot]
        self._slots[slot].becomes(SlotState.FILLING, worker, ticket)

    def failed(self, ticket: int) -> None:
        """The ticket must be made again, and may fail again."""
        self._failed.add(ticket)

    def ready(self, slot: int, ticket: int) -> None:
        """FILLING → READY."""
        self._failed.discard(ticket)
        self._slots[slot].becomes(SlotState.READY, None, ticket)
        self._ready[ticket] = slot

    def free(self, slot: int) -> None:
        """FILLING or LEASED → FREE."""
        self._slots[slot].becomes(SlotState.FREE, None, None)
        self._free[slot] = None

    def taken(self, ticket: int) -> None:
        """READY → LEASED; nothing if it was let go already."""
        slot = self._ready.get(ticket)
        if slot is not None:
            self._forget(self._slots[slot])
            self._slots[slot].becomes(SlotState.LEASED, None, None)

    def released(self, slot: int) -> None:
        """LEASED → FREE; also READY → FREE: it was taken and let go so quickly that `taken` is still to come."""
        known = self._slots.get(slot)
        if known is not None and known.state in (SlotState.READY, SlotState.LEASED):
            self._forget(known)
            self.free(slot)

    def discard(self, slot: int) -> None:
        """Forget it."""
        self._forget(self._slots.pop(slot))
        self._free.pop(slot, None)

    def _forget(self, slot: Slot) -> None:
        """It is not READY any more, if it was; its ticket will not be taken again."""
        if slot.state is SlotState.READY and slot.ticket is not None:
            self._ready.pop(slot.ticket, None)
            self._to_take = max(self._to_take, slot.ticket + self._step)
