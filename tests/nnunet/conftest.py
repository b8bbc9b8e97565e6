"""One small brain dataset for all nnU-Net tests, made, planned and preprocessed once per session by nnU-Net itself."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import safeloader
from safeloader.nnunet.brain import DATASET_NAME, write_dataset
from safeloader.nnunet.short import write_trainers
from safeloader.nnunet.workspace import Workspace

CASES = 5  # fold 0 validates one of them


@pytest.fixture(scope="session", autouse=True)
def _our_safeloader_in_subprocesses() -> None:
    """Nnu-Net's commands find the SafeLoader under test, installed or not."""
    package = str(Path(safeloader.__file__).parents[1])
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))


@pytest.fixture(scope="session")
def brain_workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The dataset preprocessed in 2D and 3D, with the configuration `3d_small`. Train in a `make_workspace` of it."""
    # One process: each that nnU-Net spawns imports all of it first, which takes longer than its work on this dataset.
    workspace = Workspace(tmp_path_factory.mktemp("brain"), DATASET_NAME, processes=1)
    write_dataset(workspace.raw, cases=CASES, resolution_mm=6)
    command = workspace.preprocess_command("2d", "3d_fullres")
    subprocess.run(command, env=workspace.environment(), check=True, stdout=subprocess.DEVNULL, timeout=240)
    workspace.add_small_configuration(patch=(24, 32, 24), features=(4, 8, 16))
    return workspace


@pytest.fixture(scope="session")
def make_workspace(brain_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Workspace]:
    """Makes workspaces with results and trainers of their own, on the one dataset."""

    def make(*, epochs: int = 2, iterations: int = 10, val_iterations: int = 2) -> Workspace:
        workspace = replace(brain_workspace, folder=tmp_path_factory.mktemp("workspace"))
        workspace.raw.symlink_to(brain_workspace.raw)
        workspace.preprocessed.symlink_to(brain_workspace.preprocessed)
        write_trainers(workspace.trainers, epochs=epochs, iterations=iterations, val_iterations=val_iterations)
        return workspace

    return make
