"""What we make of batchgeneratorsv2's blur is what upstream computes with `benchmark=False`, bit for bit.

The two implementations that upstream's transform chooses from differ in float rounding: the first test says so, and
gives the others their meaning.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.noise import gaussian_blur
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform, blur_dimension
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform

from safeloader import SafeAugmenter
from safeloader.pool import blur, nursery
from safeloader.pool.seeding import seed_everything

SHAPES = [(2, 20, 24, 28), (1, 64, 48), (3, 100)]


def stock(*, decided: bool | None = None, **options: Any) -> GaussianBlurTransform:
    """nnU-Net's, which may have decided by the clock already: for FFT (True) or the direct convolution (False)."""
    transform = GaussianBlurTransform(
        **{"blur_sigma": (0.5, 1.0), "p_per_channel": 1, "benchmark": True, "synchronize_channels": False, **options}
    )
    if decided is not None:
        sizes = {size for shape in SHAPES for size in shape[1:]}
        transform.benchmark_use_fft = {size: dict.fromkeys((1, 3, 5), decided) for size in sizes}
    return transform


def image(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1))


def blurred(transform: GaussianBlurTransform, shape: tuple[int, ...]) -> torch.Tensor:
    seed_everything(3, 0, 0)
    result = transform(image=image(shape))["image"]
    assert isinstance(result, torch.Tensor)
    return result


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_two_processes_that_decided_otherwise_differ_in_rounding(shape: tuple[int, ...]) -> None:
    by_fft, directly = blurred(stock(decided=True), shape), blurred(stock(decided=False), shape)
    assert not torch.equal(by_fft, directly)
    assert torch.allclose(by_fft, directly, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("synchronize_channels", [False, True])
@pytest.mark.parametrize("decided", [None, False, True])
def test_what_is_computed_is_upstreams_direct_convolution(
    shape: tuple[int, ...], synchronize_channels: bool, decided: bool | None
) -> None:
    options = {"synchronize_channels": synchronize_channels, "p_per_channel": 0.7 if shape[0] > 1 else 1}
    transform = stock(decided=decided, **options)
    assert blur.always_convolve_directly(transform) == 1
    result, drawn = blurred(transform, shape), (torch.rand(3), np.random.rand(3))

    seed_everything(3, 0, 0)
    expected = image(shape)
    parameters = stock(**options).get_parameters(image=expected)
    channels = np.where(parameters["apply_to_channel"])[0]
    assert len(channels), "nothing would be compared"
    for place, channel in enumerate(channels):
        one = expected[channel : channel + 1]
        for axis, sigma in enumerate(parameters["sigmas"] if synchronize_channels else parameters["sigmas"][place]):
            one = blur_dimension(one, sigma, axis, force_use_fft=False)
        expected[channel : channel + 1] = one
    assert torch.equal(result, expected)
    assert torch.equal(drawn[0], torch.rand(3)) and np.array_equal(drawn[1], np.random.rand(3)), "as many numbers drawn"


def test_no_clock_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    def time() -> float:
        raise AssertionError("it looked at the clock")

    monkeypatch.setattr(gaussian_blur, "time", time)
    with pytest.raises(AssertionError, match="it looked at the clock"):
        blurred(stock(), SHAPES[0])
    transform = stock()
    blur.always_convolve_directly(transform)
    blurred(transform, SHAPES[0])


def test_all_of_them_are_found_in_a_loader_like_nnunets() -> None:
    transforms = [stock(), stock(), stock(benchmark=False)]
    loader = SimpleNamespace(
        transforms=functools.partial(ComposeTransforms([RandomTransform(transforms[0], 0.2), transforms[2]])),
        nested=[{"more": RandomTransform(transforms[1])}],
    )
    assert blur.chooses_by_timing(loader)
    assert blur.always_convolve_directly(loader) == 2
    assert not blur.chooses_by_timing(loader)
    assert [transform.benchmark for transform in transforms] == [False] * 3


class Derived(GaussianBlurTransform):  # type: ignore[misc]
    """A user's own variant."""


def test_a_class_derived_from_it_is_one() -> None:
    assert blur.chooses_by_timing(Derived(benchmark=True))


def _without(name: str) -> GaussianBlurTransform:
    transform = stock()
    delattr(transform, name)
    return transform


class OfSomebodyElse:
    def __init__(self) -> None:
        self.benchmark, self.benchmark_use_fft = True, {}


OfSomebodyElse.__name__ = "GaussianBlurTransform"


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: _without("benchmark"), id="no benchmark"),
        pytest.param(lambda: _without("benchmark_use_fft"), id="no table"),
        pytest.param(lambda: stock(benchmark=False), id="does not measure"),
        pytest.param(OfSomebodyElse, id="another library's"),
        pytest.param(lambda: GaussianBlurTransform, id="the class itself"),
    ],
)
def test_what_works_in_another_way_is_left_alone(make: Callable[[], Any]) -> None:
    thing = make()
    before = dict(vars(thing))
    assert not blur.chooses_by_timing(thing)
    assert blur.always_convolve_directly(thing) == 0
    assert dict(vars(thing)) == before


# ---- through the pool ----


class Blurring:
    """A loader whose process has decided already."""

    def __init__(self, decided: bool) -> None:
        self.transform = stock(decided=decided)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self.transform(image=torch.rand(SHAPES[0]))


def _stream(loader: Blurring, transform: Callable[..., Any] | None = None, start_method: str = "auto") -> list[bytes]:
    with SafeAugmenter(loader, transform, 2, 2, seed=4, start_method=start_method) as augmenter:
        return [next(augmenter)["image"].numpy().tobytes() for _ in range(4)]


@pytest.mark.usefixtures("warm_nursery")
@pytest.mark.parametrize("start_method", ["clean", "forked"])
def test_workers_compute_the_same_whatever_the_clock_would_say(start_method: str) -> None:
    by_fft, directly = Blurring(decided=True), Blurring(decided=False)
    assert _stream(by_fft, start_method=start_method) == _stream(directly, start_method=start_method)
    assert by_fft.transform.benchmark is True, "the trainer's own is as it was"


@pytest.mark.usefixtures("warm_nursery")
def test_without_it_they_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nursery, "always_convolve_directly", lambda *_: 0)
    assert _stream(Blurring(decided=True), start_method="forked") != _stream(Blurring(decided=False))


@pytest.mark.usefixtures("warm_nursery")
def test_the_log_says_so_once(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    caplog.set_level(logging.INFO, logger="safeloader")
    with SafeAugmenter(Blurring(decided=True), None, 1, 1, seed=4, name="train") as augmenter:
        next(augmenter)
        augmenter.restart()
        next(augmenter)
    assert [r.getMessage() for r in caplog.records if "Gaussian" in r.getMessage()] == [f"pool 'train': {blur.NOTICE}"]
