"""The command that goes on with a training: the one that started it, changed as little as it takes."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from safeloader.nnunet.upstream import Trainer

PROGRAM: Final = "nnUNetv2_train"
_STARTED_AS: Final = (PROGRAM, "run_training.py")  # the latter by `python -m nnunetv2.run.run_training`

CONTINUE: Final = "--c"
VALIDATE: Final = "--val"
_PRETRAINED: Final = "-pretrained_weights"


def command(trainer: Trainer, option: str | None, argv: Sequence[str] | None = None) -> str:
    """A shell command.

    Args:
        trainer: Whose training it is.
        option: `CONTINUE`, `VALIDATE`, or None to start again.
        argv: How this process was started; None for `sys.argv`.
    """
    argv = sys.argv if argv is None else argv
    own = argv[1:] if argv and Path(argv[0]).name in _STARTED_AS else _arguments(trainer)
    if option is not None:
        own = [*_kept(own), option]
    return shlex.join([PROGRAM, *own])


def _kept(arguments: Sequence[str]) -> list[str]:
    """Without what contradicts `--c` and `--val`: each other, and other weights to begin with."""
    kept: list[str] = []
    values = iter(arguments)
    for argument in values:
        name, _, value = argument.partition("=")
        # argparse takes each beginning of a long option's name; `-p` alone names the plans.
        if len(name) > 2 and _PRETRAINED.startswith(name):
            if not value:
                next(values, None)
        elif argument not in (CONTINUE, VALIDATE):
            kept.append(argument)
    return kept


def _arguments(trainer: Trainer) -> list[str]:
    """For a training that a program of the user's own started, as far as the trainer knows."""
    plans = trainer.plans_manager
    arguments = [plans.dataset_name, trainer.configuration_name, str(trainer.fold)]
    arguments += ["-tr", type(trainer).__name__, "-p", plans.plans_name]
    return arguments if trainer.device.type == "cuda" else [*arguments, "-device", trainer.device.type]
