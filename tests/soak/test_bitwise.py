"""With a seed, nnU-Net's batches are the same bits in every run: full-size data, nnU-Net's own plans and augmentation.

The brain at 1 mm, planned for 2D and 3D. Three runs each, every one with processes of its own: four workers that
nobody disturbs; one worker, and four, that are killed every 20 batches.

    SAFELOADER_BITWISE_TICKETS=50 pytest -m soak -o faulthandler_timeout=0 -s tests/soak/test_bitwise.py
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

import safeloader
from safeloader.nnunet.brain import DATASET_NAME, write_dataset
from safeloader.nnunet.workspace import Workspace
from safeloader.pool import blur
from tests.streams import Stream, read_stream

TICKETS = int(os.environ.get("SAFELOADER_BITWISE_TICKETS", "200"))
KILL_EVERY = 20
VAL_TICKETS = 10

pytestmark = pytest.mark.soak


@pytest.fixture(scope="session")
def nnunet() -> ModuleType:
    """The module of our trainer, and with it nnU-Net: before a test counts its descriptors."""
    import safeloader.nnunet.trainer as module

    return module


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = Workspace(tmp_path_factory.mktemp("brain"), DATASET_NAME, processes=2)
    write_dataset(workspace.raw, cases=8, resolution_mm=1)
    package = str(Path(safeloader.__file__).parents[1])
    subprocess.run(
        workspace.preprocess_command("2d", "3d_fullres"),
        env=workspace.environment({"PYTHONPATH": package}),
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return workspace


@pytest.fixture
def read(
    nnunet: ModuleType, full_size: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Stream]:
    def read(configuration: str, *, workers: int, kill_every: int | None = None) -> Stream:
        # Results of its own: one run's incidents are not the next one's.
        workspace = replace(full_size, folder=tmp_path / f"{workers}-{kill_every}")
        workspace.folder.mkdir()
        workspace.preprocessed.symlink_to(full_size.preprocessed)
        began = time.monotonic()
        stream = read_stream(
            nnunet.nnUNetTrainerSafeLoader,
            workspace,
            configuration,
            monkeypatch,
            workers=workers,
            tickets=TICKETS,
            val_tickets=VAL_TICKETS,
            kill_every=kill_every,
        )
        took = time.monotonic() - began
        print(f"\n{configuration}, {workers} workers: {TICKETS} tickets, {stream.kills} kills, {took:.0f} s")
        return stream

    return read


@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
def test_the_same_bits_in_every_run(configuration: str, read: Callable[..., Stream]) -> None:
    undisturbed = read(configuration, workers=4)
    assert len(set(undisturbed.train)) == TICKETS
    assert f"SafeLoader: {blur.NOTICE}" in undisturbed.log
    for workers in (1, 4):
        killed = read(configuration, workers=workers, kill_every=KILL_EVERY)
        assert killed.kills == TICKETS // KILL_EVERY
        differ = [n for n, pair in enumerate(zip(killed.train, undisturbed.train, strict=True), 1) if len({*pair}) > 1]
        assert not differ, f"tickets that differ, with {workers} workers"
        assert killed.val == undisturbed.val
