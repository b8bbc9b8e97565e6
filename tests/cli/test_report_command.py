"""`safeloader report`: a page from the files of a training, whole ones and such as a crash leaves behind."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from safeloader.cli import main
from safeloader.cli.report.pictures import pictures
from safeloader.cli.report.story import Epoch, Story
from safeloader.faults.explain.incidents import sum_up

LOG = """
2026-11-25 10:00:00.1: Epoch 0
2026-11-25 10:00:00.2: Current learning rate: 0.01
2026-11-25 10:00:30.1: train_loss -0.1234
2026-11-25 10:00:30.1: val_loss -0.2
2026-11-25 10:00:30.1: Pseudo dice [np.float32(0.5), np.float32(0.75)]
2026-11-25 10:00:30.1: Epoch time: 30.05 s

2026-11-25 10:00:30.2: Epoch 1
2026-11-25 10:01:00.1: train_loss -0.3
2026-11-25 10:01:00.1: val_loss -0.4
2026-11-25 10:01:00.1: Pseudo dice [0.7, nan]
2026-11-25 10:01:00.1: Epoch time: 29.0 s

2026-11-25 10:01:00.2: Epoch 2
"""


def counts(batches: int, wait_s: float, restarts: int) -> dict[str, Any]:
    return {"train": {"batches": batches, "wait_s": wait_s, "restarts": restarts, "workers_nbytes": 1 << 30}}


def start(epoch: int, wait_s: float = 4.0) -> dict[str, Any]:
    return {
        "kind": "start",
        "at": "2026-11-25T10:00:00.000+00:00",
        "epoch": epoch,
        "versions": {"torch": "2.14.1", "nnunetv2": "2.8.1"},
        "machine": {"host": "node<7>", "cpus": "the machine has 2 CPUs"},
        "loaders": counts(1, wait_s, 0),
    }


def epoch(number: int, batches: int, wait_s: float, restarts: int) -> dict[str, Any]:
    at = f"2026-11-25T10:0{number}:30.000+00:00"
    loaders = counts(batches, wait_s, restarts)
    return {"kind": "epoch", "at": at, "epoch": number, "trainer_nbytes": 2 << 30, "loaders": loaders}


INCIDENT = {
    "at": "2026-11-25T10:00:12+00:00",
    "pool": "train",
    "kind": "worker-death",
    "signal": "SIGSEGV",
    "stage": "loading",
    "case": "brain_<b>4</b>",
    "stacks": "File x.py, line 3",
    "message": "worker train-1 (pid 9) was killed by SIGSEGV while loading case brain_<b>4</b>.",
}


@pytest.fixture(scope="module", autouse=True)
def fonts() -> None:
    """Before a test counts descriptors: matplotlib keeps its fonts' files open."""
    pictures(Story(Path(), [Epoch(0, time_s=1.0)], [], {}, [], sum_up([]), 0))


@pytest.fixture
def fold(tmp_path: Path) -> Path:
    folder = tmp_path / "nnUNetTrainerSafeLoader__nnUNetPlans__3d_fullres" / "fold_0"
    folder.mkdir(parents=True)
    (folder / "training_log_2026_11_25_10_00_00.txt").write_text(LOG)
    lines = [start(0), epoch(0, 21, 5.5, 2), epoch(1, 41, 5.75, 2), start(1, wait_s=3.0), epoch(1, 21, 3.5, 1)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "safeloader_epochs.jsonl").write_text(text + '{"kind": "epoch", "epo')
    (folder / "safeloader_incidents.jsonl").write_text(json.dumps(INCIDENT) + "\n")
    loaders = {"train": {"batches": 21, "wait_s": 3.5, "restarts": 1, "quarantined": ["brain_001"], "seed": 7}}
    (folder / "safeloader_report.json").write_text(json.dumps({"outcome": "finished", "loaders": loaders}))
    return folder


def test_the_files_are_put_in_one_order(fold: Path) -> None:
    story = Story.read(fold)
    first, second = story.epochs
    assert (first.number, first.time_s, first.dice, first.train_loss) == (0, 30.05, 0.625, -0.1234)
    # What was waited for before the first epoch is no part of it.
    assert (first.batches, first.wait_s, first.restarts) == ({"train": 20}, {"train": 1.5}, {"train": 2})
    # Trained twice, since the training was continued: the second time counts.
    assert (second.batches, second.wait_s, second.restarts) == ({"train": 20}, {"train": 0.5}, {"train": 1})
    assert [one["epoch"] for one in story.starts] == [0, 1]
    assert story.skipped == 1 and story.summary.total == 1


class Page(HTMLParser):
    """What a browser would load, and the text that it would show."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loads += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page(fold: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(fold)]) == 0
    assert capsys.readouterr().out == f"Written: {fold / 'safeloader_report.html'}\n"
    text = (fold / "safeloader_report.html").read_text()
    page = Page()
    page.feed(text)
    assert len(page.loads) == 4 and all(load.startswith("data:image/png;base64,") for load in page.loads)
    assert "<script" not in text
    assert "Outcome: finished. 2 epochs, 2 starts, 3 workers replaced, 1 failure." in page.text
    assert "brain_001" in page.text and "node<7>" in page.text
    assert (
        "2026-11-25 10:00:12 worker train-1 (pid 9) was killed by SIGSEGV while loading case brain_<b>4</b>."
        in page.text
    )
    assert "File x.py, line 3" in page.text and "1 line left out: cut off by a crash." in page.text
    for name in ("epochs", "throughput", "dice", "memory"):
        assert (fold / f"safeloader_{name}.png").read_bytes().startswith(b"\x89PNG")


def test_a_training_that_has_just_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "safeloader_epochs.jsonl").write_text(json.dumps(start(0)) + "\n")
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "out")]) == 0
    assert re.search(
        r"<strong>unknown: it has not come to an end", (tmp_path / "out/safeloader_report.html").read_text()
    )
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["safeloader_report.html"]


def half_a_report(fold: Path) -> None:
    (fold / "safeloader_report.json").write_text('{"outcome": "fin')


def another_version(fold: Path) -> None:
    (fold / "safeloader_epochs.jsonl").write_text('{"kind": "weather"}\n[1]\n')


@pytest.mark.parametrize("damage", [half_a_report, another_version])
def test_what_can_not_be_understood_is_left_out(damage: Any, fold: Path) -> None:
    damage(fold)
    assert main(["report", str(fold)]) == 0


def test_bad_input_gets_one_line(fold: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for arguments, words in (
        ([str(tmp_path / "missing")], f"{tmp_path / 'missing'} is no folder; give nnU-Net's output folder, …/fold_X"),
        ([str(tmp_path / "empty")], f"{tmp_path / 'empty'} has no file of SafeLoader's (safeloader_epochs.jsonl, "),
        (
            [str(fold), "-o", str(tmp_path / "file")],
            f"nothing can be written to {tmp_path / 'file'}: File exists; name",
        ),
    ):
        assert main(["report", *arguments]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"safeloader report: {words}") and said.count("\n") == 1
    os.remove(fold / "safeloader_epochs.jsonl")
    os.mkdir(fold / "safeloader_epochs.jsonl")
    assert main(["report", str(fold)]) == 2
    assert capsys.readouterr().err.endswith("safeloader_epochs.jsonl can't be read: Is a directory\n")
