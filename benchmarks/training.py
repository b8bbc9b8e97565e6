"""A training's two loaders, started as nnU-Net starts them: all train workers and half as many for validation.

nnU-Net makes both and then takes a batch of each, the train one first. Both have the training's loader here;
validation's own does less to its batches.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import psutil
import torch

from benchmarks import brain
from benchmarks.peers import PEERS, Running

LOADER_SIZES: Final[Mapping[str, int | float | str]] = {"data": "full", "configuration": "3d_fullres", "train": 12}
"""Which dataset of `brain`, which configuration, how many train workers; nnU-Net has 12 by default."""
TINY_LOADER_SIZES: Final[Mapping[str, int | float | str]] = {
    "data": "tiny",
    "configuration": brain.CONFIGURATIONS["tiny"][0],
    "train": 2,
}

_LOOK_EVERY_S: Final = 0.5
_QUIET_CORES: Final = 0.5
"""The stock class's workers ask every 2 ms whether there is room: 18 of them need 0.2 of a core for it."""
_QUIET_WITHIN_S: Final = 600.0


@dataclass(frozen=True)
class Pools:
    """Both loaders, running."""

    train: Running
    validation: Running

    def close(self) -> None:
        """End both."""
        self.train.close()
        self.validation.close()


def train_pool(contestant: str, loader: Any, workers: int) -> Running:
    """The train loader with nnU-Net's rule for its cache; most contestants start no worker before the first `next`."""
    return PEERS[contestant](loader, workers, max(6, workers // 2))


def start(contestant: str, loader: Any, workers: int) -> Pools:
    """Start both and take a batch of each."""
    train = train_pool(contestant, loader, workers)
    validation = PEERS[contestant](loader, max(1, workers // 2), max(3, workers // 4))
    next(train)
    next(validation)
    return Pools(train, validation)


def touch_gpu() -> None:
    """A trainer has a CUDA context, where it has a GPU, before its loaders start."""
    if torch.cuda.is_available():
        torch.zeros(1, device="cuda")


def wait_until_quiet() -> None:
    """Wait until this process and its children do nothing any more: all that may be made ahead is made.

    Raises:
        TimeoutError: they still work after ten minutes.
    """
    deadline = time.monotonic() + _QUIET_WITHIN_S
    before, quiet = _cpu_s(), 0
    while quiet < 4:
        time.sleep(_LOOK_EVERY_S)
        now = _cpu_s()
        used_s = sum(max(0.0, seconds - before.get(pid, 0.0)) for pid, seconds in now.items())
        quiet = quiet + 1 if used_s < _QUIET_CORES * _LOOK_EVERY_S else 0
        before = now
        if time.monotonic() > deadline:
            raise TimeoutError(f"the loaders still work after {_QUIET_WITHIN_S:.0f} s")


def _cpu_s() -> dict[int, float]:
    """CPU time by pid: of this process and all below it."""
    found = {}
    me = psutil.Process()
    for process in [me, *me.children(recursive=True)]:
        try:
            spent = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        found[process.pid] = spent.user + spent.system
    return found
