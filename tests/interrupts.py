"""A signal's handler that raises, at random moments: Ctrl-C in a notebook, many times."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class InterruptError(Exception):
    """What the handler raises."""


class Interrupts:
    """Raises an `InterruptError` when the next signal comes, if it is `armed`, which it is not any more then.

    Attributes:
        raised: how often it has.
    """

    def __init__(self) -> None:
        self.armed = False
        self.raised = 0

    def handle(self, *_: object) -> None:
        """The handler."""
        if self.armed:
            self.armed = False
            self.raised += 1
            raise InterruptError


@contextmanager
def interrupts(every_s: float) -> Iterator[Interrupts]:
    """A signal every so many seconds, inside the `with` block."""
    made = Interrupts()
    previous = signal.signal(signal.SIGALRM, made.handle)
    signal.setitimer(signal.ITIMER_REAL, every_s, every_s)
    try:
        yield made
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
