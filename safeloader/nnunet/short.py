"""Short trainings that record each step: for the demo and the tests.

nnU-Net trains 1000 epochs of 250 batches. `ShortTraining`, mixed into a trainer, trains as many as its attributes
say and writes one line per batch that the network was trained or validated on into `steps.csv` in the output
folder, so that "how many batches did this training see, and when" is a measurement. It works the same for nnU-Net's
stock loader and for ours.
"""

from __future__ import annotations

import csv
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from safeloader.nnunet.upstream import Trainer

STEPS_FILE: Final = "steps.csv"
COLUMNS: Final = ("monotonic_s", "phase", "epoch", "cases", "workers")


@dataclass(frozen=True)
class Step:
    """One line of `steps.csv`: a batch that the network has seen.

    Attributes:
        monotonic_s: When the step ended, on the clock that all processes since boot share.
        phase: Whether the batch was trained or validated on.
        epoch: From 0.
        cases: The identifiers of its samples.
        workers: Process ids of the training loader's workers at that moment.
    """

    monotonic_s: float
    phase: Literal["train", "val"]
    epoch: int
    cases: tuple[str, ...]
    workers: tuple[int, ...]


class ShortTraining(Trainer):
    """Mixed in before a trainer class: trains `epochs` × `iterations` batches and records each."""

    epochs: int = 2
    iterations: int = 10
    val_iterations: int = 2

    def initialize(self) -> None:
        """Shorten the training before nnU-Net's schedule is derived from its length."""
        self.num_epochs = self.epochs
        self.num_iterations_per_epoch = self.iterations
        self.num_val_iterations_per_epoch = self.val_iterations
        super().initialize()

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Train on one batch, and record it."""
        outputs = super().train_step(batch)
        self._record("train", batch)
        return outputs

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Validate on one batch, and record it."""
        outputs = super().validation_step(batch)
        self._record("val", batch)
        return outputs

    def _record(self, phase: str, batch: dict[str, Any]) -> None:
        row = (f"{time.monotonic():.4f}", phase, self.current_epoch, " ".join(batch["keys"]))
        workers = " ".join(str(pid) for pid in worker_pids(self.dataloader_train))
        # Opened for each line: a training that is killed loses none.
        with open(Path(self.output_folder) / STEPS_FILE, "a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow((*row, workers))


def worker_pids(loader: Any) -> list[int]:
    """The processes that make batches for `loader`, SafeLoader's or the stock class; none if single-threaded."""
    if hasattr(loader, "workers"):
        return [worker.pid for worker in loader.workers() if worker.pid is not None]
    return [process.pid for process in getattr(loader, "_processes", [])]


def read_steps(output_folder: Path, start: int = 0) -> list[Step]:
    """The recorded steps from line `start` on; none if there is no file yet.

    A last line without its end is still being written: it is left for the next call.
    """
    path = output_folder / STEPS_FILE
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [_step(row) for row in csv.reader(lines[start:])]


def _step(row: Sequence[str]) -> Step:
    monotonic_s, phase, epoch, cases, workers = row
    return Step(
        monotonic_s=float(monotonic_s),
        phase="train" if phase == "train" else "val",
        epoch=int(epoch),
        cases=tuple(cases.split()),
        workers=tuple(int(pid) for pid in workers.split()),
    )


_TRAINERS_FILE: Final = '''\
"""Short trainings for nnU-Net: the stock trainer, and the same trainer with SafeLoader. Written by SafeLoader."""

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from safeloader.nnunet.mixin import SafeLoaderMixin
from safeloader.nnunet.short import ShortTraining


class {stock}(ShortTraining, nnUNetTrainer):
    epochs = {epochs}
    iterations = {iterations}
    val_iterations = {val_iterations}


class {safe}(SafeLoaderMixin, {stock}):
    pass
'''

STOCK_TRAINER: Final = "nnUNetTrainerShort"
SAFE_TRAINER: Final = "nnUNetTrainerShortSafeLoader"


def write_trainers(folder: Path, *, epochs: int, iterations: int, val_iterations: int) -> Path:
    """Write a module with the two trainer classes into `folder`, for `nnUNet_extTrainer` to name.

    Args:
        folder: Made if it is not there.
        epochs: Of the training.
        iterations: Batches trained on in an epoch.
        val_iterations: Batches validated on in an epoch.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "short_trainers.py"
    text = _TRAINERS_FILE.format(
        stock=STOCK_TRAINER, safe=SAFE_TRAINER, epochs=epochs, iterations=iterations, val_iterations=val_iterations
    )
    path.write_text(text, encoding="utf-8")
    return path
