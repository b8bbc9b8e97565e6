"""The history of a training: what is written for each epoch, and where else it is told. The trainer is a stand-in."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from safeloader import SafeAugmenter
from safeloader.nnunet.history import KeepsHistory
from safeloader.testing import wait_until
from tests.loaders import RandomLoader

pytestmark = pytest.mark.usefixtures("warm_nursery")


class Elsewhere:
    """As nnU-Net's WandbLogger: takes any name."""

    def __init__(self) -> None:
        self.said: dict[tuple[str, int], Any] = {}

    def log(self, key: str, value: Any, step: int) -> None:
        self.said[key, step] = value


class StandIn:
    """As much of nnU-Net's trainer as the history sees."""

    local_rank = 0
    current_epoch = 0
    device = torch.device("cpu")

    def __init__(self, folder: Path) -> None:
        self.output_folder = str(folder)
        self.logger = SimpleNamespace(loggers=[Elsewhere()])
        self.dataloader_train = SafeAugmenter(RandomLoader(), None, 1, 1)
        self.dataloader_val = iter([])  # a loader that is not ours has no history
        self.log: list[str] = []

    def on_train_start(self) -> None:
        next(self.dataloader_train)

    def on_epoch_end(self) -> None:
        self.current_epoch += 1

    def on_train_end(self) -> None:
        self.dataloader_train.close()

    def print_to_log_file(self, *words: object) -> None:
        self.log.append(" ".join(map(str, words)))


class Trainer(KeepsHistory, StandIn):  # type: ignore[misc]
    """Its history is kept."""


def train(folder: Path, *, epochs: int = 2, kill_in: int | None = None) -> Trainer:
    trainer = Trainer(folder)
    try:
        trainer.on_train_start()
        for epoch in range(epochs):
            if epoch == kill_in:
                os.kill(trainer.dataloader_train.workers()[0].pid, signal.SIGKILL)
                wait_until(lambda: trainer.dataloader_train.report().restarts == 1)
            for _ in range(3):
                next(trainer.dataloader_train)
            trainer.on_epoch_end()
    finally:
        trainer.on_train_end()
    return trainer


def test_each_epoch_has_its_line(tmp_path: Path) -> None:
    trainer = train(tmp_path, kill_in=1)
    start, first, second = map(json.loads, (tmp_path / "safeloader_epochs.jsonl").read_text().splitlines())
    assert (start["kind"], start["epoch"], start["trainer"], start["machine"]["device"]) == (
        "start",
        0,
        "Trainer",
        "cpu",
    )
    assert (
        start["loaders"]["train"]["batches"] == 1 and start["versions"]["torch"] == torch.__version__.partition("+")[0]
    )
    assert [line["epoch"] for line in (first, second)] == [0, 1]
    assert [line["loaders"]["train"]["batches"] for line in (first, second)] == [4, 7]
    assert [line["loaders"]["train"]["restarts"] for line in (first, second)] == [0, 1]
    assert second["loaders"]["train"]["incidents"] == {"worker-death": 1}
    assert first["trainer_nbytes"] > 0 and set(first["loaders"]) == {"train"}
    said = trainer.logger.loggers[0].said
    assert said["safeloader/train_restarts", 1] == 1
    assert {name for name, _ in said} == {
        f"safeloader/train_{name}" for name in ("wait_s", "restarts", "quarantined", "workers_nbytes")
    }


def test_prometheus_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFELOADER_PROMETHEUS", str(tmp_path / "here.prom"))
    trainer = train(tmp_path)
    text = (tmp_path / "here.prom").read_text()
    training = "/".join(tmp_path.parts[-3:])
    assert f'safeloader_batches_total{{training="{training}",loader="train"}} 7\n' in text
    assert f'safeloader_epoch{{training="{training}"}} 1\n' in text
    assert trainer.log == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here.prom", "safeloader_epochs.jsonl"]


def test_files_that_can_not_be_written_stop_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAFELOADER_PROMETHEUS", str(tmp_path / "missing" / "here.prom"))
    (tmp_path / "safeloader_epochs.jsonl").mkdir()
    trainer = train(tmp_path, epochs=1)
    assert trainer.log == [
        f"SafeLoader: SAFELOADER_PROMETHEUS={tmp_path}/missing/here.prom can't be written: No such file or directory"
    ]
