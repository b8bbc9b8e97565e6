"""With a seed, the batches of nnU-Net's own trainer are the same bits in every run, whatever dies.

nnU-Net's stock augmentation, 2D and 3D, twice: with one worker that nobody disturbs, and with three that are killed.
Each of these runs has processes of its own. `tests/soak/test_bitwise.py` does it at full size.

Which implementation upstream's blur prefers in a process hangs on the clock. `Decided` stands for a run in which the
clock has decided, and shows that the streams do differ without what `pool/blur.py` does.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from safeloader.nnunet.workspace import Workspace
from safeloader.pool import blur, nursery
from safeloader.pool.walk import walk
from tests.streams import Stream, read_stream

TICKETS = 20
KILL_EVERY = 4


@pytest.fixture
def read(
    nnunet: ModuleType, make_workspace: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Stream]:
    """Reads a stream by a trainer whose blur has decided for FFT (True), the direct convolution (False), or not yet."""

    def read(configuration: str, *, decided: bool | None = None, **options: Any) -> Stream:
        trainer_class = nnunet.nnUNetTrainerSafeLoader
        if decided is not None:
            trainer_class = _decided(trainer_class, decided)
        return read_stream(trainer_class, make_workspace(), configuration, monkeypatch, tickets=TICKETS, **options)

    return read


def _decided(base: Any, by_fft: bool) -> Any:
    from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform

    class Decided(base):  # type: ignore[misc]
        @staticmethod
        def get_training_transforms(*args: Any, **kwargs: Any) -> Any:
            transforms = base.get_training_transforms(*args, **kwargs)
            (found,) = (thing for thing in walk(transforms) if isinstance(thing, GaussianBlurTransform))
            assert found.benchmark is True, "nnU-Net does not measure any more: these tests have no object"
            found.benchmark_use_fft = {size: dict.fromkeys((1, 3, 5), by_fft) for size in range(300)}
            return transforms

    return Decided


@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_the_same_bits_in_every_run(configuration: str, read: Callable[..., Stream]) -> None:
    undisturbed = read(configuration, workers=1)
    killed = read(configuration, workers=3, kill_every=KILL_EVERY)
    assert killed.kills == TICKETS // KILL_EVERY
    assert killed.train == undisturbed.train
    assert killed.val == undisturbed.val
    assert len(set(undisturbed.train)) == TICKETS
    for stream in (undisturbed, killed):
        assert stream.log.count(f"SafeLoader: {blur.NOTICE}") == 1


@pytest.mark.usefixtures("warm_nursery")
def test_whatever_the_clock_would_have_decided(read: Callable[..., Stream]) -> None:
    by_fft = read("3d_fullres", decided=True, workers=2)
    directly = read("3d_fullres", decided=False, workers=1)
    assert by_fft.train == directly.train


def test_without_it_two_runs_differ(read: Callable[..., Stream], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFELOADER_START_METHOD", "forked")  # so that the workers see what this test changes
    directly = read("3d_fullres", decided=False, workers=1)
    monkeypatch.setattr(nursery, "always_convolve_directly", lambda *_: 0)
    assert read("3d_fullres", decided=False, workers=2).train == directly.train
    by_fft = read("3d_fullres", decided=True, workers=2)
    differ = [
        ticket for ticket, pair in enumerate(zip(by_fft.train, directly.train, strict=True)) if len(set(pair)) > 1
    ]
    assert 0 < len(differ) < TICKETS, "those in which the blur was drawn"
    assert by_fft.val == directly.val, "the validation is not augmented"
