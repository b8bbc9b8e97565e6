"""Real data for the benchmarks: the brain that nilearn carries, planned and preprocessed by nnU-Net itself.

Made once and kept in `benchmarks/data/` (or where `SAFELOADER_BENCHMARK_DATA` says): eight cases of 1 mm take about
two minutes. The tiny one takes 20 s: 6 mm, and a configuration with a small patch.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from safeloader.nnunet.brain import DATASET_ID, DATASET_NAME, write_dataset
from safeloader.nnunet.stock import Asked, training_loader
from safeloader.nnunet.workspace import SMALL_CONFIGURATION, Workspace, nnunet_executable

SIZES: Final[Mapping[str, tuple[int, int]]] = {"full": (8, 1), "tiny": (5, 6)}
"""Cases, and the edge of a voxel in mm."""
RESENC_L: Final = "3d_resenc_l"
"""The 3d_fullres of nnU-Net's planner for large residual encoders, which asks more of a GPU than of the CPU."""
CONFIGURATIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "full": ("3d_fullres", "2d"),
    "tiny": (SMALL_CONFIGURATION,),
}
"""What nnU-Net plans for them by default. At 1 mm, 3d_fullres has a patch of 128×160×112 and batches of 2, 2d 192×160
and 54, and `RESENC_L` 160×192×160 and 3."""


def workspace(size: str) -> Workspace:
    """The preprocessed dataset; made if it is not there yet."""
    home = Path(os.environ.get("SAFELOADER_BENCHMARK_DATA") or Path(__file__).parent / "data")
    found = Workspace(home / size, DATASET_NAME)
    done = found.folder / "done"
    if not done.exists():
        cases, resolution_mm = SIZES[size]
        write_dataset(found.raw, cases=cases, resolution_mm=resolution_mm)
        command = found.preprocess_command("2d", "3d_fullres")
        subprocess.run(command, env=found.environment(), check=True, stdout=subprocess.DEVNULL)
        if size == "tiny":
            found.add_small_configuration(patch=(24, 32, 24), features=(4, 8, 16))
        else:
            _add_resenc_l(found)
        done.touch()
    return found


def _add_resenc_l(found: Workspace) -> None:
    """It trains on what was preprocessed for 3d_fullres."""
    planner, its_plans = "nnUNetPlannerResEncL", "nnUNetResEncUNetLPlans"
    command = [nnunet_executable("nnUNetv2_plan_experiment"), "-d", str(DATASET_ID), "-pl", planner]
    subprocess.run(command, env=found.environment(), check=True, stdout=subprocess.DEVNULL)
    made = json.loads(found.plans_file.with_name(f"{its_plans}.json").read_text())
    plans = json.loads(found.plans_file.read_text())
    plans["configurations"][RESENC_L] = made["configurations"]["3d_fullres"]
    found.plans_file.write_text(json.dumps(plans, indent=4))


def loader(size: str, configuration: str) -> Any:
    """Nnu-Net's own training loader, transforms included, as its trainer gives it to an augmenter."""
    for name, value in workspace(size).environment().items():
        if name.startswith("nnUNet_"):
            os.environ[name] = value
    work = training_loader(Asked(str(DATASET_ID), configuration))
    assert work.transform is None, "from nnunetv2 2.5 on, the loader transforms"
    return work.loader
