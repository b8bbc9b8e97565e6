"""The consumer's side of a pool: batches that are ready, in order, and the errors that end the stream.

The supervisor's thread puts batches in; the training thread takes them out, one ticket after the other, and leases
their slots. A consumer that hoards batches gets copies beyond `max_leases`, so the ring never runs dry. Errors are
raised here, in `take`, and nowhere else.
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from safeloader import killpoints
from safeloader.pool import events
from safeloader.pool.failure import FailureRecord, to_error
from safeloader.ring import codec
from safeloader.ring.lease import lease


def _nowhere(event: events.Event) -> None:
    raise AssertionError(f"the pool is not open: {event}")


@dataclass(frozen=True)
class _ReadyBatch:
    slot: int
    memory: mmap.mmap
    failed: bool


class Consumer:
    """Batches of one pool on their way to the training loop.

    Attributes:
        next_ticket: the first ticket that was not delivered yet.
        wait_s: how long `take` has waited, in seconds, all in all.
        post: tells the machine what was taken and released; set before the first `take`.
    """

    def __init__(self, name: str, first_ticket: int, max_leases: int) -> None:
        self.next_ticket = first_ticket
        self.wait_s = 0.0
        self.post: Callable[[events.Event], None] = _nowhere
        self._name = name
        self._max_leases = max_leases
        self._leased: set[int] = set()  # adding and discarding are atomic: releases come from any thread
        self._ready: dict[int, _ReadyBatch] = {}
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._turn = threading.Lock()  # several threads may take: each gets whole batches

    # ---- the supervisor's thread ----

    def put(self, ticket: int, slot: int, memory: mmap.mmap, *, failed: bool) -> None:
        """A batch (or, `failed`, the record of an exception) is ready."""
        with self._changed:
            self._ready[ticket] = _ReadyBatch(slot, memory, failed)
            if ticket == self.next_ticket:
                self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """No batch comes after those that are ready; the first error stays."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    @property
    def ready(self) -> int:
        """How many batches are ready now."""
        return len(self._ready)

    def drop(self) -> None:
        """The pool has ended: forget what nobody took."""
        with self._changed:
            self._ready.clear()

    # ---- the training thread ----

    def take(self) -> Any:
        """The next ticket's batch; waits for it.

        Raises:
            SafeLoaderError: the stream has ended; each further call raises the same.
        """
        with self._turn:
            ticket = self.next_ticket
            ready = self._wait_for(ticket)
            # The ticket counts as delivered before it is announced: from here on it is the caller's.
            self.next_ticket += 1
            self.post(events.Taken(ticket))
            killpoints.reach("trainer.step.taken")
            memory = self._lease(ready)
            try:
                batch = codec.decode(memory, ticket)
            except Exception as error:
                self.fail(error)
                raise
            killpoints.reach("trainer.step.decoded")
            if ready.failed:
                assert isinstance(batch, FailureRecord)
                failure = to_error(batch, ticket, self._name)
                self.fail(failure)
                self.post(events.Close(failed=True))
                raise failure
            return batch

    def _wait_for(self, ticket: int) -> _ReadyBatch:
        with self._changed:
            if ticket not in self._ready and self._error is None:
                started = time.monotonic()
                with contextlib.ExitStack() as stack:
                    stack.callback(lambda: self._waited(time.monotonic() - started))
                    self._changed.wait_for(lambda: ticket in self._ready or self._error is not None)
            ready = self._ready.pop(ticket, None)
            if ready is None:
                assert self._error is not None
                raise self._error
            return ready

    def _waited(self, seconds: float) -> None:
        self.wait_s += seconds

    def _lease(self, ready: _ReadyBatch) -> memoryview:
        hoarding = len(self._leased) >= self._max_leases
        self._leased.add(ready.slot)
        memory = lease(ready.memory, functools.partial(self._release, ready.slot))
        return codec.private_copy(memory) if hoarding else memory

    def _release(self, slot: int) -> None:
        """Runs wherever garbage is collected: takes no lock."""
        self._leased.discard(slot)
        killpoints.reach("trainer.step.released")
        self.post(events.Released(slot))
