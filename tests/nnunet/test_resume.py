"""A training that continues goes on with the batch after the checkpoint's, or says why it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from safeloader.nnunet import resume
from safeloader.nnunet.resume import STATE_FILE, NoStateError, StreamStates
from safeloader.nnunet.workspace import Workspace
from tests.nnunet.conftest import MakeTrainer

EPOCH = 3

pytestmark = pytest.mark.usefixtures("warm_nursery")
"""All loaders here share it: to import nnU-Net takes it seconds."""


def bits(batch: dict[str, Any]) -> list[Any]:
    return [batch["data"].numpy().tobytes(), *(t.numpy().tobytes() for t in batch["target"]), *map(str, batch["keys"])]


def take(loaders: tuple[Any, Any], n: int) -> list[list[Any]]:
    return [bits(next(loader)) for loader in loaders for _ in range(n)]


def log_of(trainer: Any) -> str:
    return Path(trainer.log_file).read_text()


@pytest.fixture
def workspace(make_workspace: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch) -> Workspace:
    monkeypatch.setenv("nnUNet_n_proc_DA", "2")
    return make_workspace()


@pytest.fixture
def left(make_trainer: MakeTrainer, workspace: Workspace) -> tuple[Path, list[list[Any]]]:
    """A checkpoint in the middle of two streams, and what came after it."""
    trainer = make_trainer(workspace=workspace)
    loaders = trainer.get_dataloaders()
    take(loaders, 5)
    trainer.current_epoch = EPOCH - 1
    checkpoint = Path(trainer.output_folder) / "checkpoint_latest.pth"
    trainer.save_checkpoint(str(checkpoint))
    after = take(loaders, 4)
    trainer._safeloader.close()
    return checkpoint, after


def continued(make_trainer: MakeTrainer, workspace: Workspace, checkpoint: Path) -> tuple[Any, tuple[Any, Any]]:
    trainer = make_trainer(workspace=workspace)
    trainer.load_checkpoint(str(checkpoint))
    return trainer, trainer.get_dataloaders()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_it_goes_on_with_the_batch_after_the_checkpoint(
    workers: str,
    left: tuple[Path, list[list[Any]]],
    make_trainer: MakeTrainer,
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", workers)
    checkpoint, after = left
    trainer, loaders = continued(make_trainer, workspace, checkpoint)
    assert take(loaders, 4) == after
    assert "the batches go on where the checkpoint left them (train: ticket 6, val: ticket 6; root seed" in log_of(
        trainer
    )


def test_a_training_that_begins_says_its_seed(make_trainer: MakeTrainer, workspace: Workspace) -> None:
    trainer = make_trainer(workspace=workspace)
    train, _ = trainer.get_dataloaders()
    assert f"the root seed is {train.seed}: SAFELOADER_SEED={train.seed} gives the same" in log_of(trainer)


def test_a_get_dataloaders_that_draws_another_number_of_batches_goes_on_as_well(
    left: tuple[Path, list[list[Any]]], make_trainer: MakeTrainer, workspace: Workspace, nnunet: Any
) -> None:
    class DrawsTwo(nnunet.nnUNetTrainer):
        def get_dataloaders(self) -> Any:
            loaders = super().get_dataloaders()
            for loader in loaders:
                next(loader)
            return loaders

    class Ours(nnunet.SafeLoaderMixin, DrawsTwo):
        pass

    checkpoint, after = left
    _, loaders = continued(lambda **options: make_trainer(Ours, **options), workspace, checkpoint)
    assert take(loaders, 4) == after


def test_without_a_state_it_says_so_and_begins_a_new_stream(
    left: tuple[Path, list[list[Any]]], make_trainer: MakeTrainer, workspace: Workspace
) -> None:
    checkpoint, after = left
    checkpoint.with_name(STATE_FILE).unlink()
    trainer, loaders = continued(make_trainer, workspace, checkpoint)
    assert take(loaders, 4) != after
    log = log_of(trainer)
    assert "not with the batches after checkpoint_latest.pth: there is no" in log
    assert "A new stream begins." in log


def test_a_seed_that_asks_for_another_stream_wins(
    left: tuple[Path, list[list[Any]]],
    make_trainer: MakeTrainer,
    workspace: Workspace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SAFELOADER_SEED", "5")
    trainer, (train, _) = continued(make_trainer, workspace, left[0])
    assert train.seed == 5
    assert "SAFELOADER_SEED=5 asks for another stream" in log_of(trainer)


def test_a_state_that_cannot_be_written_ends_no_training(
    make_trainer: MakeTrainer, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    trainer = make_trainer(workspace=workspace)
    trainer.get_dataloaders()
    monkeypatch.setattr(resume, "write_atomically", full)
    trainer.save_checkpoint(str(Path(trainer.output_folder) / "checkpoint_latest.pth"))
    assert "where the streams stand could not be written: [Errno 28] No space left" in log_of(trainer)


RANK = """
import sys
from torch import distributed
from safeloader.nnunet.mixin import shared_seed
distributed.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
print(shared_seed(None, is_ddp=True))
distributed.destroy_process_group()
"""


def test_ranks_share_the_root_seed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK, str(tmp_path / "store")]
    environ = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [subprocess.Popen([*command, rank], stdout=subprocess.PIPE, env=environ) for rank in "01"]
    first, second = (int(rank.communicate(timeout=120)[0]) for rank in ranks)
    assert first == second


# ---- the file ----


def test_the_file_keeps_what_belongs_to_checkpoints_that_are_there(tmp_path: Path) -> None:
    states = StreamStates(7, {"train": 10, "val": 3})
    latest, best = tmp_path / "checkpoint_latest.pth", tmp_path / "checkpoint_best.pth"
    latest.write_bytes(b"one")
    resume.remember(latest, 1, states)
    best.write_bytes(b"two")
    resume.remember(best, 2, StreamStates(7, {"train": 20, "val": 6}))
    assert resume.recall(latest, 1) == states
    latest.unlink()
    resume.remember(best, 3, states)
    assert set(json.loads((tmp_path / STATE_FILE).read_text())["checkpoints"]) == {"checkpoint_best.pth"}
    with pytest.raises(NoStateError):
        resume.recall(best, 2)


def test_the_file_is_small(tmp_path: Path) -> None:
    for name in ("checkpoint_latest.pth", "checkpoint_best.pth", "checkpoint_final.pth"):
        (tmp_path / name).write_bytes(b"weights")
        resume.remember(tmp_path / name, 1000, StreamStates(2**63, {"train": 250_001, "val": 50_001}))
    assert (tmp_path / STATE_FILE).stat().st_size < 1024


def edit(before: str, after: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(path.read_text().replace(before, after))


DAMAGES: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: path.write_text('{"half'), "can't be read"),
    (lambda path: path.write_text("[]"), "is damaged"),
    (lambda path: path.write_text('{"version": 2, "checkpoints": {}}'), "is of another version of SafeLoader"),
    (lambda path: path.write_text('{"version": 1, "checkpoints": {}}'), "has nothing about checkpoint_latest.pth"),
    (edit('"epoch": 3', '"epoch": 2'), "is about checkpoint_latest.pth of epoch 2, and this is 3"),
    (edit('"identity": "', '"identity": "0'), "is about another checkpoint_latest.pth than the one that is there"),
    (edit('"seed"', '"seeds"'), "is damaged: KeyError: 'seed'"),
    (edit('"train": 10', '"train": "x"'), "is damaged: ValueError"),
    (lambda path: path.with_name("checkpoint_latest.pth").unlink(), "checkpoint_latest.pth can't be read"),
]


@pytest.mark.parametrize(("damage", "reason"), DAMAGES)
def test_a_state_that_does_not_match_is_not_taken(
    damage: Callable[[Path], object], reason: str, tmp_path: Path
) -> None:
    latest = tmp_path / "checkpoint_latest.pth"
    latest.write_bytes(b"weights")
    resume.remember(latest, EPOCH, StreamStates(7, {"train": 10, "val": 3}))
    damage(tmp_path / STATE_FILE)
    with pytest.raises(NoStateError) as caught:
        resume.recall(latest, EPOCH)
    assert reason in str(caught.value)
