"""What the machine is told (events) and what it answers (actions). All plain data."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from safeloader.pool.crowd import Effort


class Cause(str, Enum):
    """Why a worker has ended, as far as that decides what is done about it."""

    ITSELF = "itself"
    """A crash in native code, or a call of exit: what it worked on may be to blame."""
    READING = "reading"
    """SIGBUS: what it read went away under it. The file, or the storage, may be to blame."""
    OUTSIDE = "outside"
    """Somebody sent it a signal; what it worked on had no part in it."""
    MEMORY = "memory"
    """The kernel's OOM killer."""
    HUNG = "hung"
    """The watchdog."""
    NURSERY = "nursery"
    """It went down with its nursery, or nobody can tell."""
    REFUSED = "refused"
    """It could not be started at all."""
    SPENT = "spent"
    """By agreement: it was asked to leave, or its loader can't go on after an exception."""


@dataclass(frozen=True)
class Failure:
    """An exception in a worker, as far as it matters for what is done about it.

    Attributes:
        place: exception type and line of code: the same bug gives the same place on other data.
        case: the sample's identifier, or None where it is not known which one it was.
        reading: whether it is a failure to read data, so that a later try may succeed.
        broken: whether what was read is damaged, as far as one can tell; else the storage did not answer.
        final: whether another try would be pointless (a finite loader has ended).
    """

    place: str
    case: str | None = None
    reading: bool = False
    broken: bool = False
    final: bool = False


# ---- events ----


@dataclass(frozen=True)
class Ready:
    """The worker has started.

    `cases` is how many its loader draws from, or None if that is not known. `cpus` are those on which it may run, as
    bits; 0 if it can't measure what its work takes.
    """

    worker: int
    incarnation: int
    cases: int | None = None
    cpus: int = 0


@dataclass(frozen=True)
class Finished:
    """The worker's slot holds the ticket's batch, or (`failure`) the record of the exception that it ended in.

    `cases` are the batch's, where they are known. `effort` is what it took, if the worker can measure it.
    """

    worker: int
    incarnation: int
    ticket: int
    slot: int
    cases: tuple[str, ...] = ()
    failure: Failure | None = None
    effort: Effort | None = None


@dataclass(frozen=True)
class Exited:
    """The worker has ended, or could not be started.

    `proven` means that it certainly writes no more; without proof its slots are discarded. `counts` is false for
    those that went down with another one's death: a nursery's death is one, however many workers it takes along.
    `ticket` and `case` are what it had in hand, by its own account.
    """

    worker: int
    incarnation: int
    cause: Cause = Cause.ITSELF
    proven: bool = True
    counts: bool = True
    ticket: int | None = None
    case: str | None = None


@dataclass(frozen=True)
class Seen:
    """The answer to `Inspect`: since when the worker is in its present stage, on the machine's clock."""

    worker: int
    incarnation: int
    since: float


@dataclass(frozen=True)
class Grown:
    """The worker's memory has grown beyond its limit: replace it between two batches."""

    worker: int
    incarnation: int


@dataclass(frozen=True)
class Budget:
    """Memory allows this many workers at a time, and so many slots of the reserve."""

    workers: int
    reserve: int = 0


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


Event = Ready | Finished | Exited | Seen | Grown | Budget | Taken | Released | Tick | Close


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
class Inspect:
    """No sign of life for too long: look at its status page, and answer with `Seen`."""

    worker: int
    incarnation: int


@dataclass(frozen=True)
class Condemn:
    """It has made no progress for `idle_s` seconds, more than `allowed_s`: take its stacks and kill it."""

    worker: int
    incarnation: int
    idle_s: float
    allowed_s: float


@dataclass(frozen=True)
class Abandon:
    """It was killed and does not end: answer with an `Exited` that is not proven."""

    worker: int
    incarnation: int


@dataclass(frozen=True)
class Retire:
    """Ask the worker, which has nothing to do, to leave: for good, or (`rests`) until there is something to do."""

    worker: int
    incarnation: int
    rests: bool = False


@dataclass(frozen=True)
class Produce:
    """Have the worker make the ticket's batch in the slot; `attempt` counts the draws that were given up."""

    worker: int
    ticket: int
    slot: int
    attempt: int = 0


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
    """A worker has died unasked: record it.

    `restart_in_s` is None if it is not replaced for now; `again_in_s` tells when the ticket that it had in hand is
    made again.
    """

    worker: int
    incarnation: int
    tickets: tuple[int, ...]
    restart_in_s: float | None
    cause: Cause = Cause.ITSELF
    again_in_s: float = 0.0


@dataclass(frozen=True)
class Retry:
    """A ticket ended in an exception and is made again, in so many seconds: record it."""

    worker: int
    incarnation: int
    ticket: int
    in_s: float


@dataclass(frozen=True)
class Quarantine:
    """The case is no longer drawn: tell all workers, and record it."""

    case: str
    ticket: int
    quarantined: int
    limit: int


@dataclass(frozen=True)
class Redraw:
    """This ticket is drawn anew, and nothing is quarantined for it (yet): record it.

    Either it has cost two workers and nobody knows by which case, or `case` is suspected.
    """

    ticket: int
    attempt: int
    case: str | None = None


@dataclass(frozen=True)
class Outage:
    """Many cases can't be read at once (`cases`), or (none) reading works again: record it."""

    cases: tuple[str, ...]
    seconds: float = 0.0


class Why(str, Enum):
    """What made the number of workers change, or the pool end."""

    DEATHS = "deaths"
    """The restart intensity is exceeded."""
    STARTS = "starts"
    """Workers die before they are ready."""
    MEMORY = "memory"
    QUIET = "quiet"
    """Nothing has happened for long enough to try one more."""
    BAD_CASE = "bad-case"
    QUARANTINE = "quarantine"
    """More cases would have to be quarantined than may be."""
    OUTAGE = "outage"
    """Storage has been failing for longer than the limit."""


@dataclass(frozen=True)
class Resize:
    """The pool goes on with so many workers at most: record it."""

    workers: int
    before: int
    why: Why

    @property
    def after_measuring(self) -> bool:
        """Whether these are the others, after one was measured: nothing that a person need know."""
        return self.why is Why.MEMORY and self.workers > self.before


@dataclass(frozen=True)
class Rest:
    """The others suffice for the work that there is, so `resting` of the `workers` rest: say it, once for the pool.

    `at_work` is given if there is more work, but so many keep the CPUs busy.
    """

    resting: int
    workers: int
    at_work: int | None = None


@dataclass(frozen=True)
class SwitchMethod:
    """From here on workers come from the other kind of nursery: record it."""


@dataclass(frozen=True)
class GiveUp:
    """The pool can't go on. `deaths` of workers led here; `case` is the one that it is about."""

    why: Why
    deaths: int = 0
    case: str | None = None
    seconds: float = 0.0


Action = (
    Start
    | Stop
    | Inspect
    | Condemn
    | Abandon
    | Retire
    | Produce
    | CreateSlot
    | DiscardSlot
    | Deliver
    | Mourn
    | Retry
    | Quarantine
    | Redraw
    | Outage
    | Resize
    | Rest
    | SwitchMethod
    | GiveUp
)
