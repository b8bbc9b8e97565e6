"""The trainers whose epochs are timed: nnU-Net's own, and the same with SafeLoader.

nnU-Net finds them by name, in the process of `nnUNetv2_train`: `epochs.write_finder` writes the file that it reads.
Their length comes from the environment, since nnU-Net makes them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.benchmarking.nnUNetTrainerBenchmark_5epochs import (
    nnUNetTrainerBenchmark_5epochs,
)
from nnunetv2.training.nnUNetTrainer.variants.benchmarking.nnUNetTrainerBenchmark_5epochs_noDataLoading import (
    nnUNetTrainerBenchmark_5epochs_noDataLoading,
)

from benchmarks.epochs import LENGTH
from safeloader.nnunet.mixin import SafeLoaderMixin

if TYPE_CHECKING:

    class _Trainer:
        """What `OfLength` uses of nnU-Net's trainer."""

        num_epochs: int
        num_iterations_per_epoch: int
        num_val_iterations_per_epoch: int

        def initialize(self) -> None: ...

else:
    _Trainer = object


class OfLength(_Trainer):
    """Mixed in before a trainer class: trains as long as the environment says, and predicts nothing afterwards."""

    def initialize(self) -> None:
        """Set the length before nnU-Net's schedule is derived from it."""
        epochs, iterations, val_iterations = map(int, os.environ[LENGTH].split(","))
        self.num_epochs = epochs
        self.num_iterations_per_epoch = iterations
        self.num_val_iterations_per_epoch = val_iterations
        super().initialize()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Nothing: it is no part of an epoch."""


class EpochsStock(OfLength, nnUNetTrainer):  # type: ignore[misc]  # upstream has no types
    """nnU-Net's default trainer."""


class EpochsSafeLoader(SafeLoaderMixin, EpochsStock):
    """The same with SafeLoader."""


class EpochsBenchmark(OfLength, nnUNetTrainerBenchmark_5epochs):  # type: ignore[misc]
    """nnU-Net's own benchmark of its trainer. Needs CUDA, as upstream does."""


class EpochsBenchmarkSafeLoader(SafeLoaderMixin, EpochsBenchmark):
    """The same with SafeLoader."""


class EpochsNoDataLoading(OfLength, nnUNetTrainerBenchmark_5epochs_noDataLoading):  # type: ignore[misc]
    """nnU-Net's own bound: one batch that is on the GPU already, again and again."""
