"""Training in a container as Docker makes it: 64 MiB of `/dev/shm`. Stock nnU-Net hangs; with SafeLoader it trains."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from safeloader.nnunet.short import SAFE_TRAINER, STOCK_TRAINER, Step, read_steps
from safeloader.nnunet.workspace import PLANS, SMALL_CONFIGURATION, Workspace
from safeloader.testing import wait_until

CONFIGURATION = "3d_many"
"""As `3d_small`, with batches of 72 MB. (Of smaller ones the stock class loses some, and others get through.)"""
BATCH_SIZE = 640
LEFT = "left in /dev/shm:"
STEPS = 2  # one of training, one of validation

STOCK_IMPORT = "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
LESS_WORK = """
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoDA import nnUNetTrainerNoDA

def _two_of(batch):
    return {**batch, "data": batch["data"][:2], "target": [scale[:2] for scale in batch["target"]]}

class nnUNetTrainer(nnUNetTrainerNoDA):
    def train_step(self, batch):
        return super().train_step(_two_of(batch))

    def validation_step(self, batch):
        return super().validation_step(_two_of(batch))
"""
"""What is sent is as large, but not augmented, and the network, which is not what this is about, sees two samples."""

HANGS_FOR_S = 20
"""How long the stock training is watched after its loader has failed. It would hang for ever."""

pytestmark = pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode != 0,
    reason="needs the right to make a mount namespace",
)


@pytest.fixture(scope="module")
def workspace(brain_workspace: Workspace, make_workspace: Callable[..., Workspace]) -> Workspace:
    path = brain_workspace.preprocessed / brain_workspace.dataset / f"{PLANS}.json"
    plans = json.loads(path.read_text())
    plans["configurations"][CONFIGURATION] = {"inherits_from": SMALL_CONFIGURATION, "batch_size": BATCH_SIZE}
    path.write_text(json.dumps(plans))
    made = make_workspace(epochs=1, iterations=1, val_iterations=1, validates=False)
    (trainers,) = made.trainers.iterdir()
    assert STOCK_IMPORT in trainers.read_text()
    trainers.write_text(trainers.read_text().replace(STOCK_IMPORT, LESS_WORK))
    return made


def _train(workspace: Workspace, trainer: str, console: Path) -> subprocess.Popen[bytes]:
    command = [CONFIGURATION if word == SMALL_CONFIGURATION else word for word in workspace.train_command(trainer)]
    # What is left in /dev/shm is listed at the end, while the namespace is still there.
    list_it = f"code=$?; echo {LEFT} $(ls /dev/shm); exit $code"
    script = f"mount -t tmpfs -o size=64m tmpfs /dev/shm && {shlex.join(command)}; {list_it}"
    return subprocess.Popen(
        ["unshare", "-m", "sh", "-c", script],
        env=workspace.environment({"nnUNet_n_proc_DA": "1"}),
        stdout=console.open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _output(workspace: Workspace, trainer: str) -> Path:
    small = workspace.output_folder(trainer)
    return small.parents[1] / small.parent.name.replace(SMALL_CONFIGURATION, CONFIGURATION) / small.name


def _stock_steps(workspace: Workspace) -> list[Step]:
    return read_steps(_output(workspace, STOCK_TRAINER))


def _end(training: subprocess.Popen[bytes]) -> None:
    os.killpg(training.pid, signal.SIGKILL)
    training.wait()


def test_stock_hangs_and_safeloader_trains(workspace: Workspace, tmp_path: Path) -> None:
    # Both at once, each with a /dev/shm of its own: most of what they do is to import nnU-Net.
    console, stock_console = tmp_path / "safe.txt", tmp_path / "stock.txt"
    training, stock = (
        _train(workspace, trainer, screen)
        for trainer, screen in ((SAFE_TRAINER, console), (STOCK_TRAINER, stock_console))
    )
    try:
        assert training.wait(timeout=240) == 0, console.read_text()[-3000:]
        assert len(read_steps(_output(workspace, SAFE_TRAINER))) == STEPS
        report = json.loads((_output(workspace, SAFE_TRAINER) / "safeloader_report.json").read_text())
        assert report["loaders"]["train"]["restarts"] == 0
        *_, left = console.read_text().splitlines()
        assert left.startswith(LEFT) and "safeloader" not in left

        wait_until(lambda: "No space left on device" in stock_console.read_text(), timeout_s=120)
        with pytest.raises(TimeoutError):  # it knows that now, and goes on as if nothing had happened
            wait_until(lambda: stock.poll() is not None or bool(_stock_steps(workspace)), timeout_s=HANGS_FOR_S)
    finally:
        for each in (training, stock):
            if each.poll() is None:
                _end(each)
