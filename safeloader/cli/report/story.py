"""What the files of a training say, put in one order: nnU-Net's logs, our history, our incidents, our report.

A training that was continued has several logs and starts; an epoch that was trained twice counts as it was the last
time. Lines that a crash has cut off are left out and counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from safeloader.errors import ConfigError
from safeloader.faults.explain.incidents import Summary, sum_up
from safeloader.nnunet.history import EPOCHS_FILE
from safeloader.nnunet.record import REPORT_FILE
from safeloader.pool.book import INCIDENTS_FILE
from safeloader.report import journal

_EPOCH: Final = re.compile(r"Epoch (\d+)\s*$")
_VALUE: Final = re.compile(r"(train_loss|val_loss|Epoch time:|Pseudo dice) *(.*?)(?: s)?\s*$")
_NUMBER: Final = re.compile(r"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|nan")


@dataclass
class Epoch:
    """One epoch; None or missing for what no file tells.

    Attributes:
        number: From 0.
        ended: When.
        time_s: nnU-Net's own epoch time.
        train_loss, val_loss: nnU-Net's.
        dice: Its pseudo Dice, the mean of the classes.
        batches: That training and validation took, by loader. wait_s: how long they waited for them.
        restarts: Workers replaced in it, by loader.
        trainer_nbytes: Resident memory of the trainer at its end. workers_nbytes: of all workers.
    """

    number: int
    ended: datetime | None = None
    time_s: float | None = None
    train_loss: float | None = None
    val_loss: float | None = None
    dice: float | None = None
    batches: dict[str, int] = field(default_factory=dict)
    wait_s: dict[str, float] = field(default_factory=dict)
    restarts: dict[str, int] = field(default_factory=dict)
    trainer_nbytes: int | None = None
    workers_nbytes: int | None = None


@dataclass(frozen=True)
class Story:
    """A training, as far as its files tell it.

    Attributes:
        folder: nnU-Net's output folder.
        epochs: In order.
        starts: Of the training, oldest first, as `nnunet.history` writes them.
        report: `safeloader_report.json`; empty if there is none.
        records: Incidents, oldest first. summary: the same by cause.
        skipped: Lines that hold no whole record.
    """

    folder: Path
    epochs: Sequence[Epoch]
    starts: Sequence[Mapping[str, Any]]
    report: Mapping[str, Any]
    records: Sequence[Mapping[str, Any]]
    summary: Summary
    skipped: int

    @classmethod
    def read(cls, folder: Path) -> Story:
        """Read all files of a training.

        Raises:
            ConfigError: The folder holds no training with SafeLoader, or can't be read.
        """
        if not folder.is_dir():
            raise ConfigError(f"{folder} is no folder; give nnU-Net's output folder, …/fold_X")
        if not any((folder / name).exists() for name in (EPOCHS_FILE, REPORT_FILE, INCIDENTS_FILE)):
            raise ConfigError(
                f"{folder} has no file of SafeLoader's ({EPOCHS_FILE}, {REPORT_FILE}); give nnU-Net's output folder of "
                "a training with it, …/fold_X"
            )
        try:
            history, cut = _records(folder / EPOCHS_FILE)
            incidents, also_cut = _records(folder / INCIDENTS_FILE)
            report = _report(folder / REPORT_FILE)
            logs = "\n".join(path.read_text(encoding="utf-8", errors="replace") for path in _logs(folder))
        except OSError as error:
            raise ConfigError(f"{error.filename} can't be read: {error.strerror}") from error
        return cls(
            folder,
            _epochs(history, logs),
            [record for record in history if record.get("kind") == "start"],
            report,
            incidents,
            sum_up(incidents),
            cut + also_cut,
        )


def _records(path: Path) -> tuple[list[dict[str, Any]], int]:
    if not path.exists():
        return [], 0
    entries = journal.read(path)
    return list(entries), entries.skipped


def _report(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _logs(folder: Path) -> list[Path]:
    """nnU-Net's logs, oldest first: their names hold the time, but not in an order that sorts."""
    return sorted(folder.glob("training_log_*.txt"), key=lambda path: path.stat().st_mtime)


def _epochs(history: Sequence[Mapping[str, Any]], logs: str) -> list[Epoch]:
    epochs: dict[int, Epoch] = {}
    for number, values in _of_logs(logs):
        epoch = epochs[number] = Epoch(number)
        epoch.train_loss, epoch.val_loss = values.get("train_loss"), values.get("val_loss")
        epoch.dice, epoch.time_s = values.get("Pseudo dice"), values.get("Epoch time:")
    before: Mapping[str, Any] = {}
    for record in history:
        loaders = record.get("loaders", {})
        if record.get("kind") == "epoch":
            _add(epochs.setdefault(int(record["epoch"]), Epoch(int(record["epoch"]))), record, loaders, before)
        before = loaders  # a new start counts from 0, or from what was waited for before its first epoch
    return [epochs[number] for number in sorted(epochs)]


def _add(epoch: Epoch, record: Mapping[str, Any], loaders: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """What has been counted since the epoch before."""
    epoch.ended = datetime.fromisoformat(record["at"])
    epoch.trainer_nbytes = record.get("trainer_nbytes")
    epoch.workers_nbytes = sum(loader.get("workers_nbytes", 0) for loader in loaders.values())
    for name, loader in loaders.items():
        earlier = before.get(name, {})
        epoch.batches[name] = loader["batches"] - earlier.get("batches", 0)
        epoch.wait_s[name] = loader["wait_s"] - earlier.get("wait_s", 0.0)
        epoch.restarts[name] = loader["restarts"] - earlier.get("restarts", 0)


def _of_logs(text: str) -> Iterator[tuple[int, dict[str, float]]]:
    """Each epoch of nnU-Net's logs that has come to its end, with its numbers."""
    number: int | None = None
    values: dict[str, float] = {}
    for line in text.splitlines():
        if found := _EPOCH.search(line):
            number, values = int(found[1]), {}
        elif number is not None and (found := _VALUE.search(line)):
            # numpy 2 writes np.float32(0.81): the last number of each is the value, and 32 is not.
            numbers = [float(one) for one in _NUMBER.findall(re.sub(r"np\.float\d+", "", found[2]))]
            if numbers:
                values[found[1]] = sum(numbers) / len(numbers)
            if found[1] == "Epoch time:":
                yield number, values
                number = None
