"""The gauntlet finds what is not equal, and does not take a fault that never struck for one that was survived."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from safeloader.report.audit import audit_file
from tests.gauntlet import orders
from tests.gauntlet.faults import ExportKilled, Scene, SmallShm, WorkersKilled
from tests.gauntlet.outcome import compare
from tests.gauntlet.training import Struck, Training


def leave(folder: Path, *, weight: float = 1.0, checksum: str = "00ff", dice: float = 0.5) -> Training:
    """What a training leaves."""
    (folder / "validation").mkdir(parents=True)
    for pool in ("train", "val"):
        lines = [{"audit": 1, "seed": 1, "stream": 0}, {"ticket": 0, "cases": ["a"], "checksum": checksum, "parts": {}}]
        (folder / audit_file(pool)).write_text("".join(json.dumps(line) + "\n" for line in lines))
    torch.save({"network_weights": {"layer": torch.tensor([weight])}}, folder / "checkpoint_final.pth")
    case = {
        "metrics": {"1": {"Dice": dice}},
        "prediction_file": str(folder / "a.nii.gz"),
        "reference_file": "/b/a.nii.gz",
    }
    summary = {"foreground_mean": {"Dice": dice}, "mean": {}, "metric_per_case": [case]}
    (folder / "validation" / "summary.json").write_text(json.dumps(summary))
    return Training("3d_small", "0", folder)


def test_two_that_are_equal(tmp_path: Path) -> None:
    outcome = compare("3d", leave(tmp_path / "a"), leave(tmp_path / "b"))
    assert outcome.differences == [] and outcome.dice == (0.5, 0.5)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"weight": 1.0000001}, ["the weights in checkpoint_final.pth differ"]),
        ({"dice": 0.5000000001}, ["summary.json differs"]),
        (
            {"checksum": "00fe"},
            ["the batches of train differ, first at ticket 0", "the batches of val differ, first at ticket 0"],
        ),
    ],
)
def test_whatever_differs_is_said(other: dict[str, Any], said: list[str], tmp_path: Path) -> None:
    assert compare("3d", leave(tmp_path / "a"), leave(tmp_path / "b", **other)).differences == said


def failed(training: Training) -> None:
    training.failure = "exit status 1: no more memory"


def left(training: Training) -> None:
    training.left.append("process 7 (sl-worker)")


def not_struck(training: Training) -> None:
    training.struck.append(Struck("worker-killed", 0, proven=False))


@pytest.mark.parametrize(
    ("happens", "said"),
    [
        (failed, "disturbed: exit status 1: no more memory"),
        (left, "disturbed: left behind: process 7 (sl-worker)"),
        (not_struck, "worker-killed did not strike, or nothing shows it (injected 0)"),
    ],
)
def test_what_went_wrong_is_said(happens: Callable[[Training], None], said: str, tmp_path: Path) -> None:
    disturbed = leave(tmp_path / "b")
    happens(disturbed)
    assert compare("3d", leave(tmp_path / "a"), disturbed).differences == [said]


EXPORT_DEATH = {"kind": "export-death", "message": "the export: the process (pid 7) was killed by SIGKILL after 1.0 s"}


def scene(**known: Any) -> Scene:
    return Scene(**{"trainer_pid": 1, "steps": [], "incidents": [], "console": "", **known})


def test_nothing_is_proven_before_it_has_struck(tmp_path: Path) -> None:
    for fault in (WorkersKilled(tmp_path), SmallShm(tmp_path), ExportKilled(tmp_path)):
        assert fault.times == 0
        assert not fault.proven(scene(incidents=[EXPORT_DEATH]))


def test_an_order_that_is_obeyed_has_struck(tmp_path: Path) -> None:
    fault = ExportKilled(tmp_path)
    (order,) = Path(fault.environment()[orders.ORDERS_VARIABLE]).iterdir()
    order.unlink()
    assert fault.times == 1
    assert not fault.proven(scene(incidents=[{**EXPORT_DEATH, "kind": "worker-death"}]))
    assert fault.proven(scene(incidents=[EXPORT_DEATH]))
