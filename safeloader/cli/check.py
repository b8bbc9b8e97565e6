"""`safeloader check`: is a seed all that a training's batches depend on?"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from safeloader.cli.command import Command, add_training, show
from safeloader.errors import ConfigError

if TYPE_CHECKING:
    from safeloader.testing import Difference

_SHOWN: Final = 5


class Check(Command):
    """See whether a training's batches depend on their seed alone.

    Makes the first batches of nnU-Net's own training stream twice, by different workers, with the trainer's own
    transforms, and compares them bit for bit. A loader or transform that counts its calls, reads the clock, asks for
    its thread_id, or makes itself a new generator of random numbers for each batch is found by that.

    Exit codes: 0 they are the same, 1 they differ, 2 the dataset, configuration or trainer can't be used.
    """

    name = "check"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        add_training(parser)
        parser.add_argument("--tickets", type=int, default=20, help="how many batches (default: 20)")

    def run(self, arguments: argparse.Namespace) -> int:
        """Make them twice, and say what differs."""
        from safeloader.nnunet.stock import Asked, training_loader  # torch and nnU-Net take seconds to import
        from safeloader.testing import make_twice

        if arguments.tickets < 1:
            raise ConfigError(f"--tickets {arguments.tickets}: must be at least 1")
        work = training_loader(
            Asked(arguments.dataset, arguments.configuration, arguments.fold, arguments.plans, arguments.trainer)
        )
        differences = make_twice(work.loader, work.transform, tickets=arguments.tickets, name="check")
        show(in_words(differences, arguments.tickets))
        return 1 if differences else 0


def in_words(differences: Sequence[Difference], tickets: int) -> str:
    """What was found, for a person."""
    made = "1 batch, made" if tickets == 1 else f"{tickets} batches, each made"
    if not differences:
        return f"{made} twice by different workers: the same, bit for bit. Their seed is all that they depend on."
    lines = [f"{made} twice by different workers: {len(differences)} of them differ."]
    for difference in differences[:_SHOWN]:
        first, second = (", ".join(cases) or "unknown cases" for cases in difference.cases)
        whose = f"of {first}" if first == second else f"of {first} the one time, of {second} the other"
        what = ", ".join(difference.parts) or "all of it"
        lines.append(f"  ticket {difference.ticket} ({whose}): {what}")
    if len(differences) > _SHOWN:
        lines.append(f"  and {len(differences) - _SHOWN} more")
    lines.append(
        "What to do: look in the loader and its transforms for what does not follow from the seed: a count of calls, "
        "the clock, thread_id, a generator that is made anew for each batch, the order of files or of a set."
    )
    return "\n".join(lines)
