"""One rank of a DDP training over gloo, started by `test_compile_guard_ddp.py` with its number and a folder.

Each training is one entry of `TRAININGS`; what became of it is written to `FOLDER/RANK.json`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn

from safeloader.nnunet.compiled import is_compiled
from tests.nnunet.toy_trainer import PlainTrainer, ToyTrainer, backend, nothing, with_a_compiler

RANKS = 2


TRAININGS: dict[str, Callable[[], PlainTrainer]] = {
    "eager": lambda: PlainTrainer(nn.InstanceNorm2d),
    "network": lambda: ToyTrainer(nn.InstanceNorm2d, backend=backend(with_a_compiler)),
    "loss": lambda: ToyTrainer(nn.InstanceNorm2d, backend=backend(nothing), loss_backend=backend(with_a_compiler)),
    "validation": lambda: ToyTrainer(nn.InstanceNorm2d, backend=backend(nothing, in_validation=with_a_compiler)),
    "none": lambda: ToyTrainer(nn.InstanceNorm2d, backend=backend(nothing)),
}


@dataclass
class Became:
    losses: list[float]
    weights: str
    compiled: bool
    log: list[str]


def became(make: Callable[[], PlainTrainer]) -> Became:
    torch._dynamo.reset()
    trainer = make()
    losses = [*trainer.train(2), *trainer.train(1, first=5)]
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.network.parameters()])
    compiled = is_compiled(trainer.network) or is_compiled(trainer.loss)
    return Became(losses, hashlib.sha256(weights.numpy().tobytes()).hexdigest(), compiled, trainer.log)


def main(rank: int, folder: Path) -> None:
    store = f"file://{folder / 'store'}"
    wait = timedelta(seconds=60)  # a rank that waits for one that does not come fails, and so does the test
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=wait)
    result: dict[str, Any] = {name: asdict(became(make)) for name, make in TRAININGS.items()}
    (folder / f"{rank}.json").write_text(json.dumps(result))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
