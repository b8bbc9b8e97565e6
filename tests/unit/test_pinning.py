"""Slots as pinned memory: no slot is written, and none unregistered, while a copy from it may be running."""

from __future__ import annotations

import ctypes
import gc
import itertools
import logging
import os
import re
import threading
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from safeloader.config import Pin, resolve
from safeloader.pool import events
from safeloader.pool.consumer import Consumer
from safeloader.pool.slots import Slots, SlotState
from safeloader.ring import codec, cuda_driver
from safeloader.ring.cuda_driver import (
    CAPTURE_UNSUPPORTED,
    CudaDriver,
    CudaError,
    NoDeviceError,
    UnavailableError,
)
from safeloader.ring.memfile import MemoryFile
from safeloader.ring.pinning import Pinning
from safeloader.testing import wait_until
from tests.fake_cuda import FakeCuda

SMALL, LARGE = 8 << 10, 2 << 20
"""Bytes of a batch: both lie in the slot, and the second does not fit a slot that was made for the first."""


class Ring:
    """The consumer's side of a pool, with the slots' books; the test is worker, supervisor, training loop and GPU."""

    def __init__(self, slots: int, max_leases: int, *, threaded: bool = False) -> None:
        self.cuda = FakeCuda(blocking=threaded)
        self.pinning = Pinning(self.cuda.start, threaded=threaded)
        self.threaded = threaded
        self.consumer = Consumer("test", 0, max_leases, slow_s=60, pinning=self.pinning)
        self.consumer.wake = lambda: None
        self.slots = Slots(slots)
        self.files: dict[int, MemoryFile] = {}
        self.tickets = itertools.count()

    def _hear(self) -> None:
        for event in self.consumer.news():
            if isinstance(event, events.Taken):
                self.slots.taken(event.ticket)
            else:
                self.slots.released(event.slot)

    def fill(self, nbytes: int = SMALL) -> int | None:
        """What a worker does with a free slot, if there is one."""
        obtained = self.slots.obtain()
        if obtained is None:
            return None
        slot, is_new = obtained
        if is_new:
            self.files[slot] = MemoryFile.create(f"safeloader-slot-{slot}")
        ticket = next(self.tickets)
        self.slots.fill(slot, 0, ticket)
        tensor = torch.full((4, nbytes // 4), ticket % 251, dtype=torch.uint8)
        codec.encode({"data": tensor, "tiny": torch.tensor([ticket])}, self.files[slot], ticket, by_value=False)
        self.slots.ready(slot, ticket)
        self.consumer.put(ticket, slot, self.files[slot], failed=False)
        return slot

    def take(self) -> Any:
        ticket = self.consumer.next_ticket
        batch = self.consumer.take()
        self._hear()
        assert int(batch["tiny"]) == ticket
        assert (batch["data"] == ticket % 251).all()
        return batch

    def settle(self) -> None:
        """What the thread does as long as it need not wait, and then the supervisor."""
        while not self.threaded and self.pinning.pending and self.cuda.next_is_done:
            self.pinning.attend()
        self._hear()

    def states(self) -> dict[str, int]:
        return {state.name: count for state, count in self.slots.counts().items() if count}

    def close(self) -> None:
        """The pool ends as `Pool.dispose` and `PoolRunner._end_pool` end it."""
        for file in self.files.values():
            file.close()
        self.consumer.slots_closed()
        self.consumer.drop()
        self.pinning.fence()
        self.settle()


class AnyOrder(RuleBasedStateMachine):
    """Whatever the loop keeps, copies and drops, and however late the GPU is."""

    def __init__(self) -> None:
        super().__init__()
        self.ring = Ring(slots=4, max_leases=2)
        self.held: list[torch.Tensor] = []
        self.slots_of_copies: dict[int, int] = {}
        self.closed_under_copies = False

    @initialize(closed=st.booleans())
    def how_it_ends(self, closed: bool) -> None:
        self.closed_under_copies = closed

    @rule(nbytes=st.sampled_from([SMALL, SMALL, LARGE]))
    def a_worker_makes_a_batch(self, nbytes: int) -> None:
        slot = self.ring.fill(nbytes)
        assert slot not in self._copying_from(), "a slot that a copy is reading was filled"

    @rule()
    @precondition(lambda self: self.ring.consumer.ready)
    def next_batch(self) -> None:
        self.held.append(self.ring.take()["data"])

    @rule(at=st.integers(0), row=st.integers(0, 3))
    @precondition(lambda self: self.held)
    def copy(self, at: int, row: int) -> None:
        tensor = self.held[at % len(self.held)]
        part = tensor[row % len(tensor)]
        if self.ring.cuda.is_pinned(part):  # otherwise the copy has ended when it returns
            self.slots_of_copies[self.ring.cuda.copy(part)] = self._slot_of(part)

    @rule(at=st.integers(0), view=st.booleans())
    @precondition(lambda self: self.held)
    def let_go(self, at: int, view: bool) -> None:
        tensor = self.held.pop(at % len(self.held))
        if view:
            self.held.append(tensor[-1:].view(torch.int32))

    @rule(at=st.integers(0))
    @precondition(lambda self: self.ring.cuda.copies)
    def a_copy_ends(self, at: int) -> None:
        self.ring.cuda.finish(list(self.ring.cuda.copies)[at % len(self.ring.cuda.copies)])

    @rule()
    def the_thread_works(self) -> None:
        self.ring.settle()

    @rule()
    def a_capture_begins_or_ends(self) -> None:
        self.ring.cuda.capturing_here = not self.ring.cuda.capturing_here

    @invariant()
    def nothing_is_written_that_is_read(self) -> None:
        self.ring.cuda.check()
        assert self.ring.cuda.captures_broken == 0
        for slot in self._copying_from():
            assert self.ring.slots[slot].state is SlotState.LEASED

    def _copying_from(self) -> set[int]:
        return {self.slots_of_copies[number] for number in self.ring.cuda.copies}

    def _slot_of(self, tensor: torch.Tensor) -> int:
        for slot, file in self.ring.files.items():
            start = ctypes.addressof(ctypes.c_char.from_buffer(file.map()))
            if start <= tensor.data_ptr() < start + len(file.map()):
                return slot
        raise AssertionError("pinned, and in no slot's latest mapping")

    def teardown(self) -> None:
        ring, cuda = self.ring, self.ring.cuda
        self.held.clear()
        cuda.capturing_here = False
        ring.consumer.drop()
        ring.pinning.fence()
        if self.closed_under_copies:
            ring.close()
        cuda.finish_all()
        ring.settle()
        assert set(ring.states()) <= {"FREE"}, "every slot comes back"
        ring.close()
        cuda.check()
        assert cuda.registered == {}
        assert cuda.calls.count("register") == cuda.calls.count("unregister")


AnyOrder.TestCase.settings = settings(
    max_examples=int(os.environ.get("SAFELOADER_EXAMPLES", "150")), stateful_step_count=60, deadline=None
)
TestAnyOrder = AnyOrder.TestCase


# ---- one after the other ----


@pytest.fixture
def ring() -> Any:
    made = Ring(slots=4, max_leases=2)
    yield made
    made.cuda.finish_all()
    made.close()
    made.cuda.check()
    made.__dict__.clear()  # pytest holds the ring itself until descriptors are counted


def test_a_slot_comes_back_when_its_copies_have_ended(ring: Ring) -> None:
    ring.fill()
    batch = ring.take()
    assert ring.cuda.is_pinned(batch["data"]) and not ring.cuda.is_pinned(batch["tiny"])
    number = ring.cuda.copy(batch["data"])
    del batch
    ring.settle()
    assert ring.states() == {"LEASED": 1}, "no fence was recorded yet"
    ring.pinning.fence()
    ring.settle()
    assert ring.states() == {"LEASED": 1}, "the copy is running"
    ring.cuda.finish(number)
    ring.settle()
    assert ring.states() == {"FREE": 1}


def test_a_mapping_is_registered_once(ring: Ring) -> None:
    for _ in range(10):
        ring.fill()
        ring.take()
        ring.pinning.fence()
        ring.settle()
    assert ring.cuda.calls.count("register") == 1
    assert ring.cuda.calls.count("record") == 10


def test_a_batch_that_nobody_takes_needs_neither_registration_nor_fence(ring: Ring) -> None:
    ring.fill()
    ring.consumer.drop()
    ring.settle()
    assert ring.states() == {"FREE": 1}
    assert ring.cuda.calls == []


def test_a_slot_that_has_grown_is_registered_anew(ring: Ring) -> None:
    ring.fill(SMALL)
    ring.take()
    ring.pinning.fence()
    ring.settle()
    before = dict(ring.cuda.registered)
    ring.fill(LARGE)
    batch = ring.take()
    assert ring.cuda.is_pinned(batch["data"])
    assert len(ring.cuda.registered) == 2
    ring.settle()
    assert len(ring.cuda.registered) == 1 and ring.cuda.registered != before


def test_a_slot_that_has_grown_gives_its_old_mapping_back_while_others_come_and_go(ring: Ring) -> None:
    for _ in range(2):
        ring.fill(SMALL)
    first, second = ring.take(), ring.take()
    del first
    ring.pinning.fence()
    ring.settle()
    ring.fill(LARGE)
    del second  # so the next fence is for this one's slot
    batch = ring.take()
    assert ring.cuda.is_pinned(batch["data"])
    assert len(ring.cuda.registered) == 3
    ring.settle()
    assert len(ring.cuda.registered) == 2


def test_what_is_held_at_the_end_stays_registered_until_it_is_let_go(ring: Ring) -> None:
    ring.fill()
    batch = ring.take()
    ring.close()
    number = ring.cuda.copy(batch["data"])
    del batch
    ring.pinning.fence()
    ring.settle()
    assert len(ring.cuda.registered) == 1
    ring.cuda.finish(number)
    ring.settle()
    assert ring.cuda.registered == {}


def test_a_batch_that_is_taken_after_the_end_is_a_copy(ring: Ring) -> None:
    ring.fill()
    ring.take()
    ring.pinning.fence()
    ring.settle()
    ring.fill()
    for file in ring.files.values():
        file.close()
    ring.consumer.slots_closed()
    assert not ring.cuda.is_pinned(ring.take()["data"])


def test_a_hoarder_gets_copies_and_one_who_only_copies_to_the_gpu_does_not(ring: Ring) -> None:
    for _ in range(3):
        ring.fill()
    first, second, third = ring.take(), ring.take(), ring.take()
    assert [ring.cuda.is_pinned(batch["data"]) for batch in (first, second, third)] == [True, True, False]
    del first, second, third
    ring.pinning.fence()
    ring.settle()
    pinned = []
    for _ in range(4):
        ring.fill()
        batch = ring.take()
        pinned.append(ring.cuda.is_pinned(batch["data"]))
        if pinned[-1]:
            ring.cuda.copy(batch["data"])
        del batch
    assert pinned == [True] * 4


# ---- captures ----


def test_while_the_thread_captures_nothing_is_recorded_or_registered(ring: Ring) -> None:
    ring.fill()
    ring.take()
    ring.cuda.capturing_here = True
    ring.fill()
    assert not ring.cuda.is_pinned(ring.take()["data"]), "its mapping is new"
    assert "record" not in ring.cuda.calls
    ring.cuda.capturing_here = False
    ring.pinning.fence()
    ring.settle()
    assert ring.states() == {"FREE": 2}


def test_a_capture_that_was_not_seen_is_broken_once(ring: Ring, caplog: pytest.LogCaptureFixture) -> None:
    ring.fill()
    ring.take()
    ring.cuda.capturing_elsewhere = True
    ring.pinning.fence()
    ring.settle()
    assert ring.states() == {"LEASED": 1}
    ring.cuda.capturing_elsewhere = False
    ring.fill()
    assert not ring.cuda.is_pinned(ring.take()["data"])
    ring.settle()
    assert ring.states() == {"FREE": 2}
    ring.fill()
    ring.take()
    ring.pinning.fence()
    assert ring.cuda.captures_broken == 1
    assert [record.getMessage() for record in caplog.records] == [
        "SafeLoader: from here on, slots are not registered with CUDA (pin=register): what the GPU is doing can't be "
        "recorded: record says CAPTURE (900). It goes on as with pin=copy, with the same batches and a copy of each; "
        "set pin=copy if this is to stay so."
    ]


# ---- what can fail ----


@pytest.mark.parametrize(("error", "lines"), [(UnavailableError, 1), (NoDeviceError, 0)])
def test_without_cuda_nothing_is_lent(
    error: type[UnavailableError], lines: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A driver that can't do it is worth a line; without a GPU, nobody expects pinned memory."""
    ring = Ring(slots=4, max_leases=2)
    asked = []

    def start() -> FakeCuda:
        asked.append(1)
        raise error("there is none")

    ring.pinning._start = start
    for _ in range(3):
        ring.fill()
        ring.take()
        ring.settle()
    ring.close()
    assert ring.cuda.calls == [] and len(asked) == 1
    assert len(caplog.records) == lines
    assert all("(pin=register): there is none." in record.getMessage() for record in caplog.records)


def test_when_registering_fails_what_is_registered_is_still_fenced(
    ring: Ring, caplog: pytest.LogCaptureFixture
) -> None:
    ring.fill()
    first = ring.take()
    ring.cuda.failing["register"] = 712
    ring.fill()
    second = ring.take()
    assert ring.cuda.is_pinned(first["data"]) and not ring.cuda.is_pinned(second["data"])
    number = ring.cuda.copy(first["data"])
    del first, second
    ring.pinning.fence()
    ring.settle()
    assert ring.states() == {"FREE": 1, "LEASED": 1}
    ring.cuda.finish(number)
    ring.settle()
    assert ring.states() == {"FREE": 2}
    del ring.cuda.failing["register"]
    for _ in range(2):
        ring.fill()
    ring.take(), ring.take()
    assert ring.cuda.calls.count("register") == 2, "no third try"
    assert len(caplog.records) == 1
    assert "1 MiB of memory can't be registered: register says CUDA_ERROR (712)" in caplog.text


def test_if_nothing_can_be_recorded_the_devices_are_waited_for(ring: Ring) -> None:
    ring.cuda.failing["record"] = 801
    ring.fill()
    number = ring.cuda.copy(ring.take()["data"])
    ring.pinning.fence()
    assert ring.states() == {"LEASED": 1}
    ring.cuda.finish(number)
    ring.settle()
    assert ring.states() == {"FREE": 1} and "wait_idle" in ring.cuda.calls


def test_if_idleness_can_not_be_waited_for_because_of_a_capture_the_next_fence_tries_again(ring: Ring) -> None:
    ring.cuda.failing = {"record": 801, "wait_idle": CAPTURE_UNSUPPORTED}
    ring.fill()
    ring.take()
    ring.pinning.fence()
    ring.settle()
    assert ring.states() == {"LEASED": 1}
    ring.cuda.failing.clear()
    ring.pinning.fence()
    ring.settle()
    assert ring.states() == {"FREE": 1}


@pytest.mark.parametrize("failing", [{"wait"}, {"record", "wait_idle"}, {"record", "wait_idle", "unregister"}])
def test_a_broken_context_gives_its_slots_back(ring: Ring, failing: set[str], caplog: pytest.LogCaptureFixture) -> None:
    ring.fill()
    ring.take()
    ring.cuda.failing = dict.fromkeys(failing, 700)
    ring.pinning.fence()
    ring.settle()
    assert ring.states() == {"FREE": 1}
    ring.fill()
    ring.take()
    ring.settle()
    ring.close()
    assert len(caplog.records) == 1 and "(700)" in caplog.text
    assert len(ring.cuda.registered) == len(ring.pinning._stuck) == ("unregister" in failing)
    ring.pinning._stuck.clear()


def test_an_unregister_that_fails_leaves_the_memory_mapped(ring: Ring, caplog: pytest.LogCaptureFixture) -> None:
    ring.fill()
    ring.take()
    ring.cuda.failing["unregister"] = 4
    ring.close()
    (address,) = ring.cuda.registered
    gc.collect()
    ctypes.string_at(address, 1 << 20)  # still mapped, or this ends the process
    assert "memory can't be unregistered: unregister says CUDA_ERROR (4)" in caplog.text
    del ring.cuda.failing["unregister"]
    ring.pinning._stuck.clear()


def test_an_interrupted_take_is_taken_again(ring: Ring, monkeypatch: pytest.MonkeyPatch) -> None:
    ring.fill()
    with monkeypatch.context() as patch:
        patch.setattr(codec, "decode", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            ring.take()
    batch = ring.take()
    number = ring.cuda.copy(batch["data"])
    del batch
    ring.pinning.fence()
    ring.settle()
    assert ring.states() == {"LEASED": 1}
    ring.cuda.finish(number)
    ring.settle()
    assert ring.states() == {"FREE": 1}


def _interrupted(*_: Any) -> None:
    raise KeyboardInterrupt


def test_a_thread_that_can_not_be_started_is_started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    ring = Ring(slots=4, max_leases=2, threaded=True)
    ring.fill()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", _no_more_threads)
        ring.take()
        ring.pinning.fence()
    ring.settle()
    assert ring.states() == {"LEASED": 1}
    ring.fill()
    ring.take()
    wait_until(lambda: ring.settle() or ring.states() == {"FREE": 1, "LEASED": 1})  # type: ignore[func-returns-value]
    ring.close()
    wait_until(lambda: not ring.cuda.registered)
    ring.cuda.check()


def _no_more_threads(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


def test_a_forked_child_uses_nothing_of_cuda(ring: Ring) -> None:
    ring.fill()
    batch = ring.take()
    before = len(ring.cuda.calls)
    pid = os.fork()
    if pid == 0:
        del batch
        gc.collect()
        ring.pinning.fence()
        ring.pinning.end()
        os._exit(0 if len(ring.cuda.calls) == before else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_the_option() -> None:
    assert resolve({}, {}).pin is Pin.REGISTER
    assert resolve({}, {"SAFELOADER_PIN": "copy"}).pin is Pin.COPY


# ---- the driver, over a library that only keeps books ----


class Library:
    """What `ctypes.CDLL("libcuda.so.1")` would be: two devices, of which the second one has no primary context."""

    def __init__(self, *missing: str) -> None:
        self.calls: list[tuple[str, int | None, int]] = []  # with the context and the mode at that moment
        self.context: int | None = 77
        self.mode = 0
        self.active = {0: True, 1: False}
        self.failing: dict[str, int] = {}
        self.events = itertools.count(500)
        self.answers: dict[str, Callable[..., None]] = {
            "cuDeviceGetCount": self._count_devices,
            "cuDeviceGet": self._device,
            "cuDevicePrimaryCtxGetState": self._state,
            "cuDevicePrimaryCtxRetain": self._retain,
            "cuCtxGetCurrent": self._get_current,
            "cuCtxSetCurrent": self._set_current,
            "cuThreadExchangeStreamCaptureMode": self._exchange_mode,
            "cuEventCreate": self._make_event,
            "cuGetErrorName": self._name_error,
        }
        for name in cuda_driver._FUNCTIONS:
            if name not in missing:
                setattr(self, name, _Function(self, name))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"libcuda.so.1: undefined symbol: {name}")

    def called(self, name: str, *arguments: Any) -> int:
        self.calls.append((name, self.context, self.mode))
        if name in self.failing:
            return self.failing[name]
        if name in self.answers:
            self.answers[name](*arguments)
        return 0

    def _count_devices(self, count: Any) -> None:
        count._obj.value = 2

    def _device(self, device: Any, ordinal: int) -> None:
        device._obj.value = ordinal

    def _state(self, device: int, flags: Any, active: Any) -> None:
        active._obj.value = self.active[device]

    def _retain(self, context: Any, device: int) -> None:
        context._obj.value = 1000 + device

    def _get_current(self, context: Any) -> None:
        context._obj.value = self.context

    def _set_current(self, context: Any) -> None:
        self.context = getattr(context, "value", context)

    def _exchange_mode(self, mode: Any) -> None:
        mode._obj.value, self.mode = self.mode, mode._obj.value

    def _make_event(self, event: Any, flags: int) -> None:
        assert flags == 3
        event._obj.value = next(self.events)

    def _name_error(self, code: int, name: Any) -> None:
        name._obj.value = b"CUDA_ERROR_TEST"

    def under(self, name: str) -> list[tuple[int | None, int]]:
        return [(context, mode) for called, context, mode in self.calls if called == name]


class _Function:
    def __init__(self, library: Library, name: str) -> None:
        self.library, self.name = library, name

    def __call__(self, *arguments: Any) -> int:
        return self.library.called(self.name, *arguments)


def test_every_call_leaves_the_thread_as_it_was() -> None:
    library = Library()
    driver = CudaDriver(library)
    driver.register(0x1000, 4096)
    driver.wait(driver.record())
    driver.wait_idle()
    driver.unregister(0x1000)
    assert (library.context, library.mode) == (77, 0)
    names = "cuMemHostRegister_v2 cuMemHostUnregister cuCtxRecordEvent cuEventSynchronize cuCtxSynchronize"
    for name in names.split():
        assert library.under(name) == [(1000, 2)], "in a primary context, and relaxed"


def test_only_devices_that_are_used_are_recorded_and_events_are_used_again() -> None:
    library = Library()
    driver = CudaDriver(library)
    assert [mark.device for mark in driver.record()] == [0]
    library.active[1] = True
    marks = driver.record()
    assert [mark.device for mark in marks] == [0, 1]
    driver.wait(marks)
    assert {mark.event for mark in driver.record()} == {mark.event for mark in marks}
    assert len(library.under("cuEventCreate")) == 3
    assert len(library.under("cuDevicePrimaryCtxRetain")) == 2


def test_a_failed_call_says_which_and_leaves_the_thread_as_it_was() -> None:
    library = Library()
    driver = CudaDriver(library)
    library.failing = {"cuMemHostRegister_v2": 712, "cuCtxRecordEvent": CAPTURE_UNSUPPORTED, "cuEventSynchronize": 700}
    with pytest.raises(CudaError, match=re.escape("cuMemHostRegister_v2 says CUDA_ERROR_TEST (712)")):
        driver.register(0x1000, 4096)
    with pytest.raises(CudaError) as raised:
        driver.record()
    assert raised.value.code == CAPTURE_UNSUPPORTED
    del library.failing["cuCtxRecordEvent"]
    with pytest.raises(CudaError):
        driver.wait(driver.record())
    assert len(library.under("cuEventCreate")) == 1, "the event that was not recorded is used again"
    assert (library.context, library.mode) == (77, 0)


def test_memory_that_an_interrupt_kept_from_being_registered_is_none_the_worse() -> None:
    library = Library()
    driver = CudaDriver(library)
    library.failing = {"cuMemHostUnregister": 713}
    driver.unregister(0x1000)
    library.failing = {"cuMemHostUnregister": 4}
    with pytest.raises(CudaError):
        driver.unregister(0x1000)


def test_no_context_is_made_where_there_is_none() -> None:
    library = Library()
    library.active[0] = False
    with pytest.raises(UnavailableError, match="no device has a primary context"):
        CudaDriver(library)
    assert library.under("cuDevicePrimaryCtxRetain") == []


@pytest.mark.parametrize(
    ("library", "message"),
    [
        (OSError("libcuda.so.1: cannot open shared object file"), "CUDA's driver library can't be loaded: libcuda"),
        (Library("cuCtxRecordEvent"), "older than CUDA 12.5: .* undefined symbol: cuCtxRecordEvent; update it"),
    ],
)
def test_what_is_missing_is_named(library: Library | OSError, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        if isinstance(library, OSError):
            raise library
        return library

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(ctypes, "CDLL", load)
    with pytest.raises(UnavailableError, match=message):
        cuda_driver.start()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens on a machine without a GPU")
def test_without_a_gpu_there_is_no_driver() -> None:
    with pytest.raises(UnavailableError, match="torch finds no CUDA device"):
        cuda_driver.start()


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "safeloader")
