"""What the gauntlet tells its trainer, in another process: names of environment variables, and orders."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Final

SEED_VARIABLE: Final = "GAUNTLET_SEED"
THREADS_VARIABLE: Final = "GAUNTLET_THREADS"
COMPILE_VARIABLE: Final = "GAUNTLET_COMPILE"
STEP_VARIABLE: Final = "GAUNTLET_STEP_S"
ORDERS_VARIABLE: Final = "GAUNTLET_ORDERS"
TRAINER_PID_VARIABLE: Final = "GAUNTLET_TRAINER_PID"
RUN_VARIABLE: Final = "GAUNTLET_RUN"
"""By which the processes of a training are known, whoever their parent is."""

TRAINER: Final = "nnUNetTrainerGauntlet"
EXPORTING: Final = "exporting"
"""The stage in which a process of the export pool obeys."""


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


DEEDS: Final[dict[str, Callable[[], object]]] = {"kill": kill, "stop": stop}
