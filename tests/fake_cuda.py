"""A GPU without one: it reads what is copied from pinned memory when the test lets a copy end, and not before.

Every copy checks at its end that the memory is still registered and that what it reads is what was there when the copy
was asked for. So a slot that is written, or memory that is unregistered, while a copy is running, is found.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from safeloader.ring.cuda_driver import CAPTURE_UNSUPPORTED, CudaError

_SLOW_S = 0.02


@dataclass(frozen=True)
class Copy:
    """One copy to the GPU that has been asked for."""

    address: int
    expected: bytes


class FakeCuda:
    """A driver for `Pinning`. What it finds wrong is in `wrong`, and raised by `check`.

    Attributes:
        registered: sizes by address. copies: those that have not ended, by number.
        capturing_here: the calling thread is capturing. capturing_elsewhere: another one is.
        failing: calls that fail, and with which code.
    """

    def __init__(self, *, blocking: bool = False) -> None:
        self.registered: dict[int, int] = {}
        self.calls: list[str] = []
        self.copies: dict[int, Copy] = {}
        self.ended = 0
        self.capturing_here = self.capturing_elsewhere = False
        self.captures_broken = 0
        self.failing: dict[str, int] = {}
        self.wrong: list[str] = []
        self.threads: set[str] = set()  # that waited
        self._recorded: list[frozenset[int]] = []  # and not waited for
        self._pid = os.getpid()
        self._called_in_child = mmap.mmap(-1, 1)
        self._numbers = itertools.count()
        self._blocking = blocking
        self._changed = threading.Condition(threading.RLock())

    def start(self) -> FakeCuda:
        self._call("start")
        return self

    @contextlib.contextmanager
    def running(self, lag: int, seed: int) -> Iterator[None]:
        """Let copies end in any order, in a thread: at once while there are more than `lag`, else slowly."""
        rng, going = random.Random(seed), True

        def run() -> None:
            with self._changed:
                while going or self.copies:
                    self._changed.wait_for(lambda: not going or len(self.copies) > lag, timeout=_SLOW_S)
                    if self.copies:
                        self.finish(rng.choice(list(self.copies)))

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield
        finally:
            with self._changed:
                going = False
                self._changed.notify_all()
            thread.join()

    # ---- what the test does ----

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return self._range_of(tensor.data_ptr()) is not None

    def copy(self, tensor: torch.Tensor) -> int:
        """Ask for a copy of a tensor that lies in one piece."""
        address, nbytes = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        with self._changed:
            number = next(self._numbers)
            self.copies[number] = Copy(address, ctypes.string_at(address, nbytes))
            self._changed.notify_all()
            return number

    def finish(self, number: int) -> None:
        """Let a copy end; only now it reads."""
        with self._changed:
            copy = self.copies.pop(number)
            if self._range_of(copy.address) is None:
                self._say(f"copy {number} reads memory that is not registered")
            elif ctypes.string_at(copy.address, len(copy.expected)) != copy.expected:
                self._say(f"copy {number} reads what was written after it was asked for")
            self.ended += 1
            self._changed.notify_all()

    def finish_all(self) -> None:
        for number in list(self.copies):
            self.finish(number)

    @property
    def next_is_done(self) -> bool:
        """Whether `wait` for what was recorded first would return at once."""
        return not self._recorded or not self._recorded[0] & self.copies.keys()

    def check(self) -> None:
        assert self.wrong == []
        assert self._called_in_child[:] == b"\0", "a forked child has called the driver"

    # ---- what pinning does ----

    def capturing(self) -> bool:
        return self.capturing_here

    def register(self, address: int, nbytes: int) -> None:
        self._call("register")
        with self._changed:
            for other, size in self.registered.items():
                if address < other + size and other < address + nbytes:
                    self._say(f"{address:#x} is registered already")
            self.registered[address] = nbytes

    def unregister(self, address: int) -> None:
        self._call("unregister")
        with self._changed:
            nbytes = self.registered.pop(address, None)
            if nbytes is None:
                self._say(f"{address:#x} is not registered")
                return
            ctypes.string_at(address, nbytes)  # still mapped, or this ends the process
            if any(address <= copy.address < address + nbytes for copy in self.copies.values()):
                self._say(f"{address:#x} is unregistered while a copy is running")

    def record(self) -> list[frozenset[int]]:
        self._call("record")
        if self.capturing_here or self.capturing_elsewhere:
            self.captures_broken += 1
            raise CudaError("record", CAPTURE_UNSUPPORTED, "CAPTURE")
        with self._changed:
            self._recorded.append(frozenset(self.copies))
            return [self._recorded[-1]]

    def wait(self, marks: list[frozenset[int]]) -> None:
        self._call("wait")
        with self._changed:
            self._wait_for(lambda: not marks[0] & self.copies.keys())
            self._recorded.remove(marks[0])

    def wait_idle(self) -> None:
        self._call("wait_idle")
        with self._changed:
            self._wait_for(lambda: not self.copies)

    def _wait_for(self, condition: Callable[[], bool]) -> None:
        self.threads.add(threading.current_thread().name)
        if self._blocking:
            self._changed.wait_for(condition)
        elif not condition():
            self._say("waited for a copy that has not ended")

    def _call(self, name: str) -> None:
        if os.getpid() != self._pid:
            self._called_in_child[0] = 1
        self.calls.append(name)
        if name in self.failing:
            raise CudaError(name, self.failing[name], "CUDA_ERROR")

    def _range_of(self, address: int) -> int | None:
        ranges = list(self.registered.items())
        return next((start for start, nbytes in ranges if start <= address < start + nbytes), None)

    def _say(self, what: str) -> None:
        self.wrong.append(what)
