"""A distributed training of nnU-Net's trainer on the CPU: `python -m tests.nnunet.ddp DATASET FOLDER`.

DATASET is a preprocessed dataset's folder.

nnU-Net starts its ranks with `mp.spawn` and insists on CUDA in each. Here they are started in the same way, talk over
gloo, and train on the CPU; nothing else of the trainer is changed. Rank 1's workers are killed and stopped while it
trains. Each rank writes what it has seen into `FOLDER/rank0.json`, `rank1.json`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing

from safeloader.nnunet.short import ShortTraining
from tests.streams import digest

RANKS = 2
DISTURBED = 1
EPOCHS, ITERATIONS, VAL_ITERATIONS = 2, 6, 2
STRIKES = {2: signal.SIGKILL, 4: signal.SIGSEGV, 6: signal.SIGSTOP, 8: signal.SIGKILL}
"""Before the training step of that number (from 1) of the disturbed rank."""
HANG_S = 2.0


class Witness(ShortTraining):
    """Notes each training batch's digest, and strikes workers of the disturbed rank."""

    epochs, iterations, val_iterations = EPOCHS, ITERATIONS, VAL_ITERATIONS

    def initialize(self) -> None:
        self.seen: list[str] = []
        self.validated = 0
        self.struck: list[str] = []
        self.pids: list[int] = []
        super().initialize()

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.seen.append(digest(batch))
        self.hang_most_s = self.dataloader_train._pool.machine.limits.hang.most_s
        number = STRIKES.get(len(self.seen))
        if number is not None and self.local_rank == DISTURBED:
            self.strike(number)
        if len(self.seen) > min(at for at, deed in STRIKES.items() if deed is signal.SIGSTOP):
            time.sleep(HANG_S / 2)  # as long as a step on a larger network: the hang is found while there are some
        return super().train_step(batch)

    def strike(self, number: signal.Signals) -> None:
        """The first that was not struck before: tickets go to the first who idles, so a stopped one is missed."""
        free = [worker.pid for worker in self.dataloader_train.workers() if worker.pid not in (None, *self.pids)]
        os.kill(free[0], number)
        self.pids.append(free[0])
        self.struck.append(number.name)

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        self.validated += 1
        return super().validation_step(batch)


def trainer_class() -> Any:
    """The trainer, in a process that may take the time to import nnU-Net."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import DDP, nnUNetTrainer

    from safeloader.nnunet.loaders import namespaces, replaced
    from safeloader.nnunet.mixin import SafeLoaderMixin

    class OnCpu(nnUNetTrainer):  # type: ignore[misc]
        def __init__(
            self,
            plans: dict[str, Any],
            configuration: str,
            fold: int,
            dataset_json: dict[str, Any],
            device: torch.device = torch.device("cpu"),  # noqa: B008 - nnU-Net reads this signature
        ) -> None:
            super().__init__(plans, configuration, fold, dataset_json, device)
            self.device = torch.device("cpu")
            self.grad_scaler = None

        def initialize(self) -> None:
            (namespace,) = namespaces(nnUNetTrainer, "initialize")
            with replaced(namespace, {"DDP": lambda network, device_ids: DDP(network)}):
                super().initialize()

    class Distributed(SafeLoaderMixin, Witness, OnCpu):  # type: ignore[misc]
        pass

    return Distributed


def train(rank: int, preprocessed: Path, folder: Path) -> None:
    """One rank, as nnU-Net's `run_ddp`."""
    rendezvous = f"file://{folder / 'rendezvous'}"
    distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS)
    torch.set_num_threads(1)
    torch.manual_seed(rank)  # DDP gives all ranks the weights of the first
    plans, dataset = (json.loads((preprocessed / name).read_text()) for name in ("nnUNetPlans.json", "dataset.json"))
    plans["continue_training"] = False
    trainer = trainer_class()(plans, "3d_small", 0, dataset)
    trainer.run_training()
    weights = {name: tensor.numpy().tobytes().hex() for name, tensor in trainer.network.module.state_dict().items()}
    report = trainer.dataloader_train.report()
    seen = {
        "seen": trainer.seen,
        "validated": trainer.validated,
        "struck": trainer.struck,
        "weights": weights,
        "restarts": report.restarts,
        "seed": report.seed,
        "streams": [loader.report().stream for loader in (trainer.dataloader_train, trainer.dataloader_val)],
        "hang_most_s": trainer.hang_most_s,
    }
    (folder / f"rank{rank}.json").write_text(json.dumps(seen))
    distributed.destroy_process_group()


if __name__ == "__main__":
    from tests.nnunet import ddp  # under its own name, so that the ranks find it

    multiprocessing.spawn(ddp.train, args=(Path(sys.argv[1]), Path(sys.argv[2])), nprocs=RANKS, join=True)
