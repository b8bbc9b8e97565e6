"""The process that trains a few steps: `python -m safeloader.nnunet.bench.steps ORDER`, where ORDER is JSON.

Set up as `nnUNetv2_train` sets itself up. It writes a line of JSON when it is ready and after each step, so whoever
ends it knows how far it came.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import torch

from safeloader.nnunet.stock import Asked, loader_of, stock_trainer
from safeloader.nnunet.workspace import training_device
from safeloader.pool.process import die_with
from safeloader.runner import pinned

_WARM_UP: Final = {"cuda": 5, "cpu": 1}
"""Steps that are not counted: torch compiles, cuDNN chooses, memory is allocated."""

_LONG_STEP_S: Final = 10.0
"""Beside a step that takes longer, what is done once does not matter on a CPU."""


def main(order: dict[str, Any]) -> None:
    """Train on one batch until time is up.

    Args:
        order: `parent` (process id to be tied to), `seconds`, and `asked` (see `stock.Asked`).
    """
    die_with(order["parent"])
    device = training_device()
    torch.set_num_threads(1 if device == "cuda" else multiprocessing.cpu_count())
    torch.backends.cudnn.benchmark = True
    asked = Asked(**order["asked"])
    with stock_trainer(asked, device) as trainer:
        batch = next(loader_of(trainer, asked).loader)
        if device == "cuda":
            batch = pinned(batch)
        trainer.set_deep_supervision_enabled(trainer.enable_deep_supervision)
        trainer.network.train()
        name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
        _say(ready=time.monotonic(), device=name, gpu=device == "cuda")
        train(lambda: trainer.train_step(batch), _WARM_UP[device], order["seconds"])


def train(step: Callable[[], Any], warm_up: int, seconds: float) -> None:
    """Steps until `seconds` have passed since the warm-up; where the first takes longer by far, it is the only one."""
    done = 0
    started = time.monotonic()
    while done < warm_up or time.monotonic() - started < seconds:
        before = time.monotonic()
        step()
        took, done = time.monotonic() - before, done + 1
        alone = done == 1 and took > max(seconds, _LONG_STEP_S)
        _say(step_s=took, counts=done > warm_up or alone)
        if alone:
            return
        if done == warm_up:
            started = time.monotonic()


def _say(**line: Any) -> None:
    sys.stdout.write(f"{json.dumps(line)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
