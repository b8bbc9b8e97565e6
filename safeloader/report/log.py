"""Log lines from the supervisor's thread, which must never wait for a log.

    say(level, message) ─► queue (at most 1,000) ─► a thread: the logger's handlers, in this order
        returns at once                              lives only while there is something to log

A handler may write to a terminal that was stopped with Ctrl-S, a full pipe or a stalled storage, and holds a lock
meanwhile. The line gets its time, and is measured against the logger's level, when it is said. Who logs in the
training thread does so directly: that is the user's own thread, and its own wait.
"""

from __future__ import annotations

import functools
import logging
import os
from collections import deque
from typing import Final

from safeloader.report.errand import Errand

MAX_QUEUED: Final = 1000
"""Lines kept while the log can't be written; further ones are counted and left out: the first ones say why."""
_SETTLE_S: Final = 0.05

logger = logging.getLogger("safeloader")


class Log:
    """One process's queue of lines. Fed by the supervisor's thread alone."""

    def __init__(self) -> None:
        self._queue: deque[logging.LogRecord] = deque()
        self._left_out = 0
        self._errand = Errand("safeloader-log", self._log_queued)

    def say(self, level: int, message: str) -> None:
        """Have this logged."""
        if not logger.isEnabledFor(level):
            return
        if len(self._queue) >= MAX_QUEUED:
            self._left_out += 1
        else:
            if self._left_out:
                message, self._left_out = f"{message} ({self._left_out} lines before this one are left out)", 0
            self._queue.append(logger.makeRecord(logger.name, level, __file__, 0, message, (), None))
        self._errand.go()

    def flush(self, timeout_s: float) -> bool:
        """Whether everything is logged, at the latest by then."""
        if self._queue:  # there was no thread for it
            self._errand.go()
        return self._errand.wait(timeout_s)

    def _log_queued(self) -> None:
        while self._queue:
            logger.handle(self._queue.popleft())


def say(level: int, message: str) -> None:
    """Have this logged by a thread that may wait for it."""
    _log_of(os.getpid()).say(level, message)


def flush(timeout_s: float = _SETTLE_S) -> bool:
    """Whether all that was said is logged, at the latest by then."""
    return _log_of(os.getpid()).flush(timeout_s)


@functools.cache
def _log_of(_pid: int) -> Log:
    """The process's: a forked child has no use for its parent's."""
    return Log()
