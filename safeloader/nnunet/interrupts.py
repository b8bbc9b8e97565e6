"""Signals that would end the process, as exceptions at moments when they do no harm.

    SIGTERM     Slurm, PBS, Kubernetes, `kill`, and torch for the other ranks when one has failed
    SIGINT      Ctrl-C: stays Python's KeyboardInterrupt
    SIGHUP      a terminal that is gone
    SIGUSR1, SIGUSR2, SIGXCPU      what Slurm (`--signal`), SGE (`-notify`) and LSF send when time is nearly up

Only a signal that would end the process is taken over, so nobody who does not send one of these notices; whoever has
a handler of its own (submitit, Lightning, faulthandler), or ignores it (nohup), keeps that: if a foreign handler
raises, it is an exception like any other. Handlers are set in the main thread only, since Python allows no other.

When a signal comes, who reacts:

    the next step       raises it, between two batches. Python runs handlers anywhere, also in `__del__` and in
                        callbacks of weak references, and drops what they raise there: that was seen in a training.
    the main thread     raises it wherever it is: at once outside the loop of steps, and after `step_patience_s` in it
                        (a loader waits for storage, a step takes minutes).
    the watcher         a thread: if the main thread does not come back from native code for `native_patience_s` (a rank
                        waits for one that is gone, a GPU hangs), `on_stuck` is called and the process ends.

The exit code is 128 + the signal's number, as a shell reports a process that a signal ended.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
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
_STOP: Final = b"\0"  # no signal has this number


class EndedBySignal(SystemExit):
    """A signal asked this process to end; `name` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.name = signal.Signals(number).name

    def __str__(self) -> str:
        return f"{self.name}, exit code {self.code}"


class Interrupts:
    """Raises `EndedBySignal` or KeyboardInterrupt in the main thread when a signal comes; not while it is held.

    Args:
        on_stuck: Called with the signal's name, in another thread, when the main thread does not react.
        step_patience_s: How long the next step is waited for.
        native_patience_s: How long the main thread is waited for after that. Both together leave Slurm's `KillWait`
            of 30 s time to write.
    """

    def __init__(
        self, on_stuck: Callable[[str], None], *, step_patience_s: float = 2.0, native_patience_s: float = 8.0
    ) -> None:
        self._on_stuck = on_stuck
        self._step_patience_s, self._native_patience_s = step_patience_s, native_patience_s
        self._before: dict[int, Any] = {}
        self._lock = threading.RLock()  # held where the process must not end, by whoever would end it
        self._holds = 0
        self._pending: int | None = None
        self._at_steps = False
        self._insists = False
        self._reacted = False
        self._ended = threading.Event()

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Take the signals over inside the `with` block. One inside another, or in another thread, does nothing."""
        if self._before or threading.current_thread() is not threading.main_thread():
            yield
            return
        self._pending, self._insists, self._at_steps = None, False, False
        self._ended.clear()
        this = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _forget(this()))
        try:
            for number in SIGNALS:
                if signal.getsignal(number) in _ENDS_THE_PROCESS:
                    self._before[number] = signal.signal(number, self._handle)
            with self._watched():
                yield
        finally:
            self._put_back()

    @contextmanager
    def held(self) -> Iterator[None]:
        """A signal that comes inside the `with` block is raised at its end."""
        with self._lock:
            self._holds += 1
            self._at_steps = False
            try:
                yield
            finally:
                self._holds -= 1
        self.check()

    def step(self) -> None:
        """Between two batches: raise what has come; what comes from now on is raised at the next."""
        self._at_steps = True
        self.check()

    def check(self) -> None:
        """Raise what has come."""
        if self._pending is not None and not self._holds and not self._ended.is_set():
            raise KeyboardInterrupt if self._pending == signal.SIGINT else EndedBySignal(self._pending)

    @contextmanager
    def ending(self) -> Iterator[None]:
        """From here on a signal only says that the process is ending: what is written in the block is complete."""
        self._ended.set()
        with self._lock:
            yield

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._ended.is_set():
            with suppress(OSError):
                # Not print: the signal may have come in the middle of one.
                os.write(2, _already(number).encode())
            return
        self._pending, self._reacted = number, True
        if self._insists or not self._at_steps:
            self.check()

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """The watcher hears of signals even while the main thread is in native code: Python's C handler tells it."""
        heard, told = socket.socketpair()
        told.setblocking(False)
        before = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)
        if before != -1:  # somebody else listens there: leave it to him, and raise at once
            signal.set_wakeup_fd(before)
            self._insists = True
        watcher = threading.Thread(target=self._watch, args=(heard,), name="sl-signals", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            if before == -1:
                signal.set_wakeup_fd(-1)
            self._ended.set()
            told.setblocking(True)
            told.sendall(_STOP)
            watcher.join()
            heard.close()
            told.close()

    def _watch(self, heard: socket.socket) -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the main thread's calls should be interrupted, not ours
        while (number := heard.recv(1)[0]) != _STOP[0]:
            if number not in self._before or self._ended.wait(self._step_patience_s):
                continue
            self._insists, self._reacted = True, False
            signal.pthread_kill(threading.main_thread().ident or 0, number)
            while not self._ended.wait(self._native_patience_s) and not self._reacted:
                if self._lock.acquire(blocking=False):
                    self._on_stuck(signal.Signals(number).name)
                    os._exit(128 + number)

    def _put_back(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()


def _forget(interrupts: Interrupts | None) -> None:
    """A child that was forked is nobody's training: signals do to it what they did before."""
    if interrupts is not None and interrupts._before:
        signal.set_wakeup_fd(-1)
        interrupts._put_back()


def _already(number: int) -> str:
    name = signal.Signals(number).name
    return f"SafeLoader: {name} again: this process ends once the checkpoint is written (SIGKILL ends it at once)\n"
