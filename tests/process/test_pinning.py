"""Registered slots under a real pool: a GPU that is late, workers that die, slots that grow, and every way to end."""

from __future__ import annotations

import gc
import random
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from safeloader import SafeAugmenter, SafeMultiThreadedAugmenter
from safeloader.ring.pinning import Pinning
from safeloader.testing import Killer, wait_until
from tests.fake_cuda import FakeCuda
from tests.loaders import RandomLoader

pytestmark = pytest.mark.usefixtures("warm_nursery")

WORKERS, CACHED = 2, 2
SLOTS = WORKERS + 2 * CACHED


class Growing:
    """Batches of 8 KiB to 2 MiB: slots grow again and again."""

    def __iter__(self) -> Growing:
        return self

    def __next__(self) -> dict[str, Any]:
        side = 1 << random.randint(11, 19)
        return {"data": torch.randint(0, 1 << 30, (side,), dtype=torch.int32), "one": torch.ones(1)}


class Finite(Growing):
    """Ten batches, again and again."""

    def __init__(self) -> None:
        self.made = 0

    def __next__(self) -> dict[str, Any]:
        self.made += 1
        if self.made % 11 == 0:
            raise StopIteration
        return super().__next__()


class Augmenter(SafeAugmenter):
    """With a GPU that the test makes."""

    slots: Pinning

    def _pinning(self) -> Pinning:
        return self.slots


class FiniteAugmenter(SafeMultiThreadedAugmenter):
    """With a GPU that the test makes."""

    slots: Pinning

    def _pinning(self) -> Pinning:
        return self.slots


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    fake = FakeCuda(blocking=True)
    yield fake
    fake.finish_all()
    fake.check()


@pytest.fixture
def slots(cuda: FakeCuda) -> Iterator[Pinning]:
    pinning = Pinning(cuda.start)
    yield pinning
    gc.collect()
    pinning.fence()
    cuda.finish_all()
    wait_until(lambda: not cuda.registered, what="that nothing is registered")
    assert cuda.calls.count("register") == cuda.calls.count("unregister")
    assert cuda.threads <= {"safeloader-pinning"}, "neither the supervisor nor the training has waited for the GPU"


def _augmenter(slots: Pinning, loader: Any = None, **options: Any) -> Augmenter:
    augmenter = Augmenter(loader or RandomLoader((2, 1, 16, 16, 16)), None, WORKERS, CACHED, seed=7, **options)
    augmenter.slots = slots
    return augmenter


@pytest.mark.parametrize("lag", [0, 1, 4])
def test_late_copies_of_a_stream_with_dying_workers_and_growing_slots(cuda: FakeCuda, slots: Pinning, lag: int) -> None:
    rng = random.Random(lag)
    with SafeAugmenter(Growing(), None, WORKERS, CACHED, seed=7) as plain:
        expected = [next(plain)["data"].clone() for _ in range(150)]
    with cuda.running(lag, seed=lag), _augmenter(slots, Growing(), on_bad_case="retry") as augmenter:
        killer = Killer(augmenter, seed=lag)
        kept: list[torch.Tensor] = []
        pinned = 0
        for data in expected:
            killer.maybe(every=30)
            batch = next(augmenter)
            assert torch.equal(batch["data"], data)
            assert not cuda.is_pinned(batch["one"])
            if cuda.is_pinned(batch["data"]):
                pinned += 1
                cuda.copy(batch["data"])
            kept = [*kept[-1:], batch["data"][-2048:]] if rng.random() < 0.5 else []
            if kept and cuda.is_pinned(kept[0]):  # a batch or two later
                cuda.copy(kept[0])
        del batch, kept
    assert pinned > 75, "the others came while two were kept"
    assert augmenter.report().restarts > 0


def test_nothing_of_cuda_is_touched_before_a_batch_is_taken(cuda: FakeCuda, slots: Pinning) -> None:
    with _augmenter(slots) as augmenter:
        augmenter._start()
        wait_until(lambda: augmenter.report().slots == {"free": 0, "filling": 0, "ready": SLOTS, "leased": 0})
        assert cuda.calls == []
        next(augmenter)
        assert cuda.calls[:2] == ["start", "register"]


def test_a_gpu_that_stands_still_holds_up_next_and_nothing_else(cuda: FakeCuda, slots: Pinning) -> None:
    with _augmenter(slots) as augmenter:
        number = cuda.copy(next(augmenter)["data"])
        for _ in range(SLOTS - 1):
            next(augmenter)
        got: list[Any] = []
        waiting = threading.Thread(target=lambda: got.append(next(augmenter)))
        waiting.start()
        wait_until(lambda: augmenter.report().slots == {"free": 0, "filling": 0, "ready": 0, "leased": SLOTS})
        assert len(augmenter.workers()) == WORKERS and got == []
        cuda.finish(number)
        waiting.join()
        assert len(got) == 1
        got.clear()


def test_closing_while_copies_are_running(cuda: FakeCuda, slots: Pinning) -> None:
    augmenter = _augmenter(slots)
    numbers = [cuda.copy(next(augmenter)["data"]) for _ in range(3)]
    augmenter.close()
    assert set(numbers) == set(cuda.copies), "nobody has waited"
    used = {cuda._range_of(copy.address) for copy in cuda.copies.values()}
    assert used <= cuda.registered.keys()


def test_a_batch_that_is_kept_beyond_the_end(cuda: FakeCuda, slots: Pinning) -> None:
    augmenter = _augmenter(slots)
    kept = next(augmenter)["data"][1]
    augmenter.close()
    wait_until(lambda: len(cuda.registered) == 1)
    number = cuda.copy(kept)
    before = kept.clone()
    with _augmenter(slots) as other:
        next(other)
        assert cuda.is_pinned(kept) and torch.equal(kept, before)
        (address,) = [cuda._range_of(kept.data_ptr())]
        del kept
        next(other)  # records a fence
        assert address in cuda.registered, "the copy is running"
        cuda.finish(number)
        wait_until(lambda: address not in cuda.registered)


def test_an_augmenter_that_is_collected(cuda: FakeCuda, slots: Pinning) -> None:
    augmenter = _augmenter(slots)
    next(augmenter)
    next(augmenter)
    slots.fence()
    del augmenter
    gc.collect()
    wait_until(lambda: not cuda.registered)


def test_restart_with_a_copy_running(cuda: FakeCuda, slots: Pinning) -> None:
    with _augmenter(slots) as augmenter:
        number = cuda.copy(next(augmenter)["data"])
        augmenter.restart()
        next(augmenter)
        cuda.finish(number)
        next(augmenter)


def test_workers_that_are_forked_from_the_trainer_use_nothing_of_cuda(cuda: FakeCuda, slots: Pinning) -> None:
    with cuda.running(1, seed=1), _augmenter(slots) as first:
        next(first)
        with _augmenter(slots, Growing(), start_method="forked", on_bad_case="retry") as augmenter:
            killer = Killer(augmenter, seed=3)
            for _ in range(60):
                killer.maybe(every=20)
                data = next(augmenter)["data"]
                if cuda.is_pinned(data):
                    cuda.copy(data)
            del data


def test_a_finite_loader(cuda: FakeCuda, slots: Pinning) -> None:
    with cuda.running(2, seed=2):
        augmenter = FiniteAugmenter(Finite(), None, 2, 2, seeds=[1, 2])
        augmenter.slots = slots
        with augmenter:
            for _ in range(3):
                for batch in augmenter:
                    if cuda.is_pinned(batch["data"]):
                        cuda.copy(batch["data"])
                    del batch
    assert cuda.ended > 20


EXIT = """
    import atexit
    from safeloader.ring.pinning import Pinning
    from tests.fake_cuda import FakeCuda
    from tests.loaders import RandomLoader
    from tests.process.test_pinning import Augmenter

    cuda = FakeCuda(blocking=True)
    augmenter = Augmenter(RandomLoader((2, 1, 16, 16, 16)), None, 1, 1)
    augmenter.slots = Pinning(cuda.start)
    atexit.register(augmenter.slots.end, 0.2)
    for _ in range(2):
        batch = next(augmenter)
        {copy}cuda.copy(batch["data"])
        del batch
    augmenter.slots.fence()
    {rest}
"""


@pytest.mark.parametrize(
    ("copy", "rest"),
    [("", ""), ("", "kept = next(augmenter)"), ("", "augmenter.close()"), ("# ", "raise SystemExit(0)")],
    ids=["a copy never ends", "a batch is kept", "closed under a copy", "nothing is going on"],
)
def test_the_interpreter_ends_quietly(copy: str, rest: str) -> None:
    code = textwrap.dedent(EXIT.format(copy=copy, rest=rest))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
