"""The gauntlet's trainer: a short training with our mixin, whose arithmetic is the same in every run.

nnU-Net draws the first weights from torch's generator, which it does not seed; here it is. Orders
(`safeloader.testing.Orders`) reach the processes that export predictions, where no signal from outside can know that
they are at work.
"""

from __future__ import annotations

import functools
import os
import time
from typing import Any

import torch
from nnunetv2.inference import export_prediction
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from safeloader.nnunet.loaders import namespaces, replaced
from safeloader.nnunet.mixin import SafeLoaderMixin
from safeloader.nnunet.short import ShortTraining
from safeloader.testing import Orders
from tests.gauntlet import orders


def _obey() -> None:
    """In a process that exports for the trainer; the trainer itself obeys nothing."""
    folder = os.environ.get(orders.ORDERS_VARIABLE)
    if folder is not None and os.environ[orders.TRAINER_PID_VARIABLE] != str(os.getpid()):
        Orders(folder, orders.DEEDS).obey(orders.EXPORTING)


# Its parameters' names tell SafeLoader what is written; by its own name the other process finds this one.
@functools.wraps(export_prediction.export_prediction_from_logits, assigned=())
def export_prediction_from_logits(*args: Any, **kwargs: Any) -> Any:
    """Nnu-Net's, by a process that obeys first."""
    _obey()
    return export_prediction.export_prediction_from_logits(*args, **kwargs)


class Deterministic(ShortTraining, nnUNetTrainer):  # type: ignore[misc]
    epochs, iterations, val_iterations = 4, 20, 2

    def initialize(self) -> None:
        torch.manual_seed(int(os.environ[orders.SEED_VARIABLE]))
        torch.set_num_threads(int(os.environ[orders.THREADS_VARIABLE]))
        torch.use_deterministic_algorithms(True)
        super().initialize()

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Take as long as a step on a larger network: faults need time to strike one after the other."""
        began = time.monotonic()
        outputs: dict[str, Any] = super().train_step(batch)
        time.sleep(max(0.0, float(os.environ.get(orders.STEP_VARIABLE, "0")) - (time.monotonic() - began)))
        return outputs

    def _do_i_compile(self) -> bool:
        """On the CPU nnU-Net never does."""
        return os.environ.get(orders.COMPILE_VARIABLE) == "1"

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        os.environ[orders.TRAINER_PID_VARIABLE] = str(os.getpid())
        (namespace,) = namespaces(nnUNetTrainer, "perform_actual_validation")
        with replaced(namespace, {"export_prediction_from_logits": export_prediction_from_logits}):
            super().perform_actual_validation(save_probabilities)


class nnUNetTrainerGauntlet(SafeLoaderMixin, Deterministic):
    pass
