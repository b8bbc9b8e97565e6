"""A training that ends by an exception of its own, in a real `nnUNetv2_train`."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable

import psutil

from safeloader.nnunet.workspace import SMALL_CONFIGURATION, Workspace

FAILING = """
from safeloader.nnunet.mixin import SafeLoaderMixin
from short_trainers import nnUNetTrainerShort

class nnUNetTrainerFails(SafeLoaderMixin, nnUNetTrainerShort):
    def train_step(self, batch):
        if self.current_epoch == 1:
            raise ArithmeticError("the loss is not a number")
        return super().train_step(batch)
"""


def test_its_traceback_and_how_to_go_on_are_the_last_things_on_the_screen(
    make_workspace: Callable[..., Workspace],
) -> None:
    workspace = make_workspace(epochs=2, iterations=3, val_iterations=1)
    (workspace.trainers / "failing.py").write_text(FAILING)
    trainer = "nnUNetTrainerFails"
    env = workspace.environment({"nnUNet_n_proc_DA": "2"})
    # One pipe for stdout and stderr, and Python's own buffering: what batch systems and `| tee` give.
    env.pop("PYTHONUNBUFFERED", None)
    done = subprocess.run(
        workspace.train_command(trainer),
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1
    checkpoint = workspace.output_folder(trainer) / "checkpoint_latest.pth"
    assert done.stdout.rstrip().endswith(
        "\nArithmeticError: the loss is not a number\n"
        "SafeLoader: the training was ended in epoch 1 by ArithmeticError: "
        f"the state after epoch 0 is in {checkpoint}. "
        f"Go on with: nnUNetv2_train {workspace.dataset} {SMALL_CONFIGURATION} 0 -tr {trainer} -device cpu --c"
    )
    assert checkpoint.exists()
    assert done.stdout.count("Traceback (most recent call last)") == 1
    assert "background workers" not in done.stdout
    # One when nnU-Net makes the loader, three in epoch 0, and the one that failed.
    assert "SafeLoader: train: 5 batches, 0 workers replaced, waited" in done.stdout.partition("Traceback")[0]
    report = json.loads((workspace.output_folder(trainer) / "safeloader_report.json").read_text())
    assert report["outcome"] == "ArithmeticError: the loss is not a number"
    assert not [process for process in psutil.process_iter(["environ"]) if _trains_in(process, workspace)]


def _trains_in(process: psutil.Process, workspace: Workspace) -> bool:
    return (process.info["environ"] or {}).get("nnUNet_results") == str(workspace.results)
