"""A lease follows the storage: kept data never changes, hoarded batches all arrive, and memory stays bounded."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from safeloader import SafeAugmenter
from safeloader.testing import wait_until
from tests.loaders import RandomLoader

pytestmark = pytest.mark.usefixtures("warm_nursery")

SHAPE = (2, 1, 16, 16, 16)
"""8192 voxels: 32 KiB of float32, 16 KiB of int16. Both lie in the slot, nothing is copied out for being small."""
WORKERS, CACHED = 2, 2
SLOTS = WORKERS + 2 * CACHED


def _augmenter(**options: Any) -> SafeAugmenter:
    return SafeAugmenter(RandomLoader(SHAPE), None, WORKERS, CACHED, seed=7, **options)


def _bytes(kept: Any) -> bytes:
    if isinstance(kept, torch.UntypedStorage):
        kept = torch.tensor([], dtype=torch.uint8).set_(kept)
    if isinstance(kept, torch.Tensor):
        kept = kept.numpy()
    return bytes(kept.tobytes())


PARTS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "tensor": lambda batch: batch["data"],
    "sample": lambda batch: batch["data"][0],
    "one voxel": lambda batch: batch["data"][1, 0, 3, 3, 3:4],
    "numpy view of a tensor": lambda batch: batch["data"].numpy(),
    "slice of a numpy view": lambda batch: batch["data"].numpy()[1, :, ::2],
    "reshaped": lambda batch: batch["data"].reshape(-1),
    "transposed": lambda batch: batch["data"].permute(4, 3, 2, 1, 0),
    "as another dtype": lambda batch: batch["data"].view(torch.int32),
    "storage": lambda batch: batch["data"].untyped_storage(),
    "detached alias": lambda batch: batch["data"].detach(),
    "array": lambda batch: batch["seg"],
    "slice of an array": lambda batch: batch["seg"][0],
    "reshaped array": lambda batch: batch["seg"].reshape(-1)[::3],
    "tensor from an array": lambda batch: torch.from_numpy(batch["seg"])[1],
    "array's memoryview": lambda batch: memoryview(batch["seg"]),
    "tensor's memoryview": lambda batch: memoryview(batch["data"].numpy()),
    "array from a buffer": lambda batch: np.frombuffer(batch["seg"], dtype=np.uint8),
}


@pytest.mark.parametrize("part", PARTS)
def test_what_is_kept_never_changes(part: str) -> None:
    with _augmenter() as augmenter:
        batch = next(augmenter)
        kept = PARTS[part](batch)
        before = _bytes(kept)
        del batch
        for _ in range(200):
            next(augmenter)
        gc.collect()
        assert _bytes(kept) == before
        wait_until(lambda: augmenter.report().slots == {"free": 0, "filling": 0, "ready": SLOTS - 1, "leased": 1})
        del kept
        next(augmenter)
        wait_until(lambda: augmenter.report().slots == {"free": 0, "filling": 0, "ready": SLOTS, "leased": 0})
    assert len(before) < 100_000


def test_two_parts_of_one_batch_are_one_lease() -> None:
    with _augmenter() as augmenter:
        batch = next(augmenter)
        data, seg = batch["data"][0], batch["seg"][1]
        before = _bytes(data), _bytes(seg)
        del batch
        for _ in range(50):
            next(augmenter)
        assert (_bytes(data), _bytes(seg)) == before
        del data
        for _ in range(50):
            next(augmenter)
        assert _bytes(seg) == before[1]


def test_a_hoarder_gets_every_batch_unchanged() -> None:
    with _augmenter() as augmenter:
        hoard = [next(augmenter) for _ in range(100)]
        slots = augmenter.report().slots
        assert slots is not None and sum(slots.values()) <= SLOTS
        assert slots["leased"] <= max(2, CACHED), "the rest are copies"
    with _augmenter() as augmenter:
        for kept in hoard:
            again = next(augmenter)
            assert torch.equal(kept["data"], again["data"])
            assert np.array_equal(kept["seg"], again["seg"])
            assert kept["keys"] == again["keys"]


def test_a_hoarder_who_lets_go_in_any_order() -> None:
    with _augmenter() as augmenter:
        expected = [_bytes(next(augmenter)["data"]) for _ in range(120)]
    order = np.random.default_rng(1).permutation(40)
    with _augmenter() as augmenter:
        hoard: dict[int, Any] = {number: next(augmenter) for number in range(40)}
        for number in range(40, 120):
            assert _bytes(next(augmenter)["data"]) == expected[number]
            if number % 2:
                gone = int(order[(number - 40) // 2])
                assert _bytes(hoard.pop(gone)["data"]) == expected[gone]
        assert hoard == {}


def test_writing_into_a_batch_disturbs_nobody() -> None:
    with _augmenter() as augmenter:
        expected = [(_bytes(batch["data"]), _bytes(batch["seg"])) for batch in (next(augmenter) for _ in range(100))]
    with _augmenter() as augmenter:
        held = []
        for number in range(100):
            batch = next(augmenter)
            assert (_bytes(batch["data"]), _bytes(batch["seg"])) == expected[number]
            batch["data"].fill_(number)
            batch["seg"][...] = number
            held = [*held[-3:], (number, batch)]
            for written, old in held:
                assert (old["data"] == written).all() and (old["seg"] == written).all()


def test_batches_stay_valid_after_close() -> None:
    augmenter = _augmenter()
    batches = [next(augmenter) for _ in range(8)]
    before = [(_bytes(batch["data"]), _bytes(batch["seg"])) for batch in batches]
    augmenter.close()
    del augmenter
    gc.collect()
    assert [(_bytes(batch["data"]), _bytes(batch["seg"])) for batch in batches] == before
    batches[0]["data"].zero_()


def test_leases_outlive_a_restart() -> None:
    with _augmenter() as augmenter:
        batch = next(augmenter)
        before = _bytes(batch["data"])
        augmenter.restart()
        for _ in range(50):
            next(augmenter)
        assert _bytes(batch["data"]) == before


def test_leases_may_end_in_any_thread() -> None:
    with _augmenter() as augmenter:
        for _ in range(20):
            batches = [next(augmenter) for _ in range(5)]
            threads = [threading.Thread(target=batches.clear), threading.Thread(target=gc.collect)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        next(augmenter)
        wait_until(lambda: augmenter.report().slots == {"free": 0, "filling": 0, "ready": SLOTS, "leased": 0})


def test_a_batch_that_ends_in_a_forked_child_is_nobodys_lease(tmp_path: Path) -> None:
    """The child may have closed the trainer's descriptors, and have files of its own in their place."""
    with _augmenter() as augmenter:
        batch = next(augmenter)
        pid = os.fork()
        if pid == 0:
            written = -1
            try:
                os.closerange(3, 1024)
                files = [open(tmp_path / str(number), "wb", buffering=0) for number in range(256)]  # noqa: SIM115
                del batch, augmenter
                gc.collect()
                written = sum((tmp_path / file.name).stat().st_size for file in files)
            finally:
                os._exit(written != 0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert batch["data"].shape == SHAPE
        next(augmenter)


def test_a_batch_in_a_reference_cycle_is_let_go_with_it() -> None:
    with _augmenter() as augmenter:
        for _ in range(30):
            batch = next(augmenter)
            batch["self"] = batch
        del batch
        gc.collect()
        next(augmenter)
        wait_until(lambda: augmenter.report().slots == {"free": 0, "filling": 0, "ready": SLOTS, "leased": 0})


@pytest.mark.parametrize(("workers", "num_cached"), [(1, 1), (1, 4), (3, 1), (2, 6)])
def test_there_are_no_more_slots_than_promised(workers: int, num_cached: int) -> None:
    bound = workers + 2 * num_cached
    with SafeAugmenter(RandomLoader(SHAPE), None, workers, num_cached) as augmenter:
        for _ in range(60):
            batch = next(augmenter)
            slots = augmenter.report().slots
            assert slots is not None and sum(slots.values()) <= bound
        del batch
        next(augmenter)
        wait_until(lambda: augmenter.report().slots == {"free": 0, "filling": 0, "ready": bound, "leased": 0})


def test_two_threads_share_one_stream() -> None:
    """Each gets whole batches, together they get all of them, and each sees its own in order."""
    with _augmenter() as augmenter:
        expected = [_bytes(next(augmenter)["data"]) for _ in range(200)]
    with _augmenter() as augmenter:
        got: list[list[bytes]] = [[], []]

        def consume(mine: list[bytes]) -> None:
            mine.extend(_bytes(next(augmenter)["data"]) for _ in range(100))

        threads = [threading.Thread(target=consume, args=(mine,)) for mine in got]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(got[0] + got[1]) == sorted(expected)
    assert all(mine == sorted(mine, key=expected.index) for mine in got)
