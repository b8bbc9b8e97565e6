"""What the machine is told (events) and what it answers (actions). All plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ready:
    """The worker has started."""

    worker: int
    incarnation: int


@dataclass(frozen=True)
class Finished:
    """The worker's slot holds the ticket's batch, or (`failed`) the record of the exception that it ended in."""

    worker: int
    incarnation: int
    ticket: int
    slot: int
    failed: bool = False


@dataclass(frozen=True)
class Exited:
    """The worker has ended, or could not be started.

    `proven` means that it certainly writes no more; without proof its slots are discarded. `counts` is false for
    those that went down with another one's death: a nursery's death is one, however many workers it takes along.
    """

    worker: int
    incarnation: int
    proven: bool = True
    counts: bool = True


@dataclass(frozen=True)
class Taken:
    """The consumer has taken the ticket's batch."""

    ticket: int


@dataclass(frozen=True)
class Released:
    """The last view on the slot's storage is gone."""

    slot: int


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True)
class Close:
    """The pool ends: on request, or (`failed`) for good."""

    failed: bool = False


Event = Ready | Finished | Exited | Taken | Released | Tick | Close


# ---- actions ----


@dataclass(frozen=True)
class Start:
    """Start this incarnation of the worker."""

    worker: int
    incarnation: int


@dataclass(frozen=True)
class Stop:
    """Kill the worker; its exit is reported as any other."""

    worker: int
    incarnation: int


@dataclass(frozen=True)
class Produce:
    """Have the worker make the ticket's batch in the slot."""

    worker: int
    ticket: int
    slot: int


@dataclass(frozen=True)
class CreateSlot:
    """Make the slot's memory file."""

    slot: int


@dataclass(frozen=True)
class DiscardSlot:
    """Close the slot's memory file; views on it stay valid."""

    slot: int


@dataclass(frozen=True)
class Deliver:
    """The ticket's batch is ready for the consumer."""

    ticket: int
    slot: int
    failed: bool


@dataclass(frozen=True)
class Mourn:
    """A worker has died unasked: record it. `restart_in_s` is None if it is not replaced."""

    worker: int
    incarnation: int
    tickets: tuple[int, ...]
    restart_in_s: float | None


@dataclass(frozen=True)
class GiveUp:
    """The restart intensity is exceeded. `failed_starts` tells which limit it was."""

    deaths: int
    failed_starts: bool


Action = Start | Stop | Produce | CreateSlot | DiscardSlot | Deliver | Mourn | GiveUp
