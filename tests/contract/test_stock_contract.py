"""What holds for the stock augmenter holds for ours: the same tests over both classes."""

from __future__ import annotations

import inspect
import itertools
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter

from safeloader import SafeAugmenter
from safeloader.testing import wait_until
from tests.loaders import RandomLoader
from tests.processes import children

pytestmark = pytest.mark.usefixtures("warm_nursery")


@pytest.fixture(params=[NonDetMultiThreadedAugmenter, SafeAugmenter], ids=["stock", "ours"])
def augmenter_class(request: pytest.FixtureRequest) -> Any:
    return request.param


class Repeating(RandomLoader):
    """Every batch is what `make` returns."""

    def __init__(self, make: Callable[[], Any]) -> None:
        super().__init__()
        self.make = make

    def __next__(self) -> Any:
        return self.make()


@dataclass
class Sample:
    name: str
    image: np.ndarray[Any, Any]


def _read_only() -> np.ndarray[Any, Any]:
    array = np.arange(6000.0)
    array.flags.writeable = False
    return array


VALUES: dict[str, Callable[[], Any]] = {
    "float32 tensor": lambda: torch.arange(24, dtype=torch.float32).reshape(2, 3, 4),
    "int16 tensor": lambda: torch.arange(-3, 3, dtype=torch.int16),
    "bool tensor": lambda: torch.tensor([[True], [False]]),
    "float16 tensor": lambda: torch.linspace(0, 1, 5000, dtype=torch.float16),
    "bfloat16 tensor": lambda: torch.linspace(0, 1, 5000, dtype=torch.bfloat16),
    "complex tensor": lambda: torch.linspace(0, 1, 5000).to(torch.complex64).conj(),
    "0-dim tensor": lambda: torch.tensor(3.5),
    "zero-size tensor": lambda: torch.zeros(2, 0, 3),
    "non-contiguous tensor": lambda: torch.arange(20000).reshape(100, 200).t()[::3],
    "channels last": lambda: torch.rand(2, 3, 40, 40).zero_().contiguous(memory_format=torch.channels_last),
    "expanded tensor": lambda: torch.arange(5000).expand(3, 5000),
    "list of tensors": lambda: [torch.zeros(2, 2), torch.ones(1, dtype=torch.int16), torch.ones(3).bool()],
    "float64 array": lambda: np.arange(6000.0).reshape(2, -1),
    "int16 array": lambda: np.arange(6000, dtype=np.int16),
    "bool array": lambda: np.array([True, False]),
    "float16 array": lambda: np.arange(6000, dtype=np.float16),
    "big-endian array": lambda: np.arange(6000, dtype=">f4"),
    "structured array": lambda: np.array([(1, 2.5)] * 900, dtype=[("a", "i4"), ("b", "f8")]),
    "string array": lambda: np.array(["case_001", "case_002"]),
    "object array": lambda: np.array([{"spacing": (1.0, 1.0)}, None, "x"], dtype=object),
    "0-dim array": lambda: np.array(7),
    "zero-size array": lambda: np.zeros((0, 3)),
    "non-contiguous array": lambda: np.arange(20000).reshape(100, 200).T[::3, ::-1],
    "Fortran array": lambda: np.asfortranarray(np.arange(6000.0).reshape(60, 100)),
    "read-only array": _read_only,
    "masked array": lambda: np.ma.masked_equal(np.arange(6000), 3),
    "NumPy scalar": lambda: np.float32(2.5),
    "nested": lambda: {"a": [1, (2.5, None, "ä"), {"b": b"bytes", (1, 2): {3, 4}}], "c": OrderedDict(x=1j)},
    "dataclass": lambda: Sample("case_001", np.arange(6000)),
    "None": lambda: None,
    "function": lambda: np.mean,
}


def _equal(got: Any, expected: Any) -> bool:
    if type(got) is not type(expected):
        return False
    if isinstance(expected, torch.Tensor):
        return got.dtype == expected.dtype and got.shape == expected.shape and torch.equal(got, expected)
    if isinstance(expected, np.ndarray):
        # The stock class may bring another byte order.
        same = got.dtype.newbyteorder("=") == expected.dtype.newbyteorder("=") and got.shape == expected.shape
        return same and bool(np.array_equal(np.asarray(got), np.asarray(expected)))
    if isinstance(expected, (list, tuple)):
        return len(got) == len(expected) and all(map(_equal, got, expected))
    if isinstance(expected, dict):
        return list(got) == list(expected) and all(_equal(got[key], expected[key]) for key in expected)
    if isinstance(expected, Sample):
        return got.name == expected.name and _equal(got.image, expected.image)
    return bool(got == expected)


# ---- what a batch may be ----


def test_every_kind_of_value_arrives_as_it_was(augmenter_class: Any) -> None:
    expected = {name: make() for name, make in VALUES.items()}
    augmenter = augmenter_class(Repeating(lambda: {name: make() for name, make in VALUES.items()}), None, 1, 1)
    for _ in range(5):
        batch = next(augmenter)
        assert list(batch) == list(expected)
        for name in VALUES:
            assert _equal(batch[name], expected[name]), name
    augmenter._finish()


def test_everything_that_arrives_can_be_written(augmenter_class: Any) -> None:
    augmenter = augmenter_class(Repeating(lambda: {name: make() for name, make in VALUES.items()}), None, 1, 1)
    batch = next(augmenter)
    for name, value in batch.items():
        if isinstance(value, np.ndarray):
            assert value.flags.writeable, name
            value[...] = value
        if isinstance(value, torch.Tensor) and name != "expanded tensor":
            value.copy_(value.clone())
    augmenter._finish()


@pytest.mark.parametrize("batch", [{"data": 1}, [1, 2], (torch.zeros(2), "x"), "text", None, 5, np.zeros(3)])
def test_a_batch_need_not_be_a_dict(augmenter_class: Any, batch: Any) -> None:
    if batch is None and augmenter_class is NonDetMultiThreadedAugmenter:
        pytest.skip("the stock class takes None for no batch, and waits for ever")
    augmenter = augmenter_class(Repeating(lambda: batch), None, 1, 1)
    assert _equal(next(augmenter), batch)
    augmenter._finish()


class Growing(RandomLoader):
    """Batches from nothing to 4 MB, up and down."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = itertools.cycle([1, 1000, 0, 1_000_000, 10, 100_000])

    def __next__(self) -> dict[str, Any]:
        n = next(self.sizes)
        return {"n": n, "tensor": torch.full((n,), n, dtype=torch.float32), "array": np.full(n, n, dtype=np.int32)}


def test_batches_of_changing_size(augmenter_class: Any) -> None:
    augmenter = augmenter_class(Growing(), None, 2, 2)
    seen = set()
    for _ in range(40):
        batch = next(augmenter)
        seen.add(batch["n"])
        assert batch["tensor"].shape == batch["array"].shape == (batch["n"],)
        assert (batch["tensor"] == batch["n"]).all() and (batch["array"] == batch["n"]).all()
    assert len(seen) == 6
    augmenter._finish()


def test_the_transform_is_called_with_the_batch_as_keywords(augmenter_class: Any) -> None:
    def transform(data: torch.Tensor, keys: list[str], **others: Any) -> dict[str, Any]:
        return {"sum": data.sum() - data.sum(), "keys": [key.upper() for key in keys], "others": sorted(others)}

    augmenter = augmenter_class(RandomLoader(), transform, 2, 2)
    batch = next(augmenter)
    assert batch["sum"] == 0 and batch["others"] == ["draw", "seg"] and batch["keys"][0].startswith("CASE_")
    augmenter._finish()


class SayWho(RandomLoader):
    """Each batch takes so long that all workers are needed."""

    def __next__(self) -> Any:
        time.sleep(0.05)
        return self.thread_id


def test_each_worker_has_its_thread_id(augmenter_class: Any) -> None:
    augmenter = augmenter_class(SayWho(), None, 3, 2)
    seen: set[int] = set()
    wait_until(lambda: seen.add(next(augmenter)) or seen == {0, 1, 2})  # type: ignore[func-returns-value]
    augmenter._finish()


# ---- the interface ----


def test_positional_arguments_and_attributes(augmenter_class: Any) -> None:
    loader, transform = RandomLoader(), _identity
    augmenter = augmenter_class(loader, transform, 2, 3, [4, 5], True, 0.05)
    assert augmenter.generator is loader
    assert augmenter.transform is transform
    assert (augmenter.num_processes, augmenter.num_cached, augmenter.pin_memory) == (2, 3, True)
    assert (augmenter.seeds, augmenter.wait_time, augmenter.initialized) == ([4, 5], 0.05, False)
    assert isinstance(augmenter, NonDetMultiThreadedAugmenter)
    augmenter._finish()


def _identity(**batch: Any) -> dict[str, Any]:
    return batch


def test_keyword_arguments_and_defaults(augmenter_class: Any) -> None:
    augmenter = augmenter_class(
        data_loader=RandomLoader(), transform=None, num_processes=2, num_cached=1, seeds=None, pin_memory=False,
        wait_time=0.02,
    )  # fmt: skip
    assert (augmenter.transform, augmenter.seeds) == (None, [None, None])
    assert augmenter_class(RandomLoader(), None, 1).num_cached == 2


def test_our_constructor_is_the_stock_one_and_keywords() -> None:
    stock = list(inspect.signature(NonDetMultiThreadedAugmenter.__init__).parameters.values())
    ours = list(inspect.signature(SafeAugmenter.__init__).parameters.values())
    assert [(p.name, p.default, p.kind) for p in ours[: len(stock)]] == [(p.name, p.default, p.kind) for p in stock]
    assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in ours[len(stock) :])


def test_iteration_and_next(augmenter_class: Any) -> None:
    augmenter = augmenter_class(RandomLoader(), None, 1, 2)
    assert iter(augmenter) is augmenter
    for batch, _ in zip(augmenter, range(3), strict=False):
        assert batch["data"].shape == (2, 1, 8, 8, 8)
    assert augmenter.next()["seg"].dtype == np.int16
    augmenter._finish()


def _workers() -> int:
    return len({*children(recursive=True)} - {*children("sl-nursery")})


def test_workers_start_with_the_first_next(augmenter_class: Any) -> None:
    augmenter = augmenter_class(RandomLoader(), None, 2, 2)
    assert (augmenter.initialized, _workers()) == (False, 0)
    next(augmenter)
    assert augmenter.initialized
    wait_until(lambda: _workers() == 2)
    augmenter._finish()
    assert not augmenter.initialized


def test_start_and_finish_may_be_called_twice(augmenter_class: Any) -> None:
    augmenter = augmenter_class(RandomLoader(), None, 2, 2)
    augmenter._finish()
    augmenter._start()
    augmenter._start()
    assert augmenter.initialized
    next(augmenter)
    wait_until(lambda: _workers() == 2)
    augmenter._finish()
    augmenter._finish()
    assert _workers() == 0


@pytest.mark.parametrize("arguments", [{}, {"timeout": 10}, {"timeout": 2, "force": True}])
def test_both_upstream_signatures_of_finish(augmenter_class: Any, arguments: dict[str, Any]) -> None:
    augmenter = augmenter_class(RandomLoader(), None, 1, 2)
    next(augmenter)
    augmenter._finish(**arguments)
    assert (augmenter.initialized, _workers()) == (False, 0)
    next(augmenter)
    augmenter._finish(*arguments.values())
    assert (augmenter.initialized, _workers()) == (False, 0)


def test_restart(augmenter_class: Any) -> None:
    augmenter = augmenter_class(RandomLoader(), None, 2, 2)
    next(augmenter)
    augmenter.restart()
    assert augmenter.initialized
    next(augmenter)
    wait_until(lambda: _workers() == 2)
    augmenter._finish()
    augmenter.restart()
    next(augmenter)
    augmenter._finish()


def test_attributes_as_nnunet_saves_them(augmenter_class: Any) -> None:
    """`nnUNetTrainer._save_debug_information` writes these into debug.json."""
    augmenter = augmenter_class(RandomLoader(), _identity, 1, 2)
    for _ in range(2):
        saved = {name: str(getattr(augmenter, name)) for name in dir(augmenter) if not name.startswith("__")}
        assert "RandomLoader" in saved["generator"]
        assert "_identity" in saved["transform"]
        assert saved["num_processes"] == "1"
        next(augmenter)
    augmenter._finish()


def test_pinning_is_harmless_without_cuda(augmenter_class: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is CUDA")
    augmenter = augmenter_class(RandomLoader(), None, 1, 2, pin_memory=True)
    assert not next(augmenter)["data"].is_pinned()
    augmenter._finish()
