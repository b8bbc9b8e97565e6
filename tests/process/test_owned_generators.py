"""Generators that a loader or transform owns follow the ticket, like the global ones."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from safeloader import SafeAugmenter
from safeloader.pool.owned import OwnedGenerators
from safeloader.testing import Killer
from tests.loaders import RandomLoader

pytestmark = pytest.mark.usefixtures("warm_nursery")

OF_MODULE = np.random.default_rng(3)


class InAttribute(RandomLoader):
    def __init__(self) -> None:
        super().__init__()
        self.rng: Any = np.random.default_rng(1)
        self.old = np.random.RandomState(1)
        self.chance = random.Random(1)
        self.torch = torch.Generator().manual_seed(1)

    def __next__(self) -> dict[str, Any]:
        drawn = [self.rng.random(), self.old.normal(), self.chance.random(), torch.rand(1, generator=self.torch).item()]
        return {"drawn": drawn}


class OtherBits(InAttribute):
    def __init__(self) -> None:
        super().__init__()
        self.rng = np.random.Generator(np.random.Philox(1))
        self.old = np.random.RandomState(np.random.PCG64(1))


class OfModule(RandomLoader):
    def __next__(self) -> dict[str, Any]:
        return {"drawn": [OF_MODULE.random()]}


class OfClass(RandomLoader):
    rng = np.random.default_rng(4)

    def __next__(self) -> dict[str, Any]:
        return {"drawn": [self.rng.random()]}


class Lazy(RandomLoader):
    """Makes its generator when it first needs one."""

    rng: Any = None

    def __next__(self) -> dict[str, Any]:
        if self.rng is None:
            self.rng = np.random.default_rng()
        return {"drawn": [self.rng.random(), float(np.random.random())]}


class AtStart(Lazy):
    """Makes it when it learns which worker it is in."""

    def set_thread_id(self, thread_id: int) -> None:
        super().set_thread_id(thread_id)
        self.rng = np.random.default_rng(thread_id)


class Plain(RandomLoader):
    def __next__(self) -> dict[str, Any]:
        return {"drawn": [0.0]}


def closure() -> Callable[..., dict[str, Any]]:
    rng = np.random.default_rng(5)
    return lambda drawn: {"drawn": [*drawn, rng.random()]}


def generator() -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(6)
    while True:
        yield {"drawn": [rng.random()]}


class Anew(RandomLoader):
    """What can't be controlled: another one for each batch, seeded by the operating system."""

    def __next__(self) -> dict[str, Any]:
        return {"drawn": [np.random.default_rng().random()]}


OWNERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "attributes": lambda: (InAttribute(), None),
    "other bit generators": lambda: (OtherBits(), None),
    "a variable of the module": lambda: (OfModule(), None),
    "an attribute of the class": lambda: (OfClass(), None),
    "made at the first batch": lambda: (Lazy(), None),
    "made at the start": lambda: (AtStart(), None),
    "a transform's closure": lambda: (Plain(), closure()),
}


def _stream(owner: tuple[Any, Any], n: int = 30, *, workers: int = 1, kills: bool = False, **options: Any) -> list[Any]:
    with SafeAugmenter(*owner, workers, 2, seed=7, backoff_first_s=0.0, **options) as augmenter:
        drawn, killer = [], Killer(augmenter, seed=1)
        for number, batch in enumerate(itertools.islice(augmenter, n)):
            drawn.append(tuple(batch["drawn"]))
            if kills and number % 7 == 3:
                killer.strike()
        return drawn


@pytest.mark.parametrize("name", OWNERS)
def test_the_stream_is_the_same_for_any_number_of_workers_start_method_and_deaths(name: str) -> None:
    expected = _stream(OWNERS[name]())
    assert len(set(expected)) == len(expected), "each ticket draws its own"
    assert _stream(OWNERS[name](), workers=3, kills=True) == expected
    assert _stream(OWNERS[name](), workers=2, start_method="forked") == expected
    assert _stream(OWNERS[name](), stream=1) != expected


def test_a_generator_that_is_a_loader() -> None:
    expected = _stream((generator(), None))
    assert len(set(expected)) == len(expected)
    assert _stream((generator(), None), workers=3) == expected


def test_what_is_made_anew_for_each_batch_is_not_controlled() -> None:
    assert _stream((Anew(), None)) != _stream((Anew(), None))


def test_the_global_generators_are_not_taken_for_owned_ones() -> None:
    loader = RandomLoader()
    loader.rngs = [np.random.mtrand._rand, random._inst, torch.default_generator]  # type: ignore[attr-defined]
    assert len(OwnedGenerators(loader)) == 0


def test_two_of_one_loader_are_not_correlated() -> None:
    drawn = np.array(_stream((InAttribute(), None), 300))
    drawn[:, 1] = np.argsort(np.argsort(drawn[:, 1])) / len(drawn)
    correlation = np.corrcoef(drawn.T)
    assert np.abs(correlation[~np.eye(4, dtype=bool)]).max() < 0.2
