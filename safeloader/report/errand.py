"""Work that may block (a terminal, a storage, a log), done by a thread that lives only while there is some.

The supervisor's thread must never wait for any of these: it hands the work over and goes on.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable


class Errand:
    """Work that may block, done by a daemon thread that lives only while there is some.

    `go` waits for nothing but its thread's start: the one lock is only ever tried. It does nothing in a forked child,
    where that lock may be held by a thread that does not exist there, nor while the interpreter ends.
    """

    def __init__(self, name: str, work: Callable[[], None]) -> None:
        self._name = name
        self._work = work
        self._pid = os.getpid()
        self._busy = threading.Lock()  # held by the thread while it lives, and for a moment by `wait`
        self._asked = False

    def go(self) -> bool:
        """See to it that `work` is called from now on at least once more; False if there is no thread for it now."""
        self._asked = True
        if os.getpid() != self._pid or sys.is_finalizing():
            return False
        if self._busy.acquire(blocking=False):
            try:
                threading.Thread(target=self._run, name=self._name, daemon=True).start()
            except RuntimeError:  # a limit on pids is reached, or the interpreter ends: at the next call
                self._busy.release()
                return False
        return True

    def wait(self, timeout_s: float) -> bool:
        """Whether all that was asked for is done, at the latest by then. In a forked child nothing ever is asked."""
        deadline = time.monotonic() + timeout_s
        while os.getpid() == self._pid:
            if not self._busy.acquire(timeout=max(0.0, deadline - time.monotonic())):
                return False
            self._busy.release()
            if not self._asked:
                break
            # Somebody called `go` while this held the lock, or there was no thread for it.
            if not self.go() or time.monotonic() > deadline:
                return False
        return True

    def _run(self) -> None:
        # These come to the thread that writes. Blocked, they leave it with the error alone, even in a trainer that
        # has given them back their deadly default.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGPIPE, signal.SIGXFSZ})
        while True:
            try:
                while self._has_more():
                    self._asked = False
                    self._work()
            finally:
                self._busy.release()
            # Who asked between the last look and the release did not get the lock: look once more.
            if not (self._has_more() and self._busy.acquire(blocking=False)):
                return

    def _has_more(self) -> bool:
        return self._asked  # other threads set it
