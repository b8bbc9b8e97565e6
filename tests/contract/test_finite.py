"""Finite loaders: what holds for the stock `MultiThreadedAugmenter` holds for ours, also when workers die."""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from safeloader import SafeMultiThreadedAugmenter
from safeloader.errors import ClosedError, ConfigError, WorkerError
from safeloader.pool import course
from safeloader.pool.work import Bounded, TooLargeError
from safeloader.testing import Killer, wait_until
from tests.loaders import RandomLoader, Shuffled

pytestmark = pytest.mark.usefixtures("warm_nursery")

SEEDS = [11, 12, 13, 14]


@pytest.fixture(params=[MultiThreadedAugmenter, SafeMultiThreadedAugmenter], ids=["stock", "ours"])
def make(request: pytest.FixtureRequest) -> Iterator[Callable[..., Any]]:
    made: list[Any] = []

    def make_one(*arguments: Any, **options: Any) -> Any:
        made.append(request.param(*arguments, **options))
        return made[-1]

    yield make_one
    for augmenter in made:
        augmenter._finish()


def add_noise(cases: list[str], noise: list[float], asked: int) -> dict[str, Any]:
    return {"cases": cases, "noise": noise, "asked": asked, "more noise": np.random.rand(2).tolist()}


@functools.cache
def stock_epochs(size: int, workers: int, epochs: int) -> list[list[Any]]:
    """What the stock class gives, with its seeds."""
    augmenter = MultiThreadedAugmenter(Shuffled(size, workers), add_noise, workers, 2, SEEDS[:workers])
    try:
        return [list(augmenter) for _ in range(epochs)]
    finally:
        augmenter._finish()


# ---- both classes ----


@pytest.mark.parametrize(("size", "workers"), [(11, 1), (12, 3), (11, 3), (3, 4), (1, 1)])
def test_each_epoch_gives_each_case_once(size: int, workers: int, make: Callable[..., Any]) -> None:
    augmenter = make(Shuffled(size, workers), None, workers, 1)
    orders = []
    for _ in range(3):
        cases = [case for batch in augmenter for case in batch["cases"]]
        assert sorted(cases) == [f"case_{number:03d}" for number in range(size)]
        orders.append(cases)
    assert size < 5 or len({tuple(order) for order in orders}) == 3, "shuffled anew"


def test_the_batches_come_in_the_order_of_one_worker(make: Callable[..., Any]) -> None:
    alone = Shuffled(21, 1)
    together = make(Shuffled(21, 3), None, 3, 1)
    for _ in range(3):
        assert [batch["cases"] for batch in together] == [batch["cases"] for batch in alone]


def test_stop_iteration_ends_an_epoch_and_the_next_call_begins_another(make: Callable[..., Any]) -> None:
    augmenter = make(Shuffled(4, 1), None, 1, 1)
    for _ in range(3):
        assert len(next(augmenter)["cases"]) == len(augmenter.next()["cases"]) == 2
        with pytest.raises(StopIteration):
            next(augmenter)


def test_an_infinite_loader_never_stops(make: Callable[..., Any]) -> None:
    augmenter = make(Shuffled(4, 2, infinite=True), None, 2, 1)
    assert len(list(itertools.islice(augmenter, 50))) == 50


def test_restart_begins_an_epoch(make: Callable[..., Any]) -> None:
    augmenter = make(Shuffled(12, 2), None, 2, 1, [1, 2])
    first = list(augmenter)
    next(augmenter)
    augmenter.restart()
    assert list(augmenter) == first
    augmenter._finish()
    assert augmenter.was_initialized is False
    assert list(augmenter) == first


def test_the_stock_attributes_are_there(make: Callable[..., Any]) -> None:
    augmenter = make(Shuffled(4, 2), add_noise, 2, num_cached_per_queue=3, timeout=7)
    assert isinstance(augmenter, MultiThreadedAugmenter) and iter(augmenter) is augmenter
    assert (augmenter.num_processes, augmenter.num_cached_per_queue, augmenter.timeout) == (2, 3, 7)
    assert (augmenter.seeds, augmenter.transform, augmenter.was_initialized) == ([None, None], add_noise, False)
    assert isinstance(augmenter.generator, Shuffled)


# ---- the same, bit for bit ----


@pytest.mark.parametrize("method", ["clean", "forked"])
@pytest.mark.parametrize(("size", "workers"), [(11, 1), (21, 2), (20, 4), (3, 4)])
def test_with_its_seeds_every_batch_is_the_stock_classes(size: int, workers: int, method: str) -> None:
    with SafeMultiThreadedAugmenter(
        Shuffled(size, workers), add_noise, workers, 2, SEEDS[:workers], start_method=method
    ) as augmenter:
        assert [list(augmenter) for _ in range(4)] == stock_epochs(size, workers, 4)


@settings(
    max_examples=int(os.environ.get("SAFELOADER_EXAMPLES", "12")),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    workers=st.integers(1, 4),
    cached=st.integers(1, 3),
    size=st.sampled_from([1, 11, 40]),
    kills=st.lists(st.integers(0, 60), max_size=6, unique=True),
    seed=st.integers(0, 1000),
)
def test_whoever_is_killed_whenever(workers: int, cached: int, size: int, kills: list[int], seed: int) -> None:
    taken = 0
    with SafeMultiThreadedAugmenter(
        Shuffled(size, workers), add_noise, workers, cached, SEEDS[:workers], backoff_first_s=0.0
    ) as augmenter:
        killer = Killer(augmenter, seed=seed)
        for epoch in stock_epochs(size, workers, 4):
            batches = []
            for batch in augmenter:
                batches.append(batch)
                taken += 1
                if taken in kills:
                    killer.strike()
            assert batches == epoch
        assert augmenter.report().batches == taken


def test_without_seeds_each_worker_and_each_start_draws_its_own_numbers() -> None:
    def noise(augmenter: SafeMultiThreadedAugmenter) -> list[tuple[float, ...]]:
        return [tuple(batch["noise"]) for batch in augmenter]

    with SafeMultiThreadedAugmenter(Shuffled(12, 3), None, 3, 1, seed=5) as augmenter:
        first, second = noise(augmenter), noise(augmenter)
        augmenter.restart()
        third = noise(augmenter)
    assert len({*first, *second, *third}) == 18
    with SafeMultiThreadedAugmenter(Shuffled(12, 3), None, 3, 1, seed=5) as augmenter:
        assert noise(augmenter) == first, "one seed is enough to have it again"


class AllGenerators(Shuffled):
    def generate_train_batch(self) -> dict[str, Any]:
        drawn = [np.random.random(), random.random(), torch.rand(1).item()]
        return {**super().generate_train_batch(), "drawn": drawn}


def test_seeds_fix_what_the_stock_class_leaves_alone_as_well() -> None:
    def epoch(augmenter: SafeMultiThreadedAugmenter) -> list[Any]:
        return [batch["drawn"] for batch in augmenter]

    with SafeMultiThreadedAugmenter(AllGenerators(12, 2), None, 2, 1, SEEDS[:2]) as augmenter:
        first = epoch(augmenter)
        augmenter.restart()
        assert epoch(augmenter) == first
    with SafeMultiThreadedAugmenter(AllGenerators(12, 2), None, 2, 1, SEEDS[:2]) as augmenter:
        assert epoch(augmenter) == first
    assert len({number for drawn in first for number in drawn}) == 18


def test_an_audit_has_a_line_for_each_batch(tmp_path: Path) -> None:
    with SafeMultiThreadedAugmenter(
        Shuffled(12, 2), None, 2, 1, SEEDS[:2], audit=True, folder=str(tmp_path)
    ) as augmenter:
        batches = [batch for _ in range(2) for batch in augmenter]
    lines = [json.loads(line) for line in (tmp_path / "safeloader_audit_loader.jsonl").read_text().splitlines()]
    assert [line["cases"] for line in lines[1:]] == [batch["cases"] for batch in batches]


# ---- what goes wrong ----


class Counted(Shuffled):
    """Leaves a byte for each time that it is asked."""

    def __init__(self, file: Path) -> None:
        super().__init__(400, 1)
        self.file = file

    def generate_train_batch(self) -> dict[str, Any]:
        with self.file.open("ab") as file:
            file.write(b".")
        return super().generate_train_batch()


def test_a_replacement_takes_up_its_place_and_does_not_begin_again(tmp_path: Path) -> None:
    with SafeMultiThreadedAugmenter(Counted(tmp_path / "asked"), None, 1, 1, backoff_first_s=0.0) as augmenter:
        killer, kills = Killer(augmenter, seed=1), 0
        for number, _ in enumerate(itertools.islice(augmenter, 200)):
            kills += number % 20 == 19 and killer.strike()
    asked = (tmp_path / "asked").stat().st_size
    assert kills >= 9
    assert asked <= 200 + 3 + kills, "what was being made, and nothing else, is made again"


class FailsOnce(Shuffled):
    """Its `at`th batch fails when it is made for the first time, after its cases were drawn."""

    def __init__(self, at: int, marker: Path, deed: Callable[[], object]) -> None:
        super().__init__(12, 1)
        self.at, self.marker, self.deed = at, marker, deed

    def generate_train_batch(self) -> dict[str, Any]:
        batch = super().generate_train_batch()
        if self.asked == self.at and not self.marker.exists():
            self.marker.touch()
            self.deed()
        return batch


def fail() -> None:
    raise OSError("once")


@pytest.mark.parametrize("deed", [fail, os.abort])
@pytest.mark.parametrize("at", [1, 2, 6, 7, 11])
def test_a_batch_that_fails_once_is_made_again_and_none_is_lost(
    at: int, deed: Callable[[], object], tmp_path: Path
) -> None:
    with SafeMultiThreadedAugmenter(FailsOnce(at, tmp_path / "struck", deed), add_noise, 1, 1, SEEDS[:1]) as augmenter:
        assert [list(augmenter) for _ in range(2)] == stock_epochs(12, 1, 2)
        assert len(augmenter.report().incidents) == 1
    assert (tmp_path / "struck").exists()


class Fails(Shuffled):
    def generate_train_batch(self) -> dict[str, Any]:
        batch = super().generate_train_batch()
        if self.asked == 3:
            raise ValueError("the third is bad")
        return batch


def test_an_exception_that_comes_again_is_raised_in_its_place() -> None:
    with SafeMultiThreadedAugmenter(Fails(12, 1), None, 1, 1, on_bad_case="raise") as augmenter:
        assert [next(augmenter)["asked"] for _ in range(2)] == [1, 2]
        for _ in range(2):
            with pytest.raises(WorkerError, match="ValueError: the third is bad, raised in worker loader-0"):
                next(augmenter)


class Bad(Shuffled):
    """One of its cases can't be used."""

    def generate_train_batch(self) -> dict[str, Any]:
        batch = super().generate_train_batch()
        if "case_003" in batch["cases"]:
            raise ValueError("bad case")
        return batch


def test_a_bad_case_is_quarantined_and_only_its_batch_is_passed_over() -> None:
    loader = Bad(12, 2)
    loader.batch_size = 1
    loader.shuffle = False
    with SafeMultiThreadedAugmenter(loader, None, 2, 1) as augmenter:
        epochs = [[case for batch in augmenter for case in batch["cases"]] for _ in range(8)]
        report = augmenter.report()
    assert report.quarantined == ("case_003",)
    assert epochs[-1] == [f"case_{number:03d}" for number in (0, 1, 2, 5, 4, 7, 6, 9, 8, 11, 10)]


def counting() -> Iterator[dict[str, Any]]:
    for number in range(40):
        yield {"number": number, "noise": np.random.rand(2).tolist()}


class Generator(RandomLoader):
    """A loader around a generator."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: Iterator[dict[str, Any]] | None = None

    def __next__(self) -> dict[str, Any]:
        if self.numbers is None:
            self.numbers = counting()
        return next(self.numbers)


class Heavy(Shuffled):
    """Its state is too large to be kept."""

    def __init__(self) -> None:
        super().__init__(12, 1)
        self.ballast = np.zeros(8 << 20, dtype=np.uint8)


@pytest.mark.parametrize("loader", [Generator, Heavy])
def test_what_cannot_be_kept_is_run_again_from_its_beginning(loader: Callable[[], Any]) -> None:
    def run(*, kill_at: int | None) -> list[Any]:
        with SafeMultiThreadedAugmenter(loader(), None, 1, 1, SEEDS[:1]) as augmenter:
            seen = []
            for number, batch in enumerate(itertools.islice(augmenter, 6)):
                seen.append(batch)
                pid = augmenter.workers()[0].pid
                if number == kill_at and pid is not None:
                    os.kill(pid, signal.SIGKILL)
                    wait_until(lambda: augmenter.workers()[0].incarnation == 1, what="the replacement")
            return seen

    assert run(kill_at=3) == run(kill_at=None)


def test_a_state_that_is_too_large_is_not_pickled_to_its_end() -> None:
    out = Bounded(course.MAX_STATE_NBYTES)
    with pytest.raises(TooLargeError):
        out.write(b"x" * (5 << 20))


def test_an_iterator_without_attributes_goes_on_where_it_was() -> None:
    with SafeMultiThreadedAugmenter(iter([{"n": n} for n in range(8)]), None, 1, 1) as augmenter:
        seen = [next(augmenter)["n"] for _ in range(2)]
        pid = augmenter.workers()[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        seen += [batch["n"] for batch in augmenter]
        assert list(augmenter) == [], "an iterator is finished for good"
    assert seen == list(range(8))


def test_elsewhere_the_stock_class_runs_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "platform", "sunos5")
    augmenter = SafeMultiThreadedAugmenter(Shuffled(12, 2), add_noise, 2, 1, SEEDS[:2])
    assert [record.message for record in caplog.records] == [
        "SafeLoader needs Linux, and this is sunos5: the stock MultiThreadedAugmenter runs instead, without protection"
    ]
    with augmenter:
        assert [list(augmenter) for _ in range(2)] == stock_epochs(12, 2, 2)
        augmenter.restart()
        assert list(augmenter) == stock_epochs(12, 2, 1)[0]
        assert augmenter.workers() == () and augmenter.report().slots is None
    assert augmenter._stock is not None and augmenter._stock._processes == []


# ---- bad input ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_processes": 0}, "num_processes=0: must be an integer of at least 1"),
        ({"num_processes": 2, "num_cached_per_queue": 0}, "num_cached_per_queue=0: must be an integer of at least 1"),
        ({"num_processes": 2, "seeds": [1]}, "seeds: 1 given for num_processes=2"),
        ({"num_processes": 1, "timeout": 0}, "slow_warning_s=0: must be at least"),
    ],
)
def test_arguments_that_cannot_work(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SafeMultiThreadedAugmenter(Shuffled(4, 1), None, **arguments)


def test_after_close_there_is_no_next() -> None:
    augmenter = SafeMultiThreadedAugmenter(Shuffled(4, 1), None, 1)
    next(augmenter)
    augmenter.close()
    with pytest.raises(ClosedError):
        next(augmenter)
