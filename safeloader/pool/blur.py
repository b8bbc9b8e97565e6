"""Makes batchgeneratorsv2's `GaussianBlurTransform(benchmark=True)` compute the same in every process.

nnU-Net's augmentation blurs with that transform. For each size of image and kernel it measures, once per process,
whether a convolution by FFT or a direct one is faster, and keeps to that. The two differ in float rounding. So the one
thing in a batch that does not follow from its seed is which of them the clock preferred in the worker that made it:
another worker, a replacement, or the next run may decide otherwise.

Here the choice is taken from the clock: always the direct convolution, which is what `benchmark=False` means,
upstream's default. Nothing else changes: the same parameters are drawn, the same kernels are built. For nnU-Net's
kernels (sigma 0.5 to 1) the direct convolution is the faster one anyway; the numbers are in ARCHITECTURE.md.

It is done where the loader has arrived in the nursery, so that every worker and every replacement inherits it; the
trainer's own loader stays as it is. A transform that only comes into being later, in the worker, is not found.
"""

from __future__ import annotations

from typing import Any, Final

from safeloader.pool.walk import attributes_of, classes_of, name_of, walk

NOTICE: Final = (
    "GaussianBlurTransform(benchmark=True) would choose between FFT and direct convolution by timing them in each "
    "process: it always takes the direct convolution, so that batches are the same in every process."
)
"""For the log, where there are such transforms."""


def chooses_by_timing(*roots: object) -> bool:
    """Whether there is such a transform in these objects."""
    return any(_choice_of(thing) is not None for thing in walk(*roots))


def always_convolve_directly(*roots: object) -> int:
    """Take the choice from the clock in all such transforms in these objects; returns how many there were."""
    choices = [choice for thing in walk(*roots) if (choice := _choice_of(thing)) is not None]
    for choice in choices:
        choice["benchmark"] = False
    return len(choices)


def _choice_of(thing: object) -> dict[str, Any] | None:
    """The attributes of a transform that chooses by timing; None for anything else.

    It is known by its name, since the pool imports no augmentation library, and by the attributes of the mechanism: a
    version that works in another way is left alone.
    """
    names = (name_of(cls) for cls in classes_of(thing))
    if not any(name.startswith("batchgeneratorsv2.") and name.endswith(".GaussianBlurTransform") for name in names):
        return None
    attributes = attributes_of(thing)
    timed = attributes.get("benchmark") is True and type(attributes.get("benchmark_use_fft")) is dict
    return attributes if timed else None
