"""Long runs: what happens at epoch 731. The first test is short enough for every run; `-m soak` runs the others."""

from __future__ import annotations

import hashlib
import itertools
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from safeloader import SafeAugmenter, SafeMultiThreadedAugmenter
from safeloader.pool.seeding import seed_everything
from safeloader.testing import DEADLY, Killer, wait_until
from tests.loaders import RandomLoader, Shuffled

BATCHES = 10_000
SEED = 20
_SHAPE = (2, 1, 16, 16, 16)
_MIB = 1 << 20


def _digest(batch: dict[str, Any]) -> bytes:
    digest = hashlib.blake2b(batch["data"].numpy().tobytes(), digest_size=8)
    digest.update(batch["seg"].tobytes())
    digest.update(repr((batch["draw"], batch["keys"])).encode())
    return digest.digest()


@pytest.fixture(scope="module")
def undisturbed() -> list[bytes]:
    """The stream as one process makes it, without SafeLoader but for the seeds."""
    loader = RandomLoader(_SHAPE)
    digests = []
    for ticket in range(BATCHES):
        seed_everything(SEED, 0, ticket)
        digests.append(_digest(next(loader)))
    return digests


def _resources() -> tuple[int, int, float]:
    process = psutil.Process()
    return process.num_fds(), process.num_threads(), process.memory_info().rss / _MIB


@pytest.mark.parametrize(
    "workers", [pytest.param(1, marks=pytest.mark.soak), 2, pytest.param(5, marks=pytest.mark.soak)]
)
def test_ten_thousand_batches_with_a_kill_every_fifty(workers: int, undisturbed: list[bytes]) -> None:
    with SafeAugmenter(RandomLoader(_SHAPE), None, workers, 3, seed=SEED, on_bad_case="retry") as augmenter:
        killer = Killer(augmenter, seed=workers, signals=DEADLY)
        resources = []
        for ticket in range(BATCHES):
            killer.maybe(every=50)
            assert _digest(next(augmenter)) == undisturbed[ticket], f"ticket {ticket} is not what it should be"
            if ticket % 100 == 99 and ticket >= 999:
                wait_until(lambda: all(worker.pid is not None for worker in augmenter.workers()))
                resources.append(_resources())
        report = augmenter.report()
    print(
        f"{workers} workers: {len(killer.kills)} kills, {report.restarts} restarts, {resources[0]} -> {resources[-1]}"
    )
    assert len(killer.kills) > BATCHES / 50 / 2
    assert report.batches == BATCHES
    for number, what in ((0, "file descriptors"), (1, "threads")):
        # A kill may be under way at any look: a dead worker's socket is closed once its death has been noticed.
        assert {seen[number] for seen in resources[:10]} & {seen[number] for seen in resources[-10:]}, what
    first, last = (sorted(seen[2] for seen in part)[5] for part in (resources[:10], resources[-10:]))
    assert last - first < 16, f"resident memory grew from {first:.0f} to {last:.0f} MiB"


@pytest.fixture
def without_log() -> Iterator[None]:
    """pytest would keep every line."""
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.soak
@pytest.mark.usefixtures("without_log")
def test_as_many_batches_as_a_thousand_epochs_of_nnunet_take() -> None:
    """250 of training and 50 of validation in each, a kill about every 500: nothing grows in the trainer."""
    shape = (1, 1, 2, 2, 2)
    reference, own_mib = RandomLoader(shape), []
    with (
        SafeAugmenter(RandomLoader(shape), None, 3, 3, seed=SEED, name="train") as train,
        SafeAugmenter(RandomLoader(shape), None, 2, 3, seed=SEED, stream=1, name="val") as val,
    ):
        killers = Killer(train, seed=1), Killer(val, seed=2)
        for epoch in range(1000):
            for stream, (augmenter, batches) in enumerate(((train, 250), (val, 50))):
                for ticket in range(epoch * batches, (epoch + 1) * batches):
                    killers[stream].maybe(every=500)
                    batch = next(augmenter)
                    seed_everything(SEED, stream, ticket)
                    assert _digest(batch) == _digest(next(reference)), f"ticket {ticket} of stream {stream}"
            if epoch % 100 == 99:
                own_mib.append(psutil.Process().memory_full_info().uss / _MIB)
        reports = train.report(), val.report()
    kills = sum(len(killer.kills) for killer in killers)
    print(f"{kills} kills, the trainer's own memory after each 100 epochs: {[f'{mib:.1f}' for mib in own_mib]} MiB")
    assert [report.batches for report in reports] == [250_000, 50_000]
    assert kills > 300
    assert max(own_mib[1:]) - own_mib[0] < 2, "memory grew"


def _epochs(size: int, seeds: list[int], epochs: int) -> list[list[Any]]:
    """What the workers of the stock class make, in one process: each with its own loader and its own NumPy."""
    made = []
    for worker, seed in enumerate(seeds):
        np.random.seed(seed)
        loader = Shuffled(size, len(seeds))
        loader.set_thread_id(worker)
        made.append([list(loader) for _ in range(epochs)])
    return [
        [batch for turn in itertools.zip_longest(*parts) for batch in turn if batch is not None]
        for parts in zip(*made, strict=True)
    ]


@pytest.mark.soak
def test_a_thousand_finite_epochs_with_a_kill_every_fifty() -> None:
    seeds = [1, 2, 3]
    expected = _epochs(21, seeds, 1000)
    with SafeMultiThreadedAugmenter(Shuffled(21, 3), None, 3, 2, seeds, on_bad_case="retry") as augmenter:
        killer, resources = Killer(augmenter, seed=4, signals=DEADLY), []
        for number, epoch in enumerate(expected):
            batches = []
            for batch in augmenter:
                batches.append(batch)
                killer.maybe(every=50)
            assert batches == epoch, f"epoch {number} is not what it should be"
            if number >= 100:
                resources.append(_resources())
        report = augmenter.report()
    print(f"{len(killer.kills)} kills, {report.batches} batches, {resources[0]} -> {resources[-1]}")
    assert report.batches == sum(map(len, expected))
    for number, what in ((0, "file descriptors"), (1, "threads")):
        assert {seen[number] for seen in resources[:20]} & {seen[number] for seen in resources[-20:]}, what
    assert resources[-1][2] - resources[0][2] < 16, "resident memory grew"


class SizedLoader:
    """Batches from 1 KiB to `largest_nbytes`, tensors and arrays, each filled with a number of its own."""

    def __init__(self, largest_nbytes: int) -> None:
        self.largest_nbytes = largest_nbytes

    def __iter__(self) -> SizedLoader:
        return self

    def __next__(self) -> dict[str, Any]:
        started = time.monotonic()
        nbytes = int(np.exp(np.random.uniform(np.log(1024), np.log(self.largest_nbytes))))
        data: Any = np.full(nbytes // 4, np.random.randint(1 << 30), dtype=np.int32)
        if np.random.rand() < 0.5:
            data = torch.from_numpy(data)
        return {"data": data, "made_s": time.monotonic() - started}


def _check(batch: dict[str, Any], loader: SizedLoader, ticket: int) -> None:
    seed_everything(SEED, 0, ticket)
    expected = next(loader)["data"]
    assert type(batch["data"]) is type(expected)
    assert np.array_equal(np.asarray(batch["data"]), np.asarray(expected)), f"ticket {ticket}"


def _at_a_random_moment(strike: Callable[[], object], moment: random.Random, within_s: float) -> threading.Timer:
    timer = threading.Timer(moment.uniform(0, within_s), strike)
    timer.start()
    return timer


@pytest.mark.parametrize(
    ("kills", "largest_nbytes"), [(20, 16 * _MIB), pytest.param(1000, 256 * _MIB, marks=pytest.mark.soak)]
)
def test_single_kills_at_random_moments(kills: int, largest_nbytes: int) -> None:
    """No `next()` takes longer than making the batch again and a second."""
    loader, moment = SizedLoader(largest_nbytes), random.Random(SEED)
    waits = []
    with SafeAugmenter(SizedLoader(largest_nbytes), None, 2, 1, seed=SEED, on_bad_case="retry") as augmenter:
        ticket = 0
        _check(next(augmenter), loader, ticket)
        for seed in range(kills):
            killer = Killer(augmenter, seed=seed)
            timer = _at_a_random_moment(killer.strike, moment, within_s=0.2)
            restarts = augmenter.report().restarts
            while augmenter.report().restarts == restarts or timer.is_alive():
                started = time.monotonic()
                batch = next(augmenter)
                waits.append((time.monotonic() - started, batch["made_s"]))
                ticket += 1
                _check(batch, loader, ticket)
                del batch
            timer.join()
            assert len(killer.kills) == 1
        assert augmenter.report().restarts >= kills
    over = [wait_s - made_s for wait_s, made_s in waits]
    print(f"{kills} kills, {len(waits)} batches, longest wait beyond making the batch: {max(over):.3f} s")
    if kills == 1000:  # the short form runs on machines that do other things as well
        assert max(over) < 1.0
