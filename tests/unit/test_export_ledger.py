"""Which outputs of an earlier validation count."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from safeloader.nnunet.export.ledger import LEDGER_FILE, Ledger, inputs_of, weights_identity

INPUTS: list[list[Any]] = [["case.b2nd", 1]]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """An output that the ledger of weights "w" has noted."""
    folder = tmp_path / "fold_0" / "validation"
    folder.mkdir(parents=True)
    file = folder / "case.nii.gz"
    file.write_text("voxels")
    _ledger(tmp_path).note(folder / "case", [file], probabilities=False, inputs=INPUTS)
    return folder / "case"


def _ledger(base: Path, weights: str = "w", rank: int = 0) -> Ledger:
    return Ledger(base / "fold_0", base, weights, rank)


def _done(ledger: Ledger, target: Path, **differing: Any) -> bool:
    return ledger.done(target, **{"probabilities": False, "inputs": INPUTS, **differing})


def test_what_is_unchanged_counts(tmp_path: Path, target: Path) -> None:
    assert _done(_ledger(tmp_path), target)
    assert not _done(_ledger(tmp_path), target.with_name("other"))


def test_of_other_weights_or_data_it_does_not(tmp_path: Path, target: Path) -> None:
    assert not _done(_ledger(tmp_path, "others"), target)
    assert not _done(_ledger(tmp_path), target, probabilities=True)
    assert not _done(_ledger(tmp_path), target, inputs=[["case.b2nd", 2]])


def test_a_file_that_was_changed_or_removed_does_not(tmp_path: Path, target: Path) -> None:
    file = target.with_name("case.nii.gz")
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert not _done(_ledger(tmp_path), target)
    file.unlink()
    assert not _done(_ledger(tmp_path), target)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"version": 1, "weights": "w", "exports": {"fold_0/validation/case": 1}}']
)
def test_a_damaged_ledger_knows_nothing(text: str, tmp_path: Path, target: Path) -> None:
    (tmp_path / "fold_0" / LEDGER_FILE).write_text(text)
    assert not _done(_ledger(tmp_path), target)


def test_each_rank_writes_its_own_and_all_count(tmp_path: Path, target: Path) -> None:
    other = target.with_name("other.nii.gz")
    other.write_text("voxels")
    _ledger(tmp_path, rank=1).note(target.with_name("other"), [other], probabilities=False, inputs=INPUTS)
    assert (tmp_path / "fold_0" / "safeloader_validation_rank1.json").exists()
    for rank in (0, 1):
        ledger = _ledger(tmp_path, rank=rank)
        assert _done(ledger, target) and _done(ledger, target.with_name("other"))


def test_older_versions_name_the_file_with_its_ending(tmp_path: Path) -> None:
    folder = tmp_path / "predicted_next_stage" / "3d_cascade"
    folder.mkdir(parents=True)
    (tmp_path / "fold_0").mkdir()
    file = folder / "case.npz"
    file.touch()
    _ledger(tmp_path).note(file, [file], probabilities=None, inputs=INPUTS)
    assert _done(_ledger(tmp_path), folder / "case", probabilities=None)


def test_the_identity_is_that_of_values_and_usage() -> None:
    weights = {"conv.weight": torch.ones(3), "steps": torch.tensor(7)}
    compiled = {f"module._orig_mod.{name}": value.clone() for name, value in weights.items()}
    identity = weights_identity(weights, ["plans"])
    assert weights_identity(compiled, ["plans"]) == identity, "DDP and torch.compile change names only"
    assert weights_identity(weights, ["other plans"]) != identity
    assert weights_identity({**weights, "steps": torch.tensor(8)}, ["plans"]) != identity


def test_inputs_are_the_cases_files_in_all_folders(tmp_path: Path) -> None:
    for name in ("case.b2nd", "case.pkl", "case.npy", "case_seg.b2nd", "other.b2nd"):
        (tmp_path / name).write_text("12345")
    seen = inputs_of("case", [str(tmp_path), None, str(tmp_path / "missing")])
    assert seen == [["case.b2nd", 5], ["case.pkl", 5]]
