"""The ring's books: which slot belongs to whom. Pure; part of the machine.

    FREE ──fill──► FILLING(worker, ticket) ──ready──► READY ──taken──► LEASED ──released──► FREE
      ▲                     │ free: its worker has ended
      └─────────────────────┘   (discarded instead if nobody can prove that the worker writes no more)

A slot has one owner at any time, and only a FREE or FILLING slot is written to.
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


class Slots:
    """The slots of a lane, at most `limit` at a time; no id (`first`, `first` + `step`, …) is ever used again."""

    def __init__(self, limit: int, first: int = 0, step: int = 1) -> None:
        self._limit = limit
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
        """How many slots are free, or could be made."""
        return len(self._free) + self._limit - len(self._slots)

    def obtain(self) -> tuple[int, bool] | None:
        """A free slot, the last one used if possible, and whether it was made just now; None if there is none."""
        if self._free:
            return next(reversed(self._free)), False
        if len(self._slots) >= self._limit:
            return None
        slot_id, self._next = self._next, self._next + self._step
        self.free(slot_id)
        return slot_id, True

    def fill(self, slot: int, worker: int, ticket: int) -> None:
        """FREE → FILLING."""
        self._free.pop(slot)
        self._slots[slot] = Slot(SlotState.FILLING, worker, ticket)

    def ready(self, slot: int, ticket: int) -> None:
        """FILLING → READY."""
        self._slots[slot] = Slot(SlotState.READY, ticket=ticket)
        self._ready[ticket] = slot

    def free(self, slot: int) -> None:
        """FILLING or LEASED → FREE, or a new one."""
        self._slots[slot] = Slot()
        self._free[slot] = None

    def taken(self, ticket: int) -> None:
        """READY → LEASED; nothing if it was let go already."""
        slot = self._ready.pop(ticket, None)
        if slot is not None:
            self._slots[slot] = Slot(SlotState.LEASED)

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
        """It is not READY any more, if it was."""
        if slot.state is SlotState.READY and slot.ticket is not None:
            self._ready.pop(slot.ticket, None)
