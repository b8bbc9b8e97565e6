"""Every kind of data that nnU-Net trains on gives the same batches, bit for bit, whatever dies.

Each kind's own trainer builds its loaders twice: undisturbed with one worker, and with three that are killed. Real
trainings of each are in `tests/gauntlet`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from safeloader.nnunet.kinds import CASCADE, KINDS, Kind, add_kinds, predicted
from safeloader.nnunet.workspace import PLANS, Workspace
from tests.nnunet.conftest import CASES
from tests.streams import Stream, read_stream

TICKETS = 6
KILL_EVERY = 2
NAMES = {kind.name: kind for kind in KINDS}


pytestmark = pytest.mark.usefixtures("warm_nursery")
"""All loaders here share it: to import nnU-Net takes it seconds."""


@pytest.fixture(scope="module")
def every_kind(brain_workspace: Workspace) -> Workspace:
    """All kinds' datasets; the cascade's first stage has predicted what is right."""
    add_kinds(brain_workspace, KINDS, cases=CASES, resolution_mm=6)
    return brain_workspace


def let_lowres_predict(workspace: Workspace, trainer: str) -> None:
    """In place of a trained first stage: it finds the labels themselves."""
    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    folder = predicted(workspace, trainer)
    folder.mkdir(parents=True)
    dataset = nnUNetDatasetBlosc2(str(workspace.plans_file.with_name(f"{PLANS}_3d_fullres")))
    for case in dataset.identifiers:
        _, labels, _, _ = dataset.load_case(case)
        dataset.save_seg(labels[0].clip(0), str(folder / case))


@pytest.fixture
def read(
    nnunet: ModuleType,
    every_kind: Workspace,
    make_workspace: Callable[..., Workspace],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Stream]:
    def read(kind: Kind, **options: Any) -> Stream:
        trainer_class = nnunet.nnUNetTrainerSafeLoader
        workspace = kind.workspace(make_workspace())
        if kind.configuration == CASCADE:
            let_lowres_predict(workspace, trainer_class.__name__)
        return read_stream(
            trainer_class, workspace, kind.configuration, monkeypatch, tickets=TICKETS, val_tickets=2, **options
        )

    return read


@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_whatever_dies(name: str, read: Callable[..., Stream]) -> None:
    kind = NAMES[name]
    undisturbed = read(kind, workers=1)
    killed = read(kind, workers=3, kill_every=KILL_EVERY)
    assert killed.kills == TICKETS // KILL_EVERY
    assert killed.train == undisturbed.train
    assert killed.val == undisturbed.val
    assert len(set(undisturbed.train)) == TICKETS
