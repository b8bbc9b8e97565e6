"""Runs a training with `nnUNetv2_train` in a folder of its own, and reads from nnU-Net's log what its epochs took."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.loads import workspace
from safeloader.nnunet.workspace import nnunet_executable

TRAINERS: Final = {
    "stock": "EpochsStock",
    "safeloader": "EpochsSafeLoader",
    "stock, benchmark": "EpochsBenchmark",
    "safeloader, benchmark": "EpochsBenchmarkSafeLoader",
    "no data loading": "EpochsNoDataLoading",
}
"""Classes of `epoch_trainers` by contestant."""
ON_CPU: Final = ("stock", "safeloader")
"""nnU-Net's benchmarks ask for CUDA."""
LENGTH: Final = "SAFELOADER_BENCHMARK_LENGTH"
"""Environment variable: epochs, batches trained on in each, and batches validated on, `5,250,50`."""
_COMPILE: Final = "nnUNet_compile"
"""nnU-Net compiles by default; for the CPU's tiny network that would take longer than its training."""
_EPOCH_TIME: Final = re.compile(r"Epoch time: ([0-9.]+) s")


@dataclass(frozen=True)
class Length:
    """Of a training: epochs, and batches trained and validated on in each."""

    epochs: int
    iterations: int
    val_iterations: int


def train(contestant: str, configuration: str, device: str, workers: int, length: Length) -> list[float]:
    """What each epoch took, in seconds, as nnU-Net logs it: two decimals, checkpoints not included.

    Raises:
        RuntimeError: the training did not come to its end; with the end of its log.
    """
    trainer = TRAINERS[contestant]
    home = workspace(configuration)
    with tempfile.TemporaryDirectory(prefix="safeloader-") as name:
        folder = Path(name)
        write_finder(folder / "trainers")
        extra = {
            "nnUNet_results": str(folder / "results"),
            "nnUNet_extTrainer": str(folder / "trainers"),
            "nnUNet_n_proc_DA": str(workers),
            _COMPILE: os.environ.get(_COMPILE, "true" if device == "cuda" else "false"),
            "PYTHONPATH": os.pathsep.join(filter(None, (_home(), os.environ.get("PYTHONPATH")))),
            LENGTH: f"{length.epochs},{length.iterations},{length.val_iterations}",
        }
        command = [nnunet_executable("nnUNetv2_train"), home.dataset, configuration, "0", "-tr", trainer]
        ended = subprocess.run(
            [*command, "-device", device], env=home.environment(extra), capture_output=True, text=True, check=False
        )
        logs = [path.read_text() for path in (folder / "results").rglob("training_log_*.txt")]
        found = [float(seconds) for log in logs for seconds in _EPOCH_TIME.findall(log)]
    # nnU-Net's benchmark trainers end with code 0 whatever happens.
    if ended.returncode or len(found) != length.epochs:
        raise RuntimeError(
            f"{trainer} ended with {ended.returncode} after {len(found)} of {length.epochs} epochs:\n"
            f"{ended.stdout[-2000:]}\n{ended.stderr[-4000:]}"
        )
    return found


def write_finder(folder: Path) -> None:
    """Write what `nnUNet_extTrainer` names: a module in which nnU-Net finds the trainers by name."""
    folder.mkdir(parents=True)
    names = ", ".join(TRAINERS.values())
    (folder / "safeloader_epoch_trainers.py").write_text(f"from benchmarks.epoch_trainers import {names}\n")


def _home() -> str:
    """Where this package is imported from: nnU-Net's command does not look where it is called."""
    return str(Path(__file__).resolve().parent.parent)
