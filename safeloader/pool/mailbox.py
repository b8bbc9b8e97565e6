"""How other threads tell the supervisor's thread something: no lock, so it is safe even from a garbage collection."""

from __future__ import annotations

import functools
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator


class Wakeup:
    """Wakes the supervisor from any thread.

    Attributes:
        set: does it, without a line of Python, in which a signal's handler could run. The descriptor lives as long as
            anybody holds this.
    """

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.set: Callable[[], None] = functools.partial(os.eventfd_write, self.fd, 1)
        weakref.finalize(self.set, os.close, self.fd).atexit = False

    def clear(self) -> None:
        """Call before looking at what it was woken for."""
        os.eventfd_read(self.fd)


class Mailbox:
    """Calls that the supervisor's thread is to make."""

    def __init__(self) -> None:
        self.wakeup = Wakeup()
        self._calls: deque[Callable[[], None]] = deque()  # appending and popping are atomic

    def post(self, call: Callable[[], None]) -> None:
        """Have the supervisor's thread make this call."""
        self._calls.append(call)
        self.wakeup.set()

    def drain(self) -> Iterator[Callable[[], None]]:
        """Everything posted until now, and while it is worked off."""
        while self._calls:
            yield self._calls.popleft()
