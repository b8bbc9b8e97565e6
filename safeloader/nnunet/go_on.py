"""How to go on with a training that ended: what is kept of it, and the command.

The command is the one that started it, changed as little as it takes.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from safeloader.nnunet.checkpoints import FINAL, IN_ORDER

if TYPE_CHECKING:
    from safeloader.nnunet.upstream import Trainer

PROGRAM: Final = "nnUNetv2_train"
_STARTED_AS: Final = (PROGRAM, "run_training.py")  # the latter by `python -m nnunetv2.run.run_training`

CONTINUE: Final = "--c"
VALIDATE: Final = "--val"
_PRETRAINED: Final = "-pretrained_weights"


def what_now(trainer: Trainer, written: Mapping[str, int], lost: int | None, failure: OSError | None) -> str:
    """What is kept of a training, and the command to go on with.

    Args:
        trainer: Whose training it is.
        written: The checkpoints that it has written or was loaded from, and the epoch whose state is in them.
        lost: The epoch whose state was kept in memory, if that could not be written.
        failure: Why it could not.
    """
    again = f"Start again with: {command(trainer, None)}"
    further = f"Go on with: {command(trainer, CONTINUE)}"
    if trainer.disable_checkpointing:
        return f"checkpointing is disabled, so nothing was written. {again}"
    folder = Path(trainer.output_folder)
    there = next((name for name in IN_ORDER if name in written and (folder / name).exists()), None)
    if there == FINAL:
        return f"the training itself is finished. Validate with: {command(trainer, VALIDATE)}"
    known = "" if there is None else f"the state after epoch {written[there]} is in {folder / there}. {further}"
    if failure is not None:
        remains = f"But {known}" if known else f"There is no older one. {again}"
        return f"the state after epoch {lost} could not be written: {failure}. {remains}"
    nothing = "no checkpoint was written" if trainer.current_epoch else "no epoch was finished, so nothing is lost"
    return known or f"{nothing}. {again}"


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
