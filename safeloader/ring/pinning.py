"""Slots as pinned memory: registered with CUDA once, instead of copied into pinned memory with every batch.

    take()                            the training loop           take()                the thread "safeloader-pinning"
    lend ──► the batch's tensors ──► copies, non_blocking ──►┐    fence ──► messages ──► waits for the GPU
      │      are views on the slot   last view gone ─────────┴──►  │                     lets the slot's memory go
      └ registers the mapping, once                                └ cuCtxRecordEvent    unregisters what is closed

A copy to the GPU that was asked for with `non_blocking=True` reads the slot after the batch is gone, on a stream that
nobody here knows. So a batch in a registered slot is a *loan*: the loop gets views on a view, whose end is seen here,
and the slot's own lease is held on to until no copy can be running. For `pool/consumer.py` and the machine a copy
is one more holder of the slot's memory, and nothing else changes.

**How it is known that no copy is running.** PyTorch holds a tensor while it hands a copy from it to the driver; so when
the last view has gone, every copy has been handed over. `cuCtxRecordEvent` then records all that a context has been
asked to do until now, on all of its streams, in an event. Once the events of all devices' primary contexts have
happened, the copies are over. (Not seen: contexts of the user's own, which torch does not use, and a graph that
copies from a batch and is replayed when the batch is gone, which is an error without SafeLoader as well.)

**Why in `take()`.** Recording breaks a capture of a CUDA graph that is running on *any* stream of the context, and
nothing tells whether one is. A loop that calls `next()` is not in the middle of one, and if it is, torch says so for
the current stream, and the fence waits for the next call. So fences are recorded when a batch is taken and when an
augmenter is closed, and nowhere else; a slot comes back one batch later than it could. Who captures in one thread
while another one takes batches must stay with `pin="copy"`.

What is registered stays mapped. A mapping is unregistered when its slot has grown or is closed, and no loan is left on
it; what a user still holds when the last pool is closed, with the next `take()` or `close()` of any augmenter, or by
the end of the process.

If the driver refuses anything, batches are copied into pinned memory from then on, and one line says why. What is
registered by then stays under the same rule. If a fence can't be recorded, the thread waits until the devices are
idle; and if waiting fails, the context is broken or gone: nobody can read there what a copy has written, so the slot is
let go, and the training gets the same error from torch.
"""

from __future__ import annotations

import atexit
import functools
import logging
import mmap
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

import numpy as np

from safeloader.ring import codec, cuda_driver
from safeloader.ring.cuda_driver import CudaError, NoDeviceError, UnavailableError
from safeloader.ring.lease import Lease
from safeloader.ring.memfile import MemoryFile

logger = logging.getLogger("safeloader")

_AT_EXIT_S: Final = 5.0
"""How long a trainer that ends waits for its copies; CUDA must not be taken down under a thread that uses it."""


class Driver(Protocol):
    """What is needed of CUDA; see `cuda_driver.CudaDriver`. Marks are its own business."""

    def capturing(self) -> bool:
        """Whether the calling thread is capturing a graph."""

    def register(self, address: int, nbytes: int) -> None:
        """Pin memory. May raise CudaError, as all that follow."""

    def unregister(self, address: int) -> None:
        """The reverse."""

    def record(self) -> Sequence[Any]:
        """Mark what all devices have been asked to do until now."""

    def wait(self, marks: Any) -> None:
        """Block until what is marked is done."""

    def wait_idle(self) -> None:
        """Block until all is done that has been asked for until now."""


class _Loan(weakref.ref[Any]):
    """A weak reference to what the training loop's views hold: dead when the last of them is gone.

    Attributes:
        memory: the slot's leased memory, held until no copy from it can be running. mapping: its registration.
        fenced: whether a fence that was recorded after its end is on its way.
    """

    __slots__ = ("fenced", "mapping", "memory")

    memory: memoryview
    mapping: int
    fenced: bool


@dataclass(frozen=True)
class _Registration:
    file: MemoryFile
    mapping: mmap.mmap  # held: what is registered stays mapped
    address: int

    @property
    def closed(self) -> bool:
        return not self.file.maps(self.mapping)


@dataclass(frozen=True)
class _Fence:
    """Loans that have ended, and what to wait for; None is for the devices to be idle."""

    marks: Sequence[Any] | None
    loans: tuple[_Loan, ...]


class Pinning:
    """One process's. `lend`, `fence`: the threads that take batches. `look`: any thread; it waits for nothing.

    The thread lives while slots are registered that are in use, or a fence is to be waited for.

    Args:
        start: gives the driver when the first batch is lent.
        threaded: whether it makes its thread; otherwise somebody calls `attend` while there is something `pending`.
    """

    def __init__(self, start: Callable[[], Driver] = cuda_driver.start, *, threaded: bool = True) -> None:
        self._start = start
        self._threaded = threaded
        self._driver: Driver | None = None
        self._given_up: str | None = None
        self._pid = os.getpid()
        self._books = threading.Lock()  # of the two books; the supervisor's thread never takes it
        self._registered: dict[int, _Registration] = {}  # by their mappings' ids
        self._loans: dict[int, _Loan] = {}  # by their own; all whose memory is still held
        self._stuck: list[_Registration] = []  # could not be unregistered: mapped as long as the process lives
        self._messages: queue.SimpleQueue[_Fence | None] = queue.SimpleQueue()  # None: look what is closed
        self._thread: threading.Thread | None = None
        self._exiting = False

    # ---- the threads that take batches ----

    def lend(self, file: MemoryFile, mapping: mmap.mmap, lease: Lease, memory: memoryview) -> memoryview:
        """What to decode a batch from: `memory` itself, a loan on it if it is pinned, or a copy of it.

        Args:
            file: the slot.
            mapping: the one that holds the batch.
            lease: on that mapping; learns of the loan.
            memory: the leased view on it.
        """
        with self._books:
            if not file.maps(mapping):  # its pool has ended; whether it is registered may change at any moment
                return codec.private_copy(memory)
            if id(mapping) not in self._registered and not self._register(file, mapping):
                return memory
            root = np.frombuffer(memory, dtype=np.uint8)
            loan = _Loan(root)
            loan.memory, loan.mapping, loan.fenced = memory, id(mapping), False
            self._loans[id(loan)] = loan  # from here on, an interrupt (Ctrl-C) ends the loan as the user would
            lease.user = weakref.ref(root)
            return root.data

    def fence(self) -> None:
        """See to it that the slots of the loans that have ended come back, once no copy from them can be running."""
        if os.getpid() != self._pid:
            return
        with self._books:
            ended = tuple(loan for loan in self._loans.values() if loan() is None and not loan.fenced)
            if ended:
                self._fence(ended)
            elif self._unused(self._registered):
                self._post(None)

    # ---- any thread ----

    def look(self) -> None:
        """Slots were closed: unregister them as soon as nobody uses them."""
        if self._thread is not None or not self._threaded:
            self._messages.put(None)

    # ---- its own thread ----

    def attend(self) -> bool:
        """Work off one message, or wait for it; False when there is nothing left to wait for."""
        return self._work_off(self._messages.get())

    @property
    def pending(self) -> bool:
        """Whether `attend` would not wait for a message."""
        return not self._messages.empty()

    def end(self, timeout_s: float = _AT_EXIT_S) -> None:
        """At the end of the process: wait for the thread, and start no other."""
        if os.getpid() != self._pid:
            return
        self._exiting = True
        thread = self._thread
        if thread is not None:
            self._messages.put(None)
            thread.join(timeout_s)

    # ---- below: `_books` is held ----

    def _register(self, file: MemoryFile, mapping: mmap.mmap) -> bool:
        driver = self._driver_now()
        if driver is None or driver.capturing():
            return False
        address = np.frombuffer(mapping, dtype=np.uint8).ctypes.data
        # First into the book: an interrupt in between must not leave memory that is pinned and not known to be.
        self._registered[id(mapping)] = _Registration(file, mapping, address)
        try:
            driver.register(address, len(mapping))
        except CudaError as error:
            del self._registered[id(mapping)]
            self._give_up(f"{len(mapping) >> 20} MiB of memory can't be registered: {error}")
            return False
        self._post(None)  # the slot's mapping before it, if it has grown
        return True

    def _driver_now(self) -> Driver | None:
        if self._driver is None and self._given_up is None:
            try:
                self._driver = self._start()
            except NoDeviceError as error:
                self._given_up = str(error)  # without a line: no copies are made instead either
            except UnavailableError as error:
                self._give_up(str(error))
        return self._driver if self._given_up is None else None

    def _fence(self, ended: tuple[_Loan, ...]) -> None:
        assert self._driver is not None, "there is a loan"
        if self._driver.capturing():
            return
        marks: Sequence[Any] | None = None
        try:
            marks = self._driver.record()
        except CudaError as error:
            self._give_up(f"what the GPU is doing can't be recorded: {error}")
            if error.code == cuda_driver.CAPTURE_UNSUPPORTED:
                return  # the next call tries again, when that capture is over
        self._post(_Fence(marks, ended))
        for loan in ended:  # after it was posted: twice does no harm, and never would
            loan.fenced = True

    def _post(self, message: _Fence | None) -> None:
        self._messages.put(message)
        self._ensure_thread()

    def _ensure_thread(self) -> None:
        if self._thread is not None or self._exiting or not self._threaded:
            return
        thread = threading.Thread(target=self._run, name="safeloader-pinning", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # a limit on pids is reached: at the next call
            return
        self._thread = thread

    def _unused(self, mappings: Iterable[int]) -> list[int]:
        """Which of these are closed, and not lent."""
        closed = [key for key in mappings if (known := self._registered.get(key)) is not None and known.closed]
        lent = {loan.mapping for loan in self._loans.values()} if closed else ()
        return [key for key in closed if key not in lent]

    # ---- below: its own thread ----

    def _run(self) -> None:
        while self.attend():
            pass

    def _work_off(self, message: _Fence | None) -> bool:
        if message is None:
            self._unregister_unused(self._registered)
        else:
            self._settle(message)
            self._unregister_unused({loan.mapping for loan in message.loans})
        with self._books:
            done = self._exiting or all(known.closed for known in self._registered.values())
            if done and not self.pending:
                self._thread = None
                return False
        return True

    def _settle(self, fence: _Fence) -> None:
        assert self._driver is not None, "it has recorded the fence"
        code, broken = 0, ""
        try:
            if fence.marks is None:
                self._driver.wait_idle()
            else:
                self._driver.wait(fence.marks)
        except CudaError as error:
            code, broken = error.code, str(error)
        if code == cuda_driver.CAPTURE_UNSUPPORTED:
            for loan in fence.loans:
                loan.fenced = False  # nothing is known: the next `fence` tries again
            return
        with self._books:
            for loan in fence.loans:
                self._loans.pop(id(loan), None)
        if broken:  # last: the log may stall
            self._give_up(f"waiting for the GPU failed: {broken}")

    def _unregister_unused(self, mappings: Iterable[int]) -> None:
        with self._books:
            gone = [self._registered.pop(key) for key in self._unused(mappings)]
        for known in gone:
            assert self._driver is not None, "it has registered this"
            try:
                self._driver.unregister(known.address)
            except CudaError as error:
                self._stuck.append(known)
                self._give_up(f"memory can't be unregistered: {error}")

    # ---- any of them ----

    def _give_up(self, reason: str) -> None:
        """Register nothing more; what is registered is treated as before."""
        if self._given_up is not None:
            return
        self._given_up = reason
        logger.warning(
            "SafeLoader: from here on, slots are not registered with CUDA (pin=register): %s. It goes on as with "
            "pin=copy, with the same batches and a copy of each; set pin=copy if this is to stay so.",
            reason,
        )


@functools.cache
def _of(_pid: int) -> Pinning:
    pinning = Pinning()
    atexit.register(pinning.end)
    return pinning


def of_process() -> Pinning:
    """This process's; it uses nothing of CUDA until a batch is lent."""
    return _of(os.getpid())
