"""`safeloader check` on a real dataset, with nnU-Net's own loader and transforms."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import blosc2
import psutil
import pytest
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from safeloader.cli import main
from safeloader.faults.cpus import CpuBudget, available_cpus
from safeloader.faults.memory import MemoryBudget
from safeloader.nnunet.check import batches, inspection
from safeloader.nnunet.check.batches import Tried
from safeloader.nnunet.check.cases import Expected
from safeloader.nnunet.check.inspection import Verdict, inspect
from safeloader.nnunet.workspace import SMALL_CONFIGURATION, Workspace


@pytest.fixture
def workspace(make_workspace: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch) -> Workspace:
    made = make_workspace()
    for name, value in made.environment().items():
        if name.startswith("nnUNet_"):
            monkeypatch.setenv(name, value)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    return made


def check(workspace: Workspace, *options: str) -> int:
    return main(["check", "-d", workspace.dataset, "-c", SMALL_CONFIGURATION, "--tickets", "8", *options])


@pytest.fixture
def damaged(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Workspace, Path]:
    """A dataset that may be damaged, and the folder of its preprocessed cases."""
    own = replace(workspace, folder=tmp_path)
    shutil.copytree(workspace.preprocessed, own.preprocessed)
    monkeypatch.setenv("nnUNet_preprocessed", str(own.preprocessed))
    return own, own.preprocessed / own.dataset / "nnUNetPlans_3d_fullres"


def change(path: Path, change: Callable[[Any], None]) -> None:
    """Read what nnU-Net's preprocessing has written, change it, and write it again."""
    stored = blosc2.open(str(path))
    values = stored[:]
    change(values)
    path.unlink()
    blosc2.asarray(values, urlpath=str(path), chunks=stored.chunks, blocks=stored.blocks)


def with_label_7(values: Any) -> None:
    values[0, 3, 3, 3] = 7


def with_nan(values: Any) -> None:
    values[0, 3, 3, 3:5] = float("nan")


def expected_of(folder: Path) -> Expected:
    return Expected(str(folder), 1, (0, 1, 2), None, (0, 1, 2))


def test_bad_cases_are_named_with_what_is_wrong(
    damaged: tuple[Workspace, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    workspace, folder = damaged
    os.truncate(folder / "brain_000.b2nd", 4096)
    change(folder / "brain_001_seg.b2nd", with_label_7)
    change(folder / "brain_002.b2nd", with_nan)
    (folder / "brain_003.pkl").unlink()
    assert check(workspace, "--files-only") == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("5 cases (") and said[0].endswith(f") in {folder} read: 4 are bad.")
    assert said[1].startswith("  brain_000: ") and len(said[1]) > 20
    assert said[2] == "  brain_001: the segmentation holds 7, and dataset.json names 0, 1, 2"
    assert said[3] == "  brain_002: 2 voxels of the image are NaN or infinite: the loss will be NaN"
    assert said[4].startswith("  brain_003: it can't be read: FileNotFoundError: ") and "brain_003.pkl" in said[4]
    assert said[5].startswith("What to do: preprocess again (`nnUNetv2_preprocess -d DATASET -c CONFIG`)")
    assert sorted(path.name for path in folder.iterdir() if "safeloader" in path.name) == []

    # The good one is remembered; a bad one is read again, and what has changed as well.
    change(folder / "brain_001_seg.b2nd", lambda values: None)
    assert check(workspace, "--files-only") == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith(" read (1 of them in an earlier check): 4 are bad.")
    change(folder / "brain_004.b2nd", with_nan)
    assert check(workspace, "--files-only") == 1
    assert capsys.readouterr().out.splitlines()[0].endswith(" read: 5 are bad.")


def test_other_plans_are_seen_by_the_shape(damaged: tuple[Workspace, Path], capsys: pytest.CaptureFixture[str]) -> None:
    workspace, folder = damaged
    path = folder.parent / "nnUNetPlans.json"
    plans = json.loads(path.read_text())
    plans["configurations"]["3d_fullres"]["spacing"] = [3.0, 3.0, 3.0]
    path.write_text(json.dumps(plans))
    assert check(workspace, "--files-only") == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith(": 5 are bad.")
    assert said[1].endswith(": it was preprocessed with others")


def test_a_reader_that_is_killed_is_replaced_and_the_case_read_again(damaged: tuple[Workspace, Path]) -> None:
    _, folder = damaged
    killed: list[str] = []

    def kill_the_next(verdict: Verdict) -> None:
        if not killed:
            killed.append(verdict.case)
            (reader,) = psutil.Process().children()
            reader.kill()

    names = [f"brain_{number:03d}" for number in range(5)]
    verdicts = inspect(expected_of(folder), names, readers=1, tell=kill_the_next)
    assert [(verdict.case, verdict.problems) for verdict in verdicts] == [(name, ()) for name in names]
    assert killed == ["brain_000"]


def test_a_reader_that_dies_before_it_is_given_a_case_ends_like_any_other(damaged: tuple[Workspace, Path]) -> None:
    _, folder = damaged
    reader = inspection._Reader(expected_of(folder))
    reader.process.kill()
    reader.process.wait()
    reader.take("brain_000")
    assert reader.end().what == "was killed by SIGKILL"


def test_a_case_that_kills_whoever_reads_it_and_one_that_does_not_answer(damaged: tuple[Workspace, Path]) -> None:
    _, folder = damaged
    (folder / "brain_000.pkl").write_bytes(pickle.dumps(Deadly()))
    (folder / "brain_001.pkl").unlink()
    os.mkfifo(folder / "brain_001.pkl")  # as storage that hangs: to open it waits for ever
    names = [f"brain_{number:03d}" for number in range(3)]
    verdicts = inspect(expected_of(folder), names, readers=2, tell=lambda verdict: None, timeout_s=20)
    assert [verdict.problems for verdict in verdicts] == [
        ("the process that read it was killed by SIGSEGV, twice",),
        ("it was not read within 20 s: storage that hangs",),
        (),
    ]


class Deadly:
    """Ends the process that unpickles it, as native code that crashes."""

    def __reduce__(self) -> Any:
        return os.kill, (PidOfWhoever(), signal.SIGSEGV)


class PidOfWhoever:
    """Becomes the reader's pid."""

    def __reduce__(self) -> Any:
        return os.getpid, ()


def test_a_folder_with_nothing_in_it(damaged: tuple[Workspace, Path], capsys: pytest.CaptureFixture[str]) -> None:
    workspace, folder = damaged
    shutil.rmtree(folder)
    folder.mkdir()
    assert check(workspace, "--files-only") == 2
    said = capsys.readouterr().err
    assert said.startswith("safeloader check: ") and said.count("\n") == 1


def test_a_good_dataset(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(workspace) == 0
    files, batches, advice, same = capsys.readouterr().out.splitlines()
    assert files.startswith("5 cases (") and files.endswith(": all are whole, and as the plans and dataset.json say.")
    assert re.fullmatch(
        r"8 batches of \d+ \w+ by one worker: [\d.]+ s each \(median; [\d.]+ to [\d.]+\), \d+ MiB of memory of its "
        r"own\.",
        batches,
    )
    assert re.match(rf"Train with: export nnUNet_n_proc_DA={min(12, available_cpus().cpus)}   \(", advice)
    assert same == (
        "8 batches, each made twice by different workers: the same, bit for bit. Their seed is all that they depend on."
    )
    assert not list(workspace.results.rglob("training_log*")), "nothing is written into nnUNet_results"


def test_memory_that_does_not_suffice_lowers_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = Tried(20, (0.5, 0.4, 0.6), worker_nbytes=1 << 30, batch_nbytes=26_000_000)
    monkeypatch.setattr(batches, "available_cpus", lambda: CpuBudget(64, "the machine has 64 CPUs"))
    monkeypatch.setattr(batches, "available", lambda: MemoryBudget(8 << 30, "the cgroup allows 8.0 GiB"))
    advice = batches.advise(tried)
    assert (advice.workers, advice.by_memory, advice.per_s) == (4, True, 8.0)
    assert advice.nbytes <= 0.9 * (8 << 30)
    monkeypatch.setattr(batches, "available", lambda: MemoryBudget(80 << 30, "the machine has 80.0 GiB"))
    assert batches.advise(tried).workers == 12


class Clock:
    """A transform that reads the clock."""

    def __init__(self, transforms: Any) -> None:
        self.transforms = transforms

    def __call__(self, **sample: Any) -> Any:
        transformed = self.transforms(**sample)
        transformed["image"][0, 0, 0, 0] = time.monotonic()
        return transformed


@pytest.mark.usefixtures("warm_nursery")
def test_a_transform_that_does_not_follow_from_the_seed_is_found(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stock = nnUNetTrainer.get_training_transforms
    monkeypatch.setattr(
        nnUNetTrainer, "get_training_transforms", staticmethod(lambda *args, **kwargs: Clock(stock(*args, **kwargs)))
    )
    assert check(workspace, "--no-files") == 1
    said = capsys.readouterr().out.splitlines()
    assert said[2] == "8 batches, each made twice by different workers: 8 of them differ."
    assert said[3].startswith("  ticket 0 (of brain_") and said[3].endswith("): data")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-d", "999"], "nnU-Net does not find -d 999 -c"),
        (["-c", "4d"], "-c 4d -f 0"),
        (["-p", "nnUNetOtherPlans"], "-p nnUNetOtherPlans"),
        (["-tr", "nnUNetTrainerOfMine"], "-tr nnUNetTrainerOfMine"),
        (["--tickets", "0"], "--tickets 0: must be at least 1"),
        (["--no-files", "--files-only"], "--no-files and --files-only: nothing would be left"),
    ],
)
def test_what_is_not_there_gets_one_line(
    options: list[str], words: str, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(workspace, *options) == 2
    said = capsys.readouterr().err
    assert said.startswith("safeloader check: ") and words in said
    assert said.count("\n") == 1, said
