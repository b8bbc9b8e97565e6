"""What a training says of its own progress, and into how many runs a log falls.

A Slurm output holds several runs if a job was requeued, continued with `--c`, or trains one fold after the other:
nnU-Net prints its citation at the start of each. What is said before the first of them belongs to the first.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from safeloader.faults.explain.model import Line

# What SafeLoader says of a failure that the training went on after, in that failure's own words.
_UNCOMPILED: Final = "SafeLoader: torch.compile"
# What nnU-Net says in every epoch, and what needs no second look.
_ORDINARY: Final = (
    "Epoch ",
    "train_loss ",
    "val_loss ",
    "Pseudo dice ",
    "Current learning rate",
    "Yayy!",
    "predicting ",
    _UNCOMPILED,
)
_OF_NNUNET: Final = (*_ORDINARY, "Desired fold", "This split has", "unpacking dataset", "lr: ", "do_dummy_2d")
MAX_RUNS: Final = 100
"""Runs that are kept: the last ones."""

_START: Final = "Please cite the following paper when using nnU-Net"
_SAID: Final = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)(?:\.\d+)?: ?(.*)")
_MAX_SAID_CHARS: Final = 300
_AT: Final = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d")


@dataclass
class Run:
    """How far one run came.

    Attributes:
        epoch: The last that began, or None.
        epochs: How many were completed.
        slowest_epoch_s: The longest of them.
        trained: "Training done." was said.
        validated: "Validation complete" was said.
        validating: The case that was predicted last, or "".
        last_time: Of the last line that has a time.
        trained_line: Which line said that training is done, or 0.
        epoch_lines: Which lines said that one of the last two epochs was completed.
        uncompiled_line: Which line said that the training goes on without torch.compile, or 0.
    """

    epoch: int | None = None
    epochs: int = 0
    slowest_epoch_s: float = 0.0
    trained: bool = False
    validated: bool = False
    validating: str = ""
    last_time: datetime | None = None
    trained_line: int = 0
    epoch_lines: list[int] = field(default_factory=list)
    uncompiled_line: int = 0

    def survived(self, number: int) -> bool:
        """Whether the training went on after line `number`.

        One epoch may still be completed after a worker has died: the stock loader of the validation batches lives on.
        """
        return number < self.trained_line or sum(line > number for line in self.epoch_lines) > 1

    def silence_before(self, moment: datetime) -> timedelta:
        """For how long nothing had been logged at `moment`."""
        return timedelta() if self.last_time is None else moment - self.last_time


class Progress:
    """Feed it every line; `runs` has one entry per start of nnU-Net (the last ones of very many), and at least one."""

    def __init__(self) -> None:
        self.runs = [Run()]
        self.starts = 0
        self.of_nnunet = False
        """Whether it said something that only nnU-Net says."""

    def feed(self, line: Line) -> bool:
        """Look at the next line; whether it is about progress and nothing else."""
        text = line.text
        if _START in text:
            self.starts += 1
            self.of_nnunet = True
            if self.starts > 1:
                self.runs = [*self.runs[1 - MAX_RUNS :], Run()]
            return True
        said = _SAID.search(text, 0, _MAX_SAID_CHARS) if "20" in text[:40] else None
        if said is None:
            return False
        self._said(line, said[1], said[2])
        return said[2].startswith(_ORDINARY)

    def _said(self, line: Line, time: str, words: str) -> None:
        run = self.runs[-1]
        run.last_time = datetime.fromisoformat(time)
        self.of_nnunet = self.of_nnunet or words.startswith(_OF_NNUNET)
        if words.startswith("Epoch time:"):
            run.epochs += 1
            run.epoch_lines = [*run.epoch_lines[-1:], line.number]
            run.slowest_epoch_s = max(run.slowest_epoch_s, _seconds(words))
        elif words.startswith("Epoch "):
            number = words.removeprefix("Epoch ").strip()
            run.epoch = int(number) if number.isdigit() else run.epoch
        elif words.startswith("Training done"):
            run.trained, run.trained_line = True, line.number
        elif words.startswith("Validation complete"):
            run.validated = True
        elif words.startswith(_UNCOMPILED):
            run.uncompiled_line = line.number
        elif words.startswith("predicting "):
            run.validating = words.removeprefix("predicting ").strip()


def time_in(text: str) -> datetime | None:
    """The first date and time in a line, as schedulers write it."""
    found = _AT.search(text)
    return None if found is None else datetime.fromisoformat(found[0])


def _seconds(words: str) -> float:
    number = words.removeprefix("Epoch time:").strip().removesuffix("s").strip()
    try:
        return float(number)
    except ValueError:
        return 0.0
