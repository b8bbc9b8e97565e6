"""The stream of batches that nnU-Net's own trainer gets from us, as digests, with workers killed on the way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from safeloader.faults.cpus import CpuBudget
from safeloader.nnunet.workspace import Workspace
from safeloader.testing import DEADLY, Killer, wait_until

SEED = 6


@dataclass(frozen=True)
class Stream:
    """One run: digests of the training and validation batches, and what was done to get them.

    Attributes:
        train: one digest per ticket, from ticket 1 on: nnU-Net draws the first batch by itself.
        val: the same of the validation.
        kills: workers that were killed.
        log: nnU-Net's training log.
    """

    train: tuple[str, ...]
    val: tuple[str, ...]
    kills: int
    log: str


def digest(batch: dict[str, Any]) -> str:
    """Of every bit of a batch: data, all targets with their shapes and types, keys."""
    hashed = hashlib.blake2b(digest_size=16)
    targets = batch["target"] if isinstance(batch["target"], list) else [batch["target"]]
    for tensor in (batch["data"], *targets):
        hashed.update(repr((tuple(tensor.shape), tensor.dtype)).encode())
        hashed.update(tensor.contiguous().numpy().tobytes())
    hashed.update(repr([str(key) for key in batch["keys"]]).encode())
    return hashed.hexdigest()


def read_stream(
    trainer_class: Callable[..., Any],
    workspace: Workspace,
    configuration: str,
    monkeypatch: pytest.MonkeyPatch,
    *,
    workers: int,
    tickets: int,
    val_tickets: int = 3,
    kill_every: int | None = None,
) -> Stream:
    """Have a trainer of its own build its loaders, as `nnUNetv2_train` does, and read from them.

    Args:
        trainer_class: an nnU-Net trainer with our mixin.
        workspace: with the preprocessed dataset.
        configuration: of the plans.
        monkeypatch: for nnU-Net's environment.
        workers: of the training; the validation has half as many.
        tickets: training batches to read. val_tickets: validation batches.
        kill_every: after so many training batches a worker is killed, each time by another signal.
    """
    environment = {"nnUNet_n_proc_DA": str(workers), "SAFELOADER_SEED": str(SEED), "SAFELOADER_ON_BAD_CASE": "retry"}
    for name, value in workspace.environment(environment).items():
        monkeypatch.setenv(name, value)
    # As many workers as are asked for, however many CPUs this machine has.
    monkeypatch.setattr("safeloader.nnunet.mixin.available_cpus", lambda: CpuBudget(workers, "as the test wants"))
    folder = workspace.preprocessed / workspace.dataset
    plans = json.loads((folder / "nnUNetPlans.json").read_text())
    plans["continue_training"] = False
    dataset = json.loads((folder / "dataset.json").read_text())
    trainer = trainer_class(plans, configuration, 0, dataset, device=torch.device("cpu"))
    trainer.initialize()
    train, val = trainer.get_dataloaders()
    with train, val:
        val_digests = tuple(digest(next(val)) for _ in range(val_tickets))
        val.close()
        killer, digests = Killer(train, seed=workers, signals=DEADLY), []
        for ticket in range(1, tickets + 1):
            digests.append(digest(next(train)))
            if kill_every is not None and ticket % kill_every == 0:
                wait_until(killer.strike, what="a worker that can be killed")
        restarts = train.report().restarts
    trainer._safeloader.close()
    assert restarts <= len(killer.kills), "nobody else died"
    return Stream(tuple(digests), val_digests, len(killer.kills), Path(trainer.log_file).read_text())
