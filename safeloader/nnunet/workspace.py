"""One folder in which nnU-Net runs on the small brain dataset: its three folders, its environment, its commands.

    workspace/
      raw/ preprocessed/ results/   what nnUNet_raw, nnUNet_preprocessed and nnUNet_results name
      trainers/                     what nnUNet_extTrainer names: trainer classes of a short training

The demo and the tests train here, with nnU-Net's own commands. This module says what to run and with which
environment; whoever uses it starts the process.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safeloader.errors import ConfigError
from safeloader.nnunet.versions import installed

SMALL_CONFIGURATION: Final = "3d_small"
"""Inherits everything from `3d_fullres` but its patch, batch and network: quick to train on a CPU."""

PLANS: Final = "nnUNetPlans"
NO_PBAR_SINCE: Final = (2, 7)
"""The first nnU-Net whose preprocessing can do without progress bars."""


@dataclass(frozen=True)
class Workspace:
    """Where nnU-Net's files lie, and how to call it there.

    Attributes:
        folder: Holds everything that is written.
        dataset: The dataset's name, `DatasetXXX_Name`.
        processes: Processes that nnU-Net may use for planning, preprocessing and export.
    """

    folder: Path
    dataset: str
    processes: int = 2

    @property
    def raw(self) -> Path:
        """What `nnUNet_raw` names."""
        return self.folder / "raw"

    @property
    def preprocessed(self) -> Path:
        """What `nnUNet_preprocessed` names."""
        return self.folder / "preprocessed"

    @property
    def plans_file(self) -> Path:
        """The plans that nnU-Net made for the dataset."""
        return self.preprocessed / self.dataset / f"{PLANS}.json"

    @property
    def results(self) -> Path:
        """What `nnUNet_results` names."""
        return self.folder / "results"

    @property
    def trainers(self) -> Path:
        """What `nnUNet_extTrainer` names."""
        return self.folder / "trainers"

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """The environment for nnU-Net's commands: this process's, nnU-Net's folders, and `extra`."""
        return {
            # Threads of a network on the CPU that spin while they wait for each other take the core from the workers:
            # on 2 busy cores a training step took several times as long.
            "OMP_WAIT_POLICY": "PASSIVE",
            **os.environ,
            "nnUNet_raw": str(self.raw),
            "nnUNet_preprocessed": str(self.preprocessed),
            "nnUNet_results": str(self.results),
            "nnUNet_extTrainer": str(self.trainers),
            "nnUNet_def_n_proc": str(self.processes),
            # A network this small trains for less time than it takes to compile.
            "nnUNet_compile": "false",
            **(extra or {}),
        }

    def preprocess_command(self, *configurations: str) -> list[str]:
        """nnU-Net's fingerprint, plans and preprocessing of the dataset; of `3d_fullres` if none is named."""
        processes = str(self.processes)
        number = self.dataset.removeprefix("Dataset")[:3]
        names = configurations or ("3d_fullres",)
        quiet = ["--no_pbar"] if (installed() or NO_PBAR_SINCE) >= NO_PBAR_SINCE else []
        options = ["-d", number, "-c", *names, "-npfp", processes, "-np", processes, *quiet]
        return [nnunet_executable("nnUNetv2_plan_and_preprocess"), *options]

    def train_command(
        self,
        trainer: str,
        *options: str,
        configuration: str = SMALL_CONFIGURATION,
        fold: str = "0",
        device: str = "cpu",
    ) -> list[str]:
        """`nnUNetv2_train` of a fold of a configuration with the class `trainer`."""
        positional = [self.dataset, configuration, fold]
        return [nnunet_executable("nnUNetv2_train"), *positional, "-tr", trainer, "-device", device, *options]

    def output_folder(self, trainer: str, *, configuration: str = SMALL_CONFIGURATION, fold: str = "0") -> Path:
        """Where nnU-Net writes logs, checkpoints and validation of a fold."""
        return self.results / self.dataset / f"{trainer}__{PLANS}__{configuration}" / f"fold_{fold}"

    def add_small_configuration(
        self,
        *,
        patch: tuple[int, ...],
        features: tuple[int, ...],
        name: str = SMALL_CONFIGURATION,
        parent: str = "3d_fullres",
        **differences: Any,
    ) -> None:
        """Add a configuration with a small network to the plans that nnU-Net made for the dataset.

        Args:
            patch: Pixels `(y, x)` or voxels `(z, y, x)`, each divisible by `2 ** (len(features) - 1)`.
            features: Feature maps per stage of the U-Net.
            name: The configuration's; one that is there already is replaced.
            parent: The configuration that it inherits from.
            differences: What else the plans say of it, in nnU-Net's terms.

        Raises:
            ValueError: Fewer than three stages. nnU-Net's deep supervision gives the coarsest output the weight 0;
                were it the only one, the loss would be 0/0.
        """
        if len(features) < 3:
            raise ValueError(f"nnU-Net's deep supervision needs at least 3 stages, got features={features}")
        path = self.plans_file
        plans = json.loads(path.read_text(encoding="utf-8"))
        plans["configurations"][name] = {
            "inherits_from": parent,
            "patch_size": list(patch),
            "batch_size": 2,
            "architecture": _smaller(plans["configurations"][parent]["architecture"], features, len(patch)),
            **differences,
        }
        path.write_text(json.dumps(plans, indent=4), encoding="utf-8")


def _smaller(architecture: dict[str, Any], features: tuple[int, ...], axes: int) -> dict[str, Any]:
    """The same kind of network with `len(features)` stages, one convolution per stage in the decoder."""
    small = deepcopy(architecture)
    stages = len(features)
    arguments = small["arch_kwargs"]
    arguments["n_stages"] = stages
    arguments["features_per_stage"] = list(features)
    arguments["kernel_sizes"] = [[3] * axes] * stages
    arguments["strides"] = [[1] * axes] + [[2] * axes] * (stages - 1)
    arguments["n_conv_per_stage"] = [2] * stages
    arguments["n_conv_per_stage_decoder"] = [1] * (stages - 1)
    return small


def nnunet_executable(name: str) -> str:
    """The path of one of nnU-Net's commands: of this Python's environment, else of the search path.

    Raises:
        ConfigError: nnU-Net is not installed there.
    """
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        raise ConfigError(f"{name} was not found: install nnU-Net with `pip install 'safeloader[nnunet]'`")
    return found


def training_device() -> str:
    """For nnU-Net's `-device`: "cuda" if torch finds a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
