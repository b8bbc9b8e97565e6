"""`safeloader check`: are the files of a dataset whole, how many workers to take, do batches follow from their seed?"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from safeloader.cli.command import Command, add_training, show
from safeloader.errors import ConfigError
from safeloader.faults.cpus import available_cpus
from safeloader.faults.memory import gib

if TYPE_CHECKING:
    from safeloader.nnunet.check.batches import Advice, Tried
    from safeloader.nnunet.check.inspection import Verdict
    from safeloader.pool.work import Work
    from safeloader.testing import Difference

_SHOWN: Final = 5
_WORKERS: Final = "nnUNet_n_proc_DA"
LEDGER: Final = "safeloader_check_{}.jsonl"
"""In the dataset's folder in nnUNet_preprocessed, by the name of the configuration's data."""


class Check(Command):
    """Look through a dataset before it is trained on for days.

    1. Reads every preprocessed file of the configuration to its last byte, several at a time, and holds shapes, labels
       and properties against the plans and dataset.json. Names each bad case and what is wrong with it. What was found
       good is noted in the dataset's folder, so that a check that was cut short goes on; changed files are read again.
    2. Lets one worker make batches with the trainer's own transforms, and says how long they take, how much memory a
       worker needs, and which nnUNet_n_proc_DA to train with on this machine.
    3. Makes the same batches once more by other workers, and compares them bit for bit: a loader or transform that
       counts its calls, reads the clock, asks for its thread_id, or makes itself a new generator of random numbers for
       each batch is found by that.

    Exit codes: 0 all is well, 1 a case is bad or batches differ, 2 the dataset, configuration or trainer can't be used.
    """

    name = "check"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        add_training(parser)
        parser.add_argument("--tickets", type=int, default=20, help="how many batches (default: 20)")
        parser.add_argument("--no-files", action="store_true", help="leave out step 1")
        parser.add_argument("--files-only", action="store_true", help="only step 1")

    def run(self, arguments: argparse.Namespace) -> int:
        """Take the three steps; the batches are not tried while cases are bad."""
        from safeloader.nnunet.stock import Asked, loader_of, stock_trainer  # torch and nnU-Net take seconds to import

        if arguments.tickets < 1:
            raise ConfigError(f"--tickets {arguments.tickets}: must be at least 1")
        if arguments.no_files and arguments.files_only:
            raise ConfigError("--no-files and --files-only: nothing would be left")
        asked = Asked(arguments.dataset, arguments.configuration, arguments.fold, arguments.plans, arguments.trainer)
        with stock_trainer(asked, "cpu") as trainer:
            if not arguments.no_files and _check_files(trainer):
                return 1
            if arguments.files_only:
                return 0
            work = loader_of(trainer, asked)
        return _check_batches(work, arguments.tickets)


def _check_files(trainer: Any) -> bool:
    """Read all cases; whether one is bad."""
    from tqdm import tqdm  # nnU-Net brings it

    from safeloader.nnunet.check import cases
    from safeloader.nnunet.check.inspection import inspect
    from safeloader.nnunet.check.ledger import Ledger

    expected = cases.expectations(trainer)
    folder = Path(expected.folder)
    try:
        names = sorted(cases.dataset_of(expected).identifiers)
        ledger = Ledger(folder.parent / LEDGER.format(folder.name), expected)
        files = cases.files_of(expected, names)
    except OSError as error:
        raise ConfigError(f"{error.filename or folder} can't be read: {error.strerror}") from error
    todo = [name for name in names if not ledger.has(name, files[name])]
    tqdm.monitor_interval = 0  # else a thread of it stays
    with tqdm(total=len(todo), unit="case", disable=None) as bar:

        def tell(verdict: Verdict) -> None:
            if not verdict.problems:
                with suppress(OSError):  # a folder that may only be read: the next check begins anew
                    ledger.add(verdict.case, files[verdict.case])
            bar.update()

        verdicts = inspect(expected, todo, readers=available_cpus().cpus, tell=tell)
    with suppress(OSError):
        ledger.tidy()
    show(
        files_in_words(
            verdicts, len(names), sum(size for of in files.values() for size, _ in of.values()), expected.folder
        )
    )
    return any(verdict.problems for verdict in verdicts)


def files_in_words(verdicts: Sequence[Verdict], cases: int, nbytes: int, folder: str) -> str:
    """What was found in the files, for a person."""
    bad = [verdict for verdict in verdicts if verdict.problems]
    known = f" ({cases - len(verdicts)} of them in an earlier check)" if len(verdicts) < cases else ""
    read = f"{cases} cases ({gib(nbytes)}) in {folder} read{known}"
    if not bad:
        return f"{read}: all are whole, and as the plans and dataset.json say."
    lines = [f"{read}: {len(bad)} {'is' if len(bad) == 1 else 'are'} bad."]
    lines += [f"  {verdict.case}: {'; '.join(verdict.problems)}" for verdict in bad]
    lines.append(
        "What to do: preprocess again (`nnUNetv2_preprocess -d DATASET -c CONFIG`), or leave the cases out of "
        "splits_final.json. If they stay bad, look at their raw images, and at the disk."
    )
    return "\n".join(lines)


def _check_batches(work: Work, tickets: int) -> int:
    from safeloader.nnunet.check.batches import advise, try_batches
    from safeloader.testing import make_twice

    tried = try_batches(work, tickets)
    show(batches_in_words(tried, advise(tried)))
    differences = make_twice(work.loader, work.transform, tickets=tickets, name="check")
    show(in_words(differences, tickets))
    return 1 if differences else 0


def batches_in_words(tried: Tried, advice: Advice) -> str:
    """What a worker needs, and how many to take, for a person."""
    median_s, least_s, most_s = tried.batch_s
    count = "1 batch" if tried.batches == 1 else f"{tried.batches} batches"
    limit = advice.cpus.reason
    if advice.by_memory and advice.memory is not None:
        limit = f"memory allows no more ({advice.memory.reason})"
    asked = os.environ.get(_WORKERS)
    now = f" It is {asked} now." if asked not in (None, str(advice.workers)) else ""
    return "\n".join(
        [
            f"{count} of {gib(tried.batch_nbytes)} by one worker: {median_s:.2f} s each (median; {least_s:.2f} to "
            f"{most_s:.2f}), {gib(tried.worker_nbytes)} of memory of its own.",
            f"Train with: export {_WORKERS}={advice.workers}   ({limit}).{now} These workers make about "
            f"{advice.per_s:.1f} batches/s if no other program takes their CPUs, so a training step of more than "
            f"{1 / advice.per_s:.2f} s does not wait for them; with nnU-Net's workers for validation they need "
            f"{gib(advice.nbytes)}.",
        ]
    )


def in_words(differences: Sequence[Difference], tickets: int) -> str:
    """Which batches differ, for a person."""
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
