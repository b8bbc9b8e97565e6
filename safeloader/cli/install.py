"""`safeloader install`: let nnU-Net find SafeLoader's trainer."""

from __future__ import annotations

import argparse
import sys

from safeloader.cli.command import Command
from safeloader.nnunet.install import Change, Outcome, export_line, install, uninstall


class Install(Command):
    """Let nnU-Net find the trainer nnUNetTrainerSafeLoader, and SafeLoader before any other trainer.

    Writes one file of a few lines into the folder nnunetv2/training/nnUNetTrainer/variants of the installed nnU-Net.
    Calling it again changes nothing; call it again after nnU-Net was updated. Where that folder is read-only, it
    prints the line for your shell that does the same without writing anything (nnU-Net 2.8.0 and later).

    Afterwards: nnUNetv2_train DATASET CONFIGURATION FOLD -tr nnUNetTrainerSafeLoader
    or, for a trainer of another name, that name with SafeLoader behind it: -tr nnUNetTrainer_250epochsSafeLoader
    (or nnUNetTrainerSafeLoader_250epochs).
    """

    name = "install"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declare `--uninstall`."""
        parser.add_argument("--uninstall", action="store_true", help="remove the file again")

    def run(self, arguments: argparse.Namespace) -> int:
        """Write or remove the shim, and say what was done."""
        change = uninstall() if arguments.uninstall else install()
        if change.outcome is Outcome.READ_ONLY:
            return _refused(change, removing=arguments.uninstall)
        print(_SAID[change.outcome].format(path=change.path))
        if not arguments.uninstall:
            print("Train with: nnUNetv2_train DATASET CONFIGURATION FOLD -tr nnUNetTrainerSafeLoader")
        return 0


_SAID = {
    Outcome.WRITTEN: "Written: {path}",
    Outcome.REPLACED: "Updated: {path}",
    Outcome.UNCHANGED: "Already there: {path}",
    Outcome.REMOVED: "Removed: {path}",
    Outcome.ABSENT: "Nothing to remove: there is no {path}",
}


def _refused(change: Change, *, removing: bool) -> int:
    if removing:
        print(f"safeloader install: can't remove {change.path}: {change.reason}", file=sys.stderr)
        return 1
    print(
        f"Can't write {change.path}: {change.reason}. With this line nnU-Net 2.8.0 and later finds the trainer:",
        file=sys.stderr,
    )
    # Alone on stdout, for `eval "$(safeloader install)"`. Still a 1: without the line nothing is installed.
    print(export_line())
    return 1
