"""One small brain dataset for all nnU-Net tests, made, planned and preprocessed once per session by nnU-Net itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import safeloader
from safeloader.nnunet.brain import DATASET_NAME, write_dataset
from safeloader.nnunet.short import write_trainers
from safeloader.nnunet.workspace import PLANS, SMALL_CONFIGURATION, Workspace
from tests.workspaces import beside

MakeTrainer = Callable[..., Any]
CASES = 5  # fold 0 validates one of them

FORKED = """
import multiprocessing, sys
from nnunetv2.experiment_planning.plan_and_preprocess_entrypoints import plan_and_preprocess_entry
forked = multiprocessing.get_context("fork")
multiprocessing.get_context = lambda method=None: forked
plan_and_preprocess_entry()
"""
"""nnU-Net's command; each process that it would spawn imports all of it first, which takes longer than its work."""


WITHOUT_VALIDATION = """
    def perform_actual_validation(self, save_probabilities=False):
        pass
"""


@pytest.fixture(scope="session", autouse=True)
def _our_safeloader_in_subprocesses() -> None:
    """Nnu-Net's commands find the SafeLoader under test, installed or not."""
    package = str(Path(safeloader.__file__).parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="module", autouse=True)
def _no_tracker_stays() -> Iterator[None]:
    """What nnU-Net spawns has Python start a process that stays; tests that count children come later."""
    yield
    tracker = resource_tracker._resource_tracker  # type: ignore[attr-defined]
    if tracker._pid is not None:
        os.kill(tracker._pid, signal.SIGKILL)  # else it stays as long as anybody has inherited its pipe
    tracker._stop()


@pytest.fixture(scope="session")
def brain_workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The dataset preprocessed in 2D and 3D, with the configuration `3d_small`. Train in a `make_workspace` of it."""
    workspace = Workspace(tmp_path_factory.mktemp("brain"), DATASET_NAME, processes=1)
    write_dataset(workspace.raw, cases=CASES, resolution_mm=6)
    command = [sys.executable, "-c", FORKED, *workspace.preprocess_command("2d", "3d_fullres")[1:]]
    subprocess.run(command, env=workspace.environment(), check=True, stdout=subprocess.DEVNULL, timeout=240)
    workspace.add_small_configuration(patch=(24, 32, 24), features=(4, 8, 16))
    _write_splits(workspace.plans_file.parent)
    return workspace


def _write_splits(preprocessed: Path) -> None:
    """What the first training would write: of two that begin at once, one might read what the other is writing."""
    from nnunetv2.utilities.crossval_split import generate_crossval_split

    cases = sorted(path.stem for path in (preprocessed / f"{PLANS}_3d_fullres").glob("*.pkl"))
    splits = [{part: [str(case) for case in fold[part]] for part in fold} for fold in generate_crossval_split(cases)]
    (preprocessed / "splits_final.json").write_text(json.dumps(splits))


@pytest.fixture(scope="session")
def make_workspace(brain_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Workspace]:
    """Makes workspaces with results and trainers of their own, on the one dataset.

    Trainings that do not validate leave out what comes after the last epoch: it uses no loader, and takes longest.
    """

    def make(*, epochs: int = 2, iterations: int = 10, val_iterations: int = 2, validates: bool = True) -> Workspace:
        workspace = beside(brain_workspace, tmp_path_factory.mktemp("workspace"))
        path = write_trainers(workspace.trainers, epochs=epochs, iterations=iterations, val_iterations=val_iterations)
        if not validates:
            path.write_text(path.read_text() + WITHOUT_VALIDATION)
        return workspace

    return make


@pytest.fixture(scope="session")
def nnunet() -> ModuleType:
    """The module of our trainer, and with it nnU-Net: before a test counts its descriptors."""
    import safeloader.nnunet.trainer as module

    return module


@pytest.fixture
def make_trainer(
    nnunet: ModuleType, make_workspace: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch
) -> Iterator[MakeTrainer]:
    """Makes trainers as `nnUNetv2_train` does, each in a workspace of its own; their loaders are stopped afterwards."""
    made: list[Any] = []

    def make(cls: type | None = None, *, workspace: Workspace | None = None) -> Any:
        workspace = workspace or make_workspace()
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            monkeypatch.setenv(name, workspace.environment()[name])
        folder = workspace.preprocessed / workspace.dataset
        plans = json.loads((folder / "nnUNetPlans.json").read_text())
        plans["continue_training"] = False
        dataset = json.loads((folder / "dataset.json").read_text())
        trainer_class = cls or nnunet.nnUNetTrainerSafeLoader
        trainer = trainer_class(plans, SMALL_CONFIGURATION, 0, dataset, device=torch.device("cpu"))
        trainer.initialize()
        made.append(trainer)
        return trainer

    yield make
    for trainer in made:
        if getattr(trainer, "_safeloader", None) is not None:
            trainer._safeloader.close()
