"""`safeloader check` on a real dataset, with nnU-Net's own loader and transforms."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from safeloader.cli import main
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


def test_nnunets_own_batches_depend_on_their_seed_alone(
    workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(workspace) == 0
    assert capsys.readouterr().out == (
        "8 batches, each made twice by different workers: the same, bit for bit. Their seed is all that they depend "
        "on.\n"
    )
    assert not list(workspace.results.rglob("training_log*")), "nothing is written into nnUNet_results"


class Clock:
    """A transform that reads the clock."""

    def __init__(self, transforms: Any) -> None:
        self.transforms = transforms

    def __call__(self, **sample: Any) -> Any:
        transformed = self.transforms(**sample)
        transformed["image"][0, 0, 0, 0] = time.monotonic()
        return transformed


def test_a_transform_that_does_not_follow_from_the_seed_is_found(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stock = nnUNetTrainer.get_training_transforms
    monkeypatch.setattr(
        nnUNetTrainer, "get_training_transforms", staticmethod(lambda *args, **kwargs: Clock(stock(*args, **kwargs)))
    )
    assert check(workspace) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "8 batches, each made twice by different workers: 8 of them differ."
    assert said[1].startswith("  ticket 0 (of brain_") and said[1].endswith("): data")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-d", "999"], "nnU-Net does not find -d 999 -c"),
        (["-c", "4d"], "-c 4d -f 0"),
        (["-p", "nnUNetOtherPlans"], "-p nnUNetOtherPlans"),
        (["-tr", "nnUNetTrainerOfMine"], "-tr nnUNetTrainerOfMine"),
        (["--tickets", "0"], "--tickets 0: must be at least 1"),
    ],
)
def test_what_is_not_there_gets_one_line(
    options: list[str], words: str, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check(workspace, *options) == 2
    said = capsys.readouterr().err
    assert said.startswith("safeloader check: ") and words in said
    assert said.count("\n") == 1, said
