"""The loaders that the benchmarks with kills run: nnU-Net's own, and one whose work is known exactly.

A load is named in the options: a configuration of nnU-Net (`3d_fullres`, `2d`; `3d_small` is of the tiny dataset), or
`burn`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import torch

from benchmarks import brain
from safeloader.nnunet.workspace import SMALL_CONFIGURATION, Workspace

BURN: Final = "burn"
BURN_MS: Final = 20.0
TIMING: Final = "timing"
"""The key under which `Timed` puts a batch's times."""


def names(option: str) -> list[str]:
    """The loads of an option, `3d_fullres,burn`."""
    return [name.strip() for name in option.split(",")]


def title(load: str) -> str:
    """What tables call it."""
    return f"a loop of {BURN_MS:g} ms" if load == BURN else f"nnU-Net {load}"


def prepare(loads: Sequence[str]) -> None:
    """Make the datasets that these need."""
    for load in loads:
        if load != BURN:
            workspace(load)


def make(load: str) -> Any:
    """A new loader."""
    return Burn(BURN_MS / 1000) if load == BURN else brain.loader(_size(load), load)


def workspace(configuration: str) -> Workspace:
    """The dataset that has this configuration; made if it is not there yet."""
    return brain.workspace(_size(configuration))


def _size(configuration: str) -> str:
    """Which of `brain`'s datasets has this configuration."""
    return "tiny" if configuration == SMALL_CONFIGURATION else "full"


class Burn:
    """Batches of a kilobyte that cost their worker so much CPU.

    CPU time, not time: on a machine that others use as well, the work stays the same.
    """

    def __init__(self, cpu_s: float) -> None:
        self._cpu_s = cpu_s

    def set_thread_id(self, thread_id: int) -> None:
        """The stock class asks for it."""

    def __iter__(self) -> Burn:
        return self

    def __next__(self) -> dict[str, Any]:
        begun = time.process_time()
        while time.process_time() - begun < self._cpu_s:
            pass
        return {"data": torch.from_numpy(np.random.standard_normal(128)), "keys": ["case_1"]}


class Timing(NamedTuple):
    """When a batch was made, on the clock that all processes since boot share.

    Attributes:
        pid: the worker's.
        number: how many batches it had made before.
        begun_s: when `next(loader)` was called. ended_s: when it returned.
    """

    pid: int
    number: int
    begun_s: float
    ended_s: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.ended_s - self.begun_s


class Timed:
    """Another loader's batches, each with its `Timing`."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader
        self._made = 0

    def set_thread_id(self, thread_id: int) -> None:
        """Tell the loader which worker it is in."""
        self._loader.set_thread_id(thread_id)

    def __iter__(self) -> Timed:
        return self

    def __next__(self) -> dict[str, Any]:
        begun_s = time.monotonic()
        batch: dict[str, Any] = next(self._loader)
        batch[TIMING] = Timing(os.getpid(), self._made, begun_s, time.monotonic())
        self._made += 1
        return batch
