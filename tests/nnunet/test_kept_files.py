"""Files of nnU-Net's cases stay open in a worker, and what is read from them is what nnU-Net would read."""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from safeloader.nnunet.workspace import Workspace
from safeloader.pool.kept import KeptCases, keeping_files_open
from tests.processes import open_files


@pytest.fixture
def folder(nnunet: ModuleType, brain_workspace: Workspace, tmp_path: Path) -> Path:
    preprocessed = brain_workspace.preprocessed / brain_workspace.dataset / "nnUNetPlans_3d_fullres"
    return Path(shutil.copytree(preprocessed, tmp_path / "cases"))


@pytest.fixture
def dataset(folder: Path) -> Iterator[Any]:
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    yield nnUNetDatasetBlosc2(str(folder))
    assert _open_files(folder) == [], "all are closed with whoever kept them"


def _open_files(folder: Path) -> list[str]:
    gc.collect()  # a traceback is part of a cycle, and holds the files that were open
    return sorted(os.path.basename(file) for file in open_files() if file.startswith(str(folder)))


def _contents(case: tuple[Any, Any, Any, Any]) -> tuple[bytes, bytes, Any, str]:
    data, segmentation, previous, properties = case
    return data[:].tobytes(), segmentation[:].tobytes(), previous, repr(properties)


def _complaint(load_case: Callable[[str], Any]) -> str:
    with pytest.raises(FileNotFoundError) as raised:
        load_case("brain_000")
    return str(raised.value)


def test_a_case_is_what_nnunet_reads_and_its_files_are_opened_once(dataset: Any, folder: Path) -> None:
    kept = keeping_files_open(dataset)
    assert isinstance(kept, KeptCases)
    first, second = kept("brain_000"), kept("brain_000")
    assert _contents(first) == _contents(second) == _contents(dataset.load_case("brain_000"))
    assert first[0] is second[0] and first[1] is second[1]
    assert first[3] is not second[3], "a loader may change its properties"
    del first, second
    assert _open_files(folder) == ["brain_000.b2nd", "brain_000_seg.b2nd"]


def test_a_file_that_was_replaced_is_opened_again(dataset: Any, folder: Path) -> None:
    kept = keeping_files_open(dataset)
    before = kept("brain_000")[0][:]
    shutil.copy(folder / "brain_001.b2nd", folder / "new")
    os.replace(folder / "new", folder / "brain_000.b2nd")
    after = kept("brain_000")[0][:]
    assert not (before.shape == after.shape and np.array_equal(before, after))
    assert np.array_equal(after, dataset.load_case("brain_001")[0][:])


def test_those_that_were_not_asked_for_the_longest_are_closed(dataset: Any, folder: Path) -> None:
    kept = KeptCases(dataset.load_case, str(folder), None, most_files=4)
    for case in ("brain_000", "brain_001", "brain_000", "brain_002"):
        kept(case)
    assert _open_files(folder) == ["brain_000.b2nd", "brain_000_seg.b2nd", "brain_002.b2nd", "brain_002_seg.b2nd"]


def test_of_a_file_that_is_missing_the_error_is_nnunets(dataset: Any, folder: Path) -> None:
    kept = keeping_files_open(dataset)
    before = _contents(kept("brain_000"))
    (folder / "brain_000_seg.b2nd").rename(folder / "away")
    assert _complaint(kept) == _complaint(dataset.load_case)
    assert _open_files(folder) == []
    (folder / "away").rename(folder / "brain_000_seg.b2nd")
    assert _contents(kept("brain_000")) == before


def test_a_previous_stage_is_kept_as_well(nnunet: ModuleType, folder: Path) -> None:
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    previous = folder / "previous"
    previous.mkdir()
    shutil.copy(folder / "brain_001_seg.b2nd", previous / "brain_000.b2nd")
    cascaded = nnUNetDatasetBlosc2(str(folder), folder_with_segs_from_previous_stage=str(previous))
    kept = keeping_files_open(cascaded)
    first, second = kept("brain_000"), kept("brain_000")
    assert first[2] is second[2]
    assert np.array_equal(second[2][:], cascaded.load_case("brain_000")[2][:])


def test_a_load_case_of_somebodys_own_is_left_alone(nnunet: ModuleType, folder: Path) -> None:
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    class Own(nnUNetDatasetBlosc2):  # type: ignore[misc]  # nnU-Net has no types
        def load_case(self, identifier: str) -> Any:
            return super().load_case(identifier)

    own = Own(str(folder))
    assert keeping_files_open(own) == own.load_case
