"""The consumer's side of a pool: batches that are ready, in order, and the errors that end the stream.

The supervisor's thread puts batches in; the training thread takes them out, one ticket after the other, and leases
their slots. A consumer that hoards batches gets copies beyond `max_leases`, so the ring never runs dry. Errors are
raised here, in `take`, and nowhere else.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from safeloader import killpoints
from safeloader.pool import events
from safeloader.pool.failure import FailureRecord, to_error
from safeloader.pool.mailbox import Wakeup
from safeloader.pool.work import EpochEnd
from safeloader.ring import codec
from safeloader.ring.lease import Lease, lease
from safeloader.ring.memfile import MemoryFile
from safeloader.ring.pinning import Pinning

logger = logging.getLogger("safeloader")


def _nowhere(event: events.Event) -> None:
    raise AssertionError(f"the pool is not open: {event}")


def _not_open() -> None:
    raise AssertionError("the pool is not open")


def _unrecorded(ticket: int) -> None:
    """Nobody wants to know."""


class _ReadyBatch(NamedTuple):
    memory: memoryview
    """Leased: the slot is let go when it and all views on it are."""
    lease: Lease
    file: MemoryFile
    mapping: mmap.mmap
    failed: bool


class Consumer:
    """Batches of one pool on their way to the training loop.

    A signal (Ctrl-C in a notebook) may interrupt `take` anywhere: the supervisor never waits for a lock that the
    training thread takes, and until the lane's next ticket moves on nothing has
    happened, so the next call starts afresh.

    Attributes:
        wait_s: how long `take` has waited, in seconds, all in all; without the wait that goes on now.
        waiting: the ticket that `take` waits for now, and since when on `time.monotonic`'s clock; or None.
        freed: is set whenever a lease ends. wants_slots: whether work waits for a slot; set by the supervisor, which
            listens to `freed` only then.
        post: tells the machine that the stream has failed. wake: has `news` asked. describe: says who has a ticket.
            record: is told of each batch that is delivered. All four are set before the first `put`.
    """

    def __init__(
        self,
        name: str,
        first_ticket: int,
        max_leases: int,
        *,
        slow_s: float,
        lanes: int = 1,
        pinning: Pinning | None = None,
    ) -> None:
        self._next = [first_ticket + lane for lane in range(lanes)]  # tickets, by lane
        self._ends = 0  # how many of those taken were ends of epochs
        self.wait_s = 0.0
        self.waiting: tuple[int, float] | None = None
        self.freed = Wakeup()
        self.wants_slots = True
        self.post: Callable[[events.Event], None] = _nowhere
        self.wake: Callable[[], None] = _not_open
        self.describe: Callable[[int], str] = str
        self.record: Callable[[int], None] = _unrecorded
        self._slow_s = slow_s
        self._name = name
        self._first_ticket = first_ticket
        self._max_leases = max_leases
        self._pinning = pinning
        # Single operations on these are atomic; leases end in any thread.
        self._leases: dict[int, Lease] = {}  # by slot: of what is ready, and of what was taken
        self._ended: deque[Lease] = deque()
        self._taken: dict[int, int] = {}  # tickets by slot that the machine was not told of yet
        self._ready: dict[int, _ReadyBatch] = {}
        self._unannounced = False
        self._errors: list[BaseException] = []
        self._failure: BaseException | None = None  # of a ticket, at its place; the errors come after all tickets
        self._bell = threading.Lock()  # released: something has changed. Not a Condition: see the class
        self._turn = threading.Lock()  # several threads may take: each gets whole batches

    # ---- the supervisor's thread ----

    def put(self, ticket: int, slot: int, file: MemoryFile, *, failed: bool) -> None:
        """A batch (or, `failed`, the record of an exception) is ready in the slot's file."""
        mapping = file.map(populate=True)
        leased, held = lease(mapping, slot, self._ended, self.freed.set)
        self._leases[slot] = held
        self._ready[ticket] = _ReadyBatch(leased, held, file, mapping, failed)
        self._unannounced = True

    def announce(self) -> None:
        """Wake whoever waits for what was put: last in a turn, since he needs the interpreter's lock next."""
        if self._unannounced:
            self._unannounced = False
            self._ring()

    def fail(self, error: BaseException) -> None:
        """No batch comes after those that are ready; the first error stays."""
        self._errors.append(error)
        self._ring()

    @property
    def batches(self) -> int:
        """How many batches were delivered: a ticket that ended in an exception was raised instead."""
        lanes = len(self._next)
        taken = sum((ticket - self._first_ticket) // lanes for ticket in self._next)
        return taken - self._ends - (self._failure is not None)

    @property
    def next_ticket(self) -> int:
        """The first ticket that was not delivered yet."""
        return min(self._next)

    @property
    def ready(self) -> int:
        """How many batches are ready now."""
        return len(self._ready)

    def drop(self) -> None:
        """The pool is closed: forget what nobody took."""
        self._ready.clear()

    def leave_in_child(self) -> None:
        """In a child forked from the trainer: what ends there is no lease, and sets no descriptor."""
        self._leases.clear()
        self.drop()

    def slots_closed(self) -> None:
        """The pool has closed its slots; views on them live on."""
        if self._pinning is not None:
            self._pinning.look()

    @property
    def ended(self) -> int:
        """How many leases have ended that `news` has not told of yet."""
        return len(self._ended)

    def news(self) -> Iterator[events.Taken | events.Released]:
        """What was taken, and the leases that have ended, since the last call; each is told once.

        The training thread does not wake the supervisor for it: two wakes a batch would cost it as much as the batch.
        It is told with whatever happens next, and a slot's release at once if work waits for it (`wants_slots`).
        """
        while self._ended:
            slot = self._ended.popleft().slot
            del self._leases[slot]
            self._taken.pop(slot, None)  # the release says it as well
            killpoints.reach("trainer.step.released")
            yield events.Released(slot)
        while self._taken:
            yield events.Taken(self._taken.popitem()[1])

    def _ring(self) -> None:
        if self._bell.locked():  # or it rings already
            with contextlib.suppress(RuntimeError):  # another thread was quicker
                self._bell.release()

    # ---- the training thread ----

    def take(self, lane: int = 0) -> Any:
        """The batch of the lane's next ticket; waits for it.

        Raises:
            SafeLoaderError: the stream has ended; each further call raises the same.
        """
        with self._turn:
            if self._failure is not None:  # whatever is ready comes after it
                raise self._failure.with_traceback(None)
            ticket = self._next[lane]
            self._ready.pop(ticket - len(self._next), None)  # still there only if an interrupt came just then
            if self._pinning is not None:
                self._pinning.fence()
            ready = self._wait_for(ticket)
            batch = codec.decode(self._memory_for(ready), ticket)
            killpoints.reach("trainer.step.decoded")
            self._taken[ready.lease.slot] = ticket  # again after an interrupt: the machine ignores the second
            killpoints.reach("trainer.step.taken")
            is_batch = not ready.failed and not isinstance(batch, EpochEnd)
            if is_batch:
                self.record(ticket)  # after an interrupt twice rather than not at all
            self._next[lane] = ticket + len(self._next)
            self._ready.pop(ticket, None)
            if ready.failed:
                assert isinstance(batch, FailureRecord)
                self._failure = to_error(batch, ticket, self._name)
                self.post(events.Close(failed=True))
                raise self._failure
            self._ends += not is_batch
            return batch

    def _memory_for(self, ready: _ReadyBatch) -> memoryview:
        """What to decode the batch from. A slot that only a copy to the GPU still holds comes back by itself."""
        taken = len(self._leases) - len(self._ready)  # at most: some have ended that `news` has not told of yet
        if taken >= self._max_leases:
            taken = sum(held.in_use for held in list(self._leases.values())) - len(self._ready)
        if taken >= self._max_leases:
            return codec.private_copy(ready.memory)
        if self._pinning is None or ready.failed:
            return ready.memory
        return self._pinning.lend(ready.file, ready.mapping, ready.lease, ready.memory)

    def _wait_for(self, ticket: int) -> _ReadyBatch:
        started = time.monotonic()
        said = False
        if self.wants_slots and ticket not in self._ready:
            # It learns what was taken: as long as this ticket holds up others, work need not wait for a slot.
            self.wake()
        self.waiting = ticket, started
        try:
            while (ready := self._ready.get(ticket)) is None:
                if self._errors:
                    raise self._errors[0].with_traceback(None)
                rung = self._bell.acquire(timeout=-1 if said else max(0.0, started + self._slow_s - time.monotonic()))
                if not rung:
                    said = True
                    logger.warning(
                        "SafeLoader: training has waited %.0f s for the batch of ticket %d of pool %r: %s. Slow is not "
                        "hung: it goes on, and a worker that makes no progress is replaced.",
                        time.monotonic() - started, ticket, self._name, self.describe(ticket),
                    )  # fmt: skip
            return ready
        finally:
            self.waiting = None
            self.wait_s += time.monotonic() - started
