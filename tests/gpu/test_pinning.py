"""Registered slots on a real card: every tensor is pinned, and no copy reads what came later.

Skipped without a GPU, and says so; nothing here depends on which card it is. What a copy has read is compared with what
the same seed gives without pinning.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import logging
import mmap
import os
import random
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from safeloader import SafeAugmenter, SafeMultiThreadedAugmenter
from safeloader.ring import cuda_driver, pinning
from safeloader.testing import Killer, wait_until
from tests.loaders import RandomLoader

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU on this machine"),
    pytest.mark.usefixtures("warm_nursery"),
]

SHAPE = (2, 1, 64, 64, 32)
"""1 MiB of float32."""
WORKERS, CACHED = 3, 3
LATE_CYCLES = 20_000_000
"""How long a kernel keeps a stream busy before the copy behind it begins: about 10 ms."""


class Growing:
    """Batches of 8 KiB to 8 MiB."""

    def __iter__(self) -> Growing:
        return self

    def __next__(self) -> dict[str, Any]:
        side = 1 << random.randint(11, 21)
        return {"data": torch.randint(0, 1 << 30, (side,), dtype=torch.int32)}


class Mixed:
    """Tensors of all kinds: large and tiny, nested, permuted, half, an array, a scalar."""

    def __iter__(self) -> Mixed:
        return self

    def __next__(self) -> dict[str, Any]:
        return {
            "data": torch.randn(SHAPE),
            "target": [torch.randint(0, 3, (2, 1, 32 >> level, 32, 32), dtype=torch.int16) for level in range(3)],
            "permuted": torch.randn(16, 32, 64).permute(2, 0, 1),
            "half": torch.randn(64, 64, 64).half(),
            "tiny": torch.arange(3),
            "scalar": torch.tensor(1.5),
            "in a tuple": (torch.randn(100, 100), "text"),
            "array": np.random.rand(64, 64),
        }


@pytest.fixture(autouse=True)
def _registered(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Slots were really registered, and are no longer when all is closed and let go."""
    caplog.set_level(logging.WARNING, "safeloader")
    slots = pinning.of_process()
    yield
    gc.collect()
    torch.cuda.synchronize()
    slots.fence()
    wait_until(lambda: not slots._registered, what="that nothing is registered")
    assert "slots are not registered" not in caplog.text


def _augmenter(loader: Any, **options: Any) -> SafeAugmenter:
    return SafeAugmenter(loader, None, WORKERS, CACHED, pin_memory=True, seed=7, **{"pin": "register", **options})


def _tensors(item: Any) -> Iterator[torch.Tensor]:
    if isinstance(item, torch.Tensor):
        yield item
    elif isinstance(item, dict):
        yield from _tensors(list(item.values()))
    elif isinstance(item, (list, tuple)):
        for value in item:
            yield from _tensors(value)


def _expected(loader: Any, batches: int) -> Iterator[torch.Tensor]:
    """The same stream, without pinning."""
    with SafeAugmenter(loader, None, WORKERS, CACHED, seed=7) as plain:
        for _ in range(batches):
            yield next(plain)["data"].clone()


def _external_stream() -> torch.cuda.ExternalStream:
    """A stream that torch did not make, and that the default stream does not wait for."""
    library, handle = ctypes.CDLL(cuda_driver.LIBRARY), ctypes.c_void_p()
    torch.cuda.current_stream().synchronize()  # the context is current
    assert library.cuStreamCreate(ctypes.byref(handle), 1) == 0  # CU_STREAM_NON_BLOCKING
    assert handle.value is not None
    return torch.cuda.ExternalStream(handle.value)


def _streams() -> list[torch.cuda.Stream]:
    return [
        torch.cuda.default_stream(),
        torch.cuda.Stream(),
        torch.cuda.Stream(),
        torch.cuda.Stream(priority=-1),
        _external_stream(),
    ]


@pytest.mark.parametrize("kind", [SafeAugmenter, SafeMultiThreadedAugmenter])
def test_every_tensor_is_pinned(kind: Any) -> None:
    with kind(Mixed(), None, WORKERS, CACHED, pin_memory=True, pin="register") as augmenter:
        for _ in range(20):
            batch = next(augmenter)
            assert [tensor.is_pinned() for tensor in _tensors(batch)] == [True] * 9
        assert pinning.of_process()._registered, "and not only copied"
        del batch


def test_a_hoarder_gets_pinned_copies() -> None:
    with _augmenter(Mixed()) as augmenter:
        hoard = [next(augmenter) for _ in range(20)]
        assert all(tensor.is_pinned() for tensor in _tensors(hoard))
        del hoard


def test_late_copies_read_the_batch_they_were_asked_to() -> None:
    batches = 500
    streams = itertools.cycle(_streams())
    on_gpu = []
    with _augmenter(RandomLoader(SHAPE)) as augmenter:
        for _ in range(batches):
            with torch.cuda.stream(next(streams)):
                torch.cuda._sleep(LATE_CYCLES)
                on_gpu.append(next(augmenter)["data"].to("cuda", non_blocking=True))  # and the batch is gone
    torch.cuda.synchronize()
    for ticket, expected in enumerate(_expected(RandomLoader(SHAPE), batches)):
        assert torch.equal(on_gpu[ticket].cpu(), expected), f"ticket {ticket}"


def test_late_copies_from_slots_that_grow_and_workers_that_die() -> None:
    batches = 150
    streams = itertools.cycle(_streams())
    on_gpu = []
    with _augmenter(Growing(), on_bad_case="retry") as augmenter:
        killer = Killer(augmenter, seed=1)
        for _ in range(batches):
            killer.maybe(every=30)
            with torch.cuda.stream(next(streams)):
                torch.cuda._sleep(LATE_CYCLES)
                on_gpu.append(next(augmenter)["data"].to("cuda", non_blocking=True))
        assert augmenter.report().restarts > 0
    torch.cuda.synchronize()
    for ticket, expected in enumerate(_expected(Growing(), batches)):
        assert torch.equal(on_gpu[ticket].cpu(), expected), f"ticket {ticket}"


def test_copies_that_are_running_when_all_is_closed() -> None:
    on_gpu, kept = [], []
    augmenter = _augmenter(RandomLoader(SHAPE))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(4):
            torch.cuda._sleep(10 * LATE_CYCLES)
            kept = [next(augmenter)["data"]]
            on_gpu.append(kept[0].to("cuda", non_blocking=True))
    augmenter.close()
    assert kept[0].is_pinned()
    kept.clear()
    stream.synchronize()
    for copied, expected in zip(on_gpu, _expected(RandomLoader(SHAPE), 4), strict=True):
        assert torch.equal(copied.cpu(), expected)


def test_numpy_arrays_are_covered_as_well() -> None:
    on_gpu = []
    with _augmenter(RandomLoader(SHAPE)) as augmenter:
        for _ in range(60):
            torch.cuda._sleep(LATE_CYCLES)
            on_gpu.append(torch.from_numpy(next(augmenter)["seg"]).to("cuda", non_blocking=True))
    torch.cuda.synchronize()
    with SafeAugmenter(RandomLoader(SHAPE), None, WORKERS, CACHED, seed=7) as plain:
        for copied in on_gpu:
            assert np.array_equal(copied.cpu().numpy(), next(plain)["seg"])


def test_a_graph_is_captured_between_two_batches() -> None:
    with _augmenter(RandomLoader(SHAPE)) as augmenter:
        static = torch.zeros(SHAPE, device="cuda")
        for _ in range(20):
            torch.cuda._sleep(LATE_CYCLES)
            data = next(augmenter)["data"]
            static.copy_(data, non_blocking=True)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                doubled = static * 2
            graph.replay()
            assert torch.equal(doubled.cpu(), data * 2)
        del data


def test_what_the_thread_does_during_a_capture_leaves_it_whole() -> None:
    """In CUDA's default mode, waiting for an event and registering memory would break it."""
    with _augmenter(RandomLoader(SHAPE)) as augmenter, mmap.mmap(-1, 1 << 20) as memory:
        next(augmenter)
        driver = pinning.of_process()._driver
        assert driver is not None
        address = np.frombuffer(memory, dtype=np.uint8).ctypes.data
        marks = driver.record()
        done = []

        def work() -> None:
            driver.wait(marks)
            driver.register(address, len(memory))
            driver.unregister(address)
            done.append(True)

        static = torch.ones(8, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            doubled = static * 2
        graph.replay()
        assert done == [True] and doubled.cpu().tolist() == [2.0] * 8


def test_taking_a_batch_within_a_capture_leaves_it_whole() -> None:
    """Without torch's own copy into pinned memory, which is its own business."""
    with _augmenter(RandomLoader(SHAPE)) as augmenter:
        next(augmenter)  # and let go: a fence is due
        static = torch.ones(8, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            doubled = static * 2
            batch = augmenter._running().consumer.take()
        graph.replay()
        assert doubled.cpu().tolist() == [2.0] * 8
        assert batch["data"].shape == SHAPE
        del batch


def test_the_thread_keeps_its_device_and_torch_sees_no_error() -> None:
    last = torch.cuda.device_count() - 1
    with torch.cuda.device(last), _augmenter(RandomLoader(SHAPE)) as augmenter:
        for _ in range(5):
            next(augmenter)
            assert torch.cuda.current_device() == last
        slots = pinning.of_process()
        assert slots._driver is not None
        (known, *_) = slots._registered.values()
        with pytest.raises(cuda_driver.CudaError, match="ALREADY_REGISTERED"):
            slots._driver.register(known.address, 4096)
        assert (torch.ones(4, device="cuda") * 2).sum().item() == 8.0, "a failed call leaves nothing behind"


def test_forked_children_leave_the_context_alone() -> None:
    """Workers of a loader that is forked, and a child of the user's own in which a batch dies."""
    with _augmenter(RandomLoader(SHAPE), start_method="forked") as augmenter:
        copied = [next(augmenter)["data"].to("cuda", non_blocking=True) for _ in range(30)]
        batch = next(augmenter)
        pid = os.fork()
        if pid == 0:
            del batch
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert batch["data"].is_pinned()
        del batch
        torch.cuda.synchronize()
    for on_gpu, expected in zip(copied, _expected(RandomLoader(SHAPE), 30), strict=True):
        assert torch.equal(on_gpu.cpu(), expected)


START_AND_EXIT = """
    import torch
    from safeloader import SafeAugmenter
    from safeloader.ring import pinning
    from safeloader.testing import wait_until
    from tests.loaders import RandomLoader

    augmenter = SafeAugmenter(RandomLoader((2, 1, 64, 64, 32)), None, 1, 1, pin_memory=True, pin="register")
    augmenter._start()
    wait_until(lambda: augmenter.report().slots["ready"] == 3, timeout_s=60)
    assert not torch.cuda.is_initialized() and pinning.of_process()._driver is None
    for _ in range(2):
        batch = next(augmenter)
        torch.cuda._sleep(2_000_000_000)  # about a second
        batch["data"].to("cuda", non_blocking=True)
        del batch
    pinning.of_process().fence()
    assert pinning.of_process()._registered
"""


@pytest.mark.parametrize("rest", ["", "kept = next(augmenter)", "augmenter.close()", "torch.cuda.synchronize()"])
def test_the_interpreter_begins_and_ends_quietly(rest: str) -> None:
    code = textwrap.dedent(START_AND_EXIT) + rest
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
