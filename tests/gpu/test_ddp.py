"""nnU-Net's own distributed training, `nnUNetv2_train -num_gpus 2`, with a worker killed: needs two GPUs."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch

from safeloader.cli.demo.killing import Killer
from safeloader.cli.demo.processes import CommandProcess, tail
from safeloader.nnunet.short import SAFE_TRAINER, read_steps, write_trainers
from safeloader.nnunet.workspace import Workspace
from tests.workspaces import beside

GPUS = 2
EPOCHS, ITERATIONS, VAL_ITERATIONS = 2, 100, 5

pytestmark = pytest.mark.skipif(
    torch.cuda.device_count() < GPUS,
    reason=f"nnU-Net's -num_gpus {GPUS} needs as many GPUs; torch finds {torch.cuda.device_count()}",
)


def test_all_ranks_train_on_while_workers_are_killed(brain: Workspace, tmp_path: Path) -> None:
    workspace = beside(brain, tmp_path)
    write_trainers(workspace.trainers, epochs=EPOCHS, iterations=ITERATIONS, val_iterations=VAL_ITERATIONS)
    command = workspace.train_command(SAFE_TRAINER, "-num_gpus", str(GPUS), device="cuda")
    output, log = workspace.output_folder(SAFE_TRAINER), tmp_path / "console.log"
    with CommandProcess(command, workspace.environment(), log) as training:
        killer = Killer(training.pid, (signal.SIGKILL,), every_s=1.0, limit=3)
        while (returncode := training.wait(0.2)) is None:
            steps = read_steps(output)
            if steps:
                killer.tick(steps[-1].workers)
    assert returncode == 0, tail(log, 30)
    assert killer.kills
    assert len(read_steps(output)) == GPUS * EPOCHS * (ITERATIONS + VAL_ITERATIONS)
    assert (output / "validation" / "summary.json").exists()
