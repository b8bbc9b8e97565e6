"""nnUNetTrainerSafeLoader in this process: which loaders it builds, how many workers, what its checkpoints need."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from batchgenerators.dataloading.single_threaded_augmenter import SingleThreadedAugmenter
from nnunetv2.run.run_training import maybe_load_checkpoint

from safeloader import Incident, SafeAugmenter
from safeloader.cli import main
from safeloader.nnunet.workspace import Workspace
from safeloader.testing import wait_until
from tests.nnunet.conftest import MakeTrainer

pytestmark = pytest.mark.usefixtures("warm_nursery")
"""All loaders here share it: to import nnU-Net takes it seconds."""


def log_of(trainer: Any) -> str:
    return Path(trainer.log_file).read_text()


class TestLoaders:
    def test_both_are_ours_with_nnunets_arguments(
        self, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("nnUNet_n_proc_DA", "2")
        monkeypatch.setenv("SAFELOADER_SEED", "7")
        train, val = make_trainer().get_dataloaders()
        assert isinstance(train, SafeAugmenter)
        assert isinstance(val, SafeAugmenter)
        assert (train.num_cached, val.num_cached) == (6, 3)
        assert (train.report().name, val.report().name) == ("train", "val")
        assert (train.seed, val.seed) == (7, 7)
        assert (train.report().stream, val.report().stream) == (0, 1)

    def test_a_trainer_that_wants_to_know_is_told_of_each_failure(
        self, make_trainer: MakeTrainer, nnunet: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told: list[Incident] = []

        class Curious(nnunet.nnUNetTrainerSafeLoader):
            def on_incident(self, incident: Incident) -> None:
                told.append(incident)

        monkeypatch.setenv("nnUNet_n_proc_DA", "1")
        train, _ = make_trainer(Curious).get_dataloaders()
        pid = train.workers()[0].pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: len(told) == 1)
        assert (told[0].pool, told[0].pid, told[0].signal) == ("train", pid, "SIGKILL")

    def test_nnunets_module_is_as_before_afterwards(
        self, make_trainer: MakeTrainer, nnunet: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("nnUNet_n_proc_DA", "1")
        trainer = make_trainer()
        namespace = nnunet.nnUNetTrainer.get_dataloaders.__globals__
        before = dict(namespace)
        trainer.get_dataloaders()
        assert namespace == before

    def test_zero_workers_stay_single_threaded(
        self, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("nnUNet_n_proc_DA", "0")
        trainer = make_trainer()
        train, val = trainer.get_dataloaders()
        assert isinstance(train, SingleThreadedAugmenter)
        assert isinstance(val, SingleThreadedAugmenter)
        trainer._end_report("finished")
        assert "batches were made in the training process itself (nnUNet_n_proc_DA=0)" in log_of(trainer)

    @pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs 2 CPUs to take one away")
    def test_more_workers_than_cpus_are_lowered_and_the_log_says_so(
        self, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("nnUNet_n_proc_DA", "2")
        trainer = make_trainer()
        allowed = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {min(allowed)})
        try:
            train, _ = trainer.get_dataloaders()
        finally:
            os.sched_setaffinity(0, allowed)
        assert train.num_processes == 1
        reason = f"CPU affinity allows 1 of {os.cpu_count()} CPUs"
        assert f"SafeLoader: 1 training workers instead of 2: {reason}" in log_of(trainer)

    def test_a_loader_that_was_built_before_a_failure_is_stopped(
        self, nnunet: ModuleType, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("nnUNet_n_proc_DA", "1")

        class FailsAfterwards(nnunet.nnUNetTrainer):  # type: ignore[misc]
            def get_dataloaders(self) -> Any:
                self.built = super().get_dataloaders()
                raise OSError("the second disk is gone")

        class Ours(nnunet.SafeLoaderMixin, FailsAfterwards):  # type: ignore[misc]
            pass

        trainer = make_trainer(Ours)
        with pytest.raises(OSError, match="the second disk is gone"):
            trainer.get_dataloaders()
        assert all(loader.workers() == () for loader in trainer.built)


class TestAudit:
    def test_two_trainings_of_one_seed_say_that_they_were_given_the_same(
        self, make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("SAFELOADER_SEED", "7")
        monkeypatch.setenv("SAFELOADER_AUDIT", "1")
        folders = []
        for workers in (1, 2):
            monkeypatch.setenv("nnUNet_n_proc_DA", str(workers))
            trainer = make_trainer()
            for loader in trainer.get_dataloaders():
                for _ in range(8):
                    next(loader)
            trainer._safeloader.close()
            folders.append(trainer.output_folder)
        assert main(["audit", *folders]) == 0
        said = capsys.readouterr().out.splitlines()
        # nnU-Net has taken the first batch of both itself.
        assert said[-2:] == [
            "train: the same: 9 tickets, 0 to 8 (seed 7, stream 0).",
            "val: the same: 9 tickets, 0 to 8 (seed 7, stream 1).",
        ]


class TestCheckpoint:
    def test_a_copy_of_the_stock_trainers_folder_is_continued(
        self, make_trainer: MakeTrainer, make_workspace: Callable[..., Workspace], nnunet: Any
    ) -> None:
        """As docs/crashes.md says."""
        workspace = make_workspace()
        stock = make_trainer(nnunet.nnUNetTrainer, workspace=workspace)
        stock.current_epoch = 6
        stock.save_checkpoint(str(Path(stock.output_folder) / "checkpoint_latest.pth"))
        theirs = Path(stock.output_folder_base)
        ours = theirs.with_name(theirs.name.replace("nnUNetTrainer__", "nnUNetTrainerSafeLoader__"))
        shutil.copytree(theirs, ours)
        trainer = make_trainer(workspace=workspace)
        maybe_load_checkpoint(trainer, True, False)
        assert trainer.current_epoch == 7
        for name, weights in stock.network.state_dict().items():
            assert torch.equal(trainer.network.state_dict()[name], weights)
        assert Path(trainer.output_folder_base) == ours

    def test_predicts_on_a_machine_without_safeloader(self, make_trainer: MakeTrainer) -> None:
        trainer = make_trainer()
        folder = Path(trainer.output_folder_base)
        trainer.save_checkpoint(str(folder / "fold_0" / "checkpoint_final.pth"))
        for name, content in (("plans", trainer.plans_manager.plans), ("dataset", trainer.dataset_json)):
            (folder / f"{name}.json").write_text(json.dumps(content))
        assert folder.name.startswith("nnUNetTrainerSafeLoader__")
        assert type(trainer).__name__ == "nnUNetTrainerSafeLoader"
        script = (
            "import sys; sys.modules['safeloader'] = None\n"  # any import of it fails
            "import torch\n"
            "from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor\n"
            "predictor = nnUNetPredictor(device=torch.device('cpu'))\n"
            "predictor.initialize_from_trained_model_folder(sys.argv[1], (0,), 'checkpoint_final.pth')\n"
            "print(predictor.trainer_name)\n"
        )
        command = [sys.executable, "-c", script, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "nnUNetTrainer"
