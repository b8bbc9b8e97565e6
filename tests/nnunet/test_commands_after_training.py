"""What nnU-Net's other commands do with a training by SafeLoader: each is run as a user would, one after the other.

    pytest -m soak tests/nnunet/test_commands_after_training.py        3 minutes on 2 idle cores

The trainer is built by name, before one that a user has written. What runs on the machine `stock` has a Python in which
SafeLoader can't be imported, and does not search its shim.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from safeloader.nnunet.install import SHIM_FOLDER
from safeloader.nnunet.workspace import SMALL_CONFIGURATION, Workspace, nnunet_executable

pytestmark = pytest.mark.soak

BASE = "nnUNetTrainerTiny"
TRAINER = "nnUNetTrainerSafeLoaderTiny"
CHECKPOINT = "checkpoint_final.pth"
USERS = f"""
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class {BASE}(nnUNetTrainer):
    def initialize(self):
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 4, 1
        super().initialize()
"""


@dataclass(frozen=True)
class Machine:
    """Runs nnU-Net's commands; on some of them there is no SafeLoader."""

    workspace: Workspace
    environment: dict[str, str]

    def run(self, command: str, *arguments: str) -> str:
        """What it printed."""
        done = subprocess.run(
            [nnunet_executable(command), *arguments],
            env=self.workspace.environment(self.environment), capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, f"{command} {' '.join(arguments)}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def train(self, trainer: str, *options: str) -> str:
        executable, *arguments = self.workspace.train_command(trainer, *options)
        return self.run(Path(executable).name, *arguments)


@pytest.fixture(scope="module")
def safe(make_workspace: Callable[..., Workspace]) -> Machine:
    workspace = make_workspace()
    (workspace.trainers / "users_trainers.py").write_text(USERS)
    return Machine(workspace, {"nnUNet_extTrainer": f"{SHIM_FOLDER}{os.pathsep}{workspace.trainers}"})


@pytest.fixture(scope="module")
def stock(safe: Machine, tmp_path_factory: pytest.TempPathFactory) -> Machine:
    """Another machine, with results of its own; it has the user's trainer, and no SafeLoader."""
    folder = tmp_path_factory.mktemp("stock")
    (folder / "python").mkdir()
    (folder / "python" / "safeloader.py").write_text("raise ImportError('there is no SafeLoader here')\n")
    workspace = replace(safe.workspace, folder=folder)
    for part in ("raw", "preprocessed"):
        (folder / part).symlink_to(getattr(safe.workspace, part))
    workspace.trainers.mkdir()
    (workspace.trainers / "users_trainers.py").write_text(USERS)
    return Machine(workspace, {"PYTHONPATH": str(folder / "python")})


@dataclass(frozen=True)
class Trained:
    """What the first training left."""

    printed: str
    output: Path
    dice: float


def summary_of(output: Path) -> Path:
    return output / "validation" / "summary.json"


def dice_in(output: Path) -> float:
    return float(json.loads(summary_of(output).read_text())["foreground_mean"]["Dice"])


@pytest.fixture(scope="module")
def trained(safe: Machine) -> Trained:
    printed = safe.train(TRAINER, "--npz")
    output = safe.workspace.output_folder(TRAINER)
    return Trained(printed, output, dice_in(output))


CHOSEN = ["-c", SMALL_CONFIGURATION, "-tr", TRAINER, "-f", "0"]


def test_its_workers_were_ours(trained: Trained) -> None:
    assert "SafeLoader: train: 5 batches, 0 workers replaced" in trained.printed


@pytest.mark.parametrize("options", [["--val"], ["--c"]])
def test_a_finished_training_is_validated_again(options: list[str], safe: Machine, trained: Trained) -> None:
    summary_of(trained.output).unlink(missing_ok=True)
    safe.train(TRAINER, *options, "--npz")
    assert dice_in(trained.output) == trained.dice


def test_the_best_checkpoint_is_validated(safe: Machine, trained: Trained) -> None:
    summary_of(trained.output).unlink(missing_ok=True)
    safe.train(TRAINER, "--val", "--val_best", "--npz")
    assert dice_in(trained.output) >= 0


def test_pretrained_weights(safe: Machine, trained: Trained) -> None:
    """Another spelling of the name is another folder of results."""
    printed = safe.train("nnUNetTrainerTinySafeLoader", "-pretrained_weights", str(trained.output / CHECKPOINT))
    assert "################### Loading pretrained weights from file" in printed


def test_pretrained_weights_for_nnunets_own_trainer(stock: Machine, trained: Trained) -> None:
    printed = stock.train(BASE, "-pretrained_weights", str(trained.output / CHECKPOINT))
    assert "################### Loading pretrained weights from file" in printed


def test_the_best_configuration_is_found(safe: Machine, trained: Trained) -> None:
    dataset = safe.workspace.dataset
    printed = safe.run("nnUNetv2_find_best_configuration", dataset, *CHOSEN, "--disable_ensembling", "-np", "1")
    assert f"nnUNetv2_predict -d {dataset} -i INPUT_FOLDER -o OUTPUT_FOLDER -f  0 -tr {TRAINER}" in printed


def test_a_model_that_is_exported_predicts_where_there_is_no_safeloader(
    safe: Machine, stock: Machine, trained: Trained, tmp_path: Path
) -> None:
    dataset, archive = safe.workspace.dataset, str(tmp_path / "model.zip")
    safe.run("nnUNetv2_export_model_to_zip", "-d", dataset, "-o", archive, *CHOSEN)
    stock.run("nnUNetv2_install_pretrained_model_from_zip", archive)
    images, predicted = tmp_path / "images", tmp_path / "predicted"
    images.mkdir()
    (images / "brain_000_0000.nii.gz").symlink_to(safe.workspace.raw / dataset / "imagesTr" / "brain_000_0000.nii.gz")
    folders = ["-d", dataset, "-i", str(images), "-o", str(predicted)]
    stock.run("nnUNetv2_predict", *folders, *CHOSEN, "-device", "cpu", "-npp", "1", "-nps", "1")
    assert (predicted / "brain_000.nii.gz").exists()
