"""Signals that would end the process, as exceptions at moments when they do no harm.

    SIGTERM     Slurm, PBS, Kubernetes, `kill`, and torch for the other ranks when one has failed
    SIGINT      Ctrl-C: stays Python's KeyboardInterrupt
    SIGHUP      a terminal that is gone
    SIGUSR1, SIGUSR2, SIGXCPU      what Slurm (`--signal`), SGE (`-notify`) and LSF send when time is nearly up

Only a signal that would end the process is taken over, so nobody who does not send one of these notices; whoever has
a handler of its own (submitit, Lightning, faulthandler), or ignores it (nohup), keeps that: if a foreign handler
raises, it is an exception like any other. Python runs handlers in its main thread between two steps of the
interpreter, so nothing is taken over in another thread.

The exit code is 128 + the signal's number, as a shell reports a process that a signal ended.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, Final

SIGNALS: Final = (
    signal.SIGTERM,
    signal.SIGINT,
    signal.SIGHUP,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
_ENDS_THE_PROCESS: Final = (signal.SIG_DFL, signal.default_int_handler)


class EndedBySignal(SystemExit):
    """A signal asked this process to end; `name` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


class Interrupts:
    """Raises `EndedBySignal` or KeyboardInterrupt in the main thread when a signal comes; not while it is held."""

    def __init__(self) -> None:
        self._before: dict[int, Any] = {}
        self._pid = 0
        self._holds = 0
        self._pending: int | None = None
        self._ending = False

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Take the signals over inside the `with` block. One inside another, or in another thread, does nothing."""
        if self._before or threading.current_thread() is not threading.main_thread():
            yield
            return
        self._pid, self._pending, self._ending = os.getpid(), None, False
        try:
            for number in SIGNALS:
                if signal.getsignal(number) in _ENDS_THE_PROCESS:
                    self._before[number] = signal.signal(number, self._handle)
            yield
        finally:
            for taken, handler in self._before.items():
                signal.signal(taken, handler)
            self._before.clear()

    @contextmanager
    def held(self) -> Iterator[None]:
        """A signal that comes inside the `with` block is raised at its end."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
        self.check()

    def check(self) -> None:
        """Raise what has come. An exception is lost where Python can't pass it on: in `__del__`, in a callback."""
        if self._pending is not None and not self._holds and not self._ending:
            raise _exception(self._pending)

    def end(self) -> None:
        """From now on a signal only says that the process is ending: what it still writes should be complete."""
        self._ending = True

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a child that was forked and has not exec'ed is nobody's training
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        if self._ending:
            with suppress(OSError):
                # Not print: the signal may have come in the middle of one.
                os.write(2, _already(number).encode())
            return
        self._pending = number
        self.check()


def _exception(number: int) -> BaseException:
    return KeyboardInterrupt() if number == signal.SIGINT else EndedBySignal(number)


def _already(number: int) -> str:
    name = signal.Signals(number).name
    return f"SafeLoader: {name} again: this process ends once the checkpoint is written (SIGKILL ends it at once)\n"
