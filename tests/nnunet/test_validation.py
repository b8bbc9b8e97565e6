"""Nnu-Net's own validation while its export processes are killed: the same files and the same Dice as without."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import blosc2
import pytest
import torch
from torch import distributed
from tqdm import tqdm

from safeloader.errors import ConfigError, ExportError
from safeloader.nnunet.export import pool as export_pool
from safeloader.nnunet.export.call import Brief
from safeloader.nnunet.export.ledger import LEDGER_FILE
from safeloader.nnunet.validation import TIMEOUT_ENV, export_timeout_s
from safeloader.nnunet.workspace import PLANS, SMALL_CONFIGURATION, Workspace
from safeloader.pool.book import INCIDENTS_FILE
from safeloader.report import journal
from safeloader.testing import Orders
from tests import export_jobs

CASES = [f"brain_{index:03d}" for index in range(3)]
SUMMARY = "fold_0/validation/summary.json"
NEXT = "3d_next"
"""A configuration that follows on `3d_small`, as the cascade's on `3d_lowres`, with the same preprocessed data."""


@pytest.fixture(scope="module")
def stock(nnunet: ModuleType) -> Any:
    """The module of nnU-Net's trainer."""
    return sys.modules["nnunetv2.training.nnUNetTrainer.nnUNetTrainer"]


@pytest.fixture
def orders(tmp_path: Path, stock: Any, monkeypatch: pytest.MonkeyPatch) -> Orders:
    """Faults in nnU-Net's exports and evaluations."""
    from tests.nnunet import export_hooks

    monkeypatch.setenv(export_hooks.FOLDER_ENV, str(tmp_path))
    monkeypatch.setattr(stock, "export_prediction_from_logits", export_hooks.export)
    monkeypatch.setattr(stock, "resample_and_save", export_hooks.export_next_stage)
    monkeypatch.setitem(stock.compute_metrics_on_folder.__globals__, "compute_metrics", export_hooks.evaluate)
    return export_jobs.orders(tmp_path)


@pytest.fixture
def cascade(brain_workspace: Workspace) -> Iterator[None]:
    """`3d_small` has a next stage in the plans meanwhile."""
    with _cascade(brain_workspace):
        yield


@contextmanager
def _cascade(workspace: Workspace) -> Iterator[None]:
    path = workspace.preprocessed / workspace.dataset / f"{PLANS}.json"
    before = path.read_text()
    plans = json.loads(before)
    plans["configurations"][SMALL_CONFIGURATION]["next_stage"] = NEXT
    plans["configurations"][NEXT] = {"inherits_from": "3d_fullres", "previous_stage": SMALL_CONFIGURATION}
    path.write_text(json.dumps(plans))
    yield
    path.write_text(before)


def _trainer_classes(nnunet: ModuleType, stock: Any) -> tuple[type, type]:
    class ThreeCases(stock.nnUNetTrainer):  # type: ignore[misc, name-defined]
        def do_split(self) -> tuple[list[str], list[str]]:
            super().do_split()
            return [], list(CASES)

    class ThreeCasesSafeLoader(nnunet.SafeLoaderMixin, ThreeCases):  # type: ignore[misc, name-defined]
        pass

    return ThreeCases, ThreeCasesSafeLoader


def _trainer(cls: type, workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A trainer with random weights that are always the same, which predicts each place once: that is quick."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, workspace.environment()[name])
    folder = workspace.preprocessed / workspace.dataset
    plans = json.loads((folder / f"{PLANS}.json").read_text())
    dataset = json.loads((folder / "dataset.json").read_text())
    plans["continue_training"] = False
    torch.manual_seed(1)
    trainer = cls(plans, SMALL_CONFIGURATION, 0, dataset, device=torch.device("cpu"))
    trainer.initialize()
    trainer.inference_allowed_mirroring_axes = None
    return trainer


@pytest.fixture
def make(
    nnunet: ModuleType, make_workspace: Callable[..., Workspace], stock: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], Any]:
    """Makes trainers with SafeLoader that validate three cases, each in a workspace of its own."""
    monkeypatch.setattr(tqdm, "monitor_interval", 0)  # nnU-Net's predictor makes one: a thread that stays
    monkeypatch.setattr(stock, "default_num_processes", 1)
    return lambda: _trainer(_trainer_classes(nnunet, stock)[1], make_workspace(), monkeypatch)


@pytest.fixture(scope="module")
def undisturbed(
    nnunet: ModuleType, stock: Any, brain_workspace: Workspace, make_workspace: Callable[..., Workspace]
) -> dict[str, Any]:
    """The results of nnU-Net's own trainer.

    For the module, since what its pools leave in the process (a resource tracker, two threads) stays there.
    """
    with pytest.MonkeyPatch.context() as patch, _cascade(brain_workspace):
        patch.setattr(stock, "default_num_processes", 1)
        trainer = _trainer(_trainer_classes(nnunet, stock)[0], make_workspace(), patch)
        trainer.perform_actual_validation()
    return _results(trainer)


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """No export process can be started, so the trainer does it all: quick, since nobody imports nnU-Net first."""

    def refuse() -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(export_pool, "ExportProcess", refuse)


def _validate(trainer: Any, *arguments: Any) -> tuple[list[str], str]:
    """Which cases were predicted, and what the log says."""
    log = Path(trainer.log_file)
    before = len(log.read_text())
    trainer.perform_actual_validation(*arguments)
    said = log.read_text()[before:]
    return [line.rpartition("predicting ")[2].strip() for line in said.splitlines() if ": predicting " in line], said


def _results(trainer: Any) -> dict[str, Any]:
    """All that the validation wrote: bytes; of the summary what is in it, without the folders; of a `.b2nd` its voxels.

    (blosc2 writes the same voxels as other bytes each time.)
    """
    base = Path(trainer.output_folder_base)
    files = [*(base / "fold_0" / "validation").iterdir(), *base.glob("predicted_next_stage/*/*")]
    results: dict[str, Any] = {str(file.relative_to(base)): file.read_bytes() for file in files}
    for name in results:
        if name.endswith(".b2nd"):
            results[name] = blosc2.open(str(base / name))[:].tobytes()
    results[SUMMARY] = json.loads(results[SUMMARY])
    for case in results[SUMMARY]["metric_per_case"]:
        for kind in ("prediction_file", "reference_file"):
            case[kind] = Path(case[kind]).name
    return results


def test_killed_processes_and_the_same_results(
    make: Callable[[], Any], orders: Orders, cascade: None, undisturbed: dict[str, Any]
) -> None:
    trainer = make()
    faults = [
        ("no memory", "next-brain_001"),
        ("kill", "brain_002"),
        ("kill", "brain_001.nii.gz"),
    ]
    for deed, stage in faults:
        orders.give(deed, stage)
    predicted, log = _validate(trainer)
    assert not any(orders.folder.iterdir()), "all faults struck"
    assert predicted == CASES
    assert "SafeLoader: the export of case brain_002: the process (pid " in log
    assert "Mean Validation Dice" in log
    incidents = list(journal.read(Path(trainer.output_folder) / INCIDENTS_FILE))
    assert sorted(incident["case"] for incident in incidents) == sorted(
        stage.removeprefix("next-") for _, stage in faults
    )
    ours = _results(trainer)
    assert set(ours) == {
        *(f"fold_0/validation/{case}.nii.gz" for case in CASES),
        *(f"predicted_next_stage/{NEXT}/{case}.b2nd" for case in CASES),
        SUMMARY,
    }
    assert ours == undisturbed


def test_a_second_validation_makes_only_what_is_missing(
    make: Callable[[], Any], no_process: None, cascade: None, undisturbed: dict[str, Any]
) -> None:
    trainer = make()
    base = Path(trainer.output_folder_base)
    validation, next_stage = base / "fold_0" / "validation", base / "predicted_next_stage" / NEXT
    left = validation / f".safeloader-{_pid_of_nobody()}" / "7"
    left.mkdir(parents=True)
    assert _validate(trainer)[0] == CASES
    assert not left.parent.exists(), "what a killed trainer has left is removed"
    first = _results(trainer)
    assert first == undisturbed, "also with one thread, in the trainer"

    predicted, log = _validate(trainer)
    assert predicted == [] and _results(trainer) == first
    ledger = base / "fold_0" / LEDGER_FILE
    assert (
        "SafeLoader: 3 of 3 cases kept from an earlier validation with these weights: to have them predicted again, "
        f"remove {ledger}"
    ) in log

    with (validation / "brain_000.nii.gz").open("r+b") as file:
        file.truncate(100)
    (next_stage / "brain_002.b2nd").unlink()
    predicted, log = _validate(trainer)
    assert predicted == ["brain_000", "brain_002"] and _results(trainer) == first
    assert "SafeLoader: 1 of 3 cases kept" in log

    predicted, _ = _validate(trainer, True)
    assert predicted == CASES, "probabilities were not there"
    assert (validation / "brain_001.npz").exists()

    with torch.no_grad():
        next(trainer.network.parameters()).mul_(1.5)
    assert _validate(trainer)[0] == CASES, "other weights"


def test_other_data_is_predicted_again(make: Callable[[], Any]) -> None:
    trainer = make()
    data = Path(trainer.preprocessed_dataset_folder) / "brain_000.pkl"
    file = Path(trainer.output_folder) / "validation" / "brain_000.nii.gz"
    file.parent.mkdir()
    file.touch()

    def done() -> bool:
        return bool(trainer._begin_validation(False).done("brain_000"))

    assert not done()
    trainer._begin_validation(False).note(
        Brief("the export", "brain_000", file.with_name("brain_000"), False, None), [file]
    )
    assert done()
    properties = data.read_bytes()
    try:
        data.write_bytes(properties + b"more")
        assert not done()
        data.write_bytes(properties)
        assert done(), "a copy of the data is as good"
    finally:
        data.write_bytes(properties)


def test_an_export_that_raises_costs_no_other_case(make: Callable[[], Any], orders: Orders, no_process: None) -> None:
    trainer = make()
    orders.give("disk full", "brain_001")
    with pytest.raises(ExportError) as raised:
        trainer.perform_actual_validation()
    assert raised.value.cases == ("brain_001",)
    assert "the export of case brain_001: OSError: [Errno 28] No space left on device" in str(raised.value)
    assert "in run_out_of_disk" in str(raised.value.__cause__)
    assert not (Path(trainer.output_folder) / "validation" / "brain_001.nii.gz").exists(), "half a file"
    assert _validate(trainer)[0] == ["brain_001"]


def test_ctrl_c_keeps_what_is_done(make: Callable[[], Any], no_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make()
    say = trainer.print_to_log_file

    def interrupt(*lines: object, **how: bool) -> None:
        if lines == ("predicting brain_002",):
            raise KeyboardInterrupt
        say(*lines, **how)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "print_to_log_file", interrupt)
        with pytest.raises(KeyboardInterrupt):
            trainer.perform_actual_validation()
    assert trainer.do_split()[1] == CASES, "the split is whole again"
    assert _validate(trainer)[0] == ["brain_002"]


def test_all_ranks_leave_the_same_cases_out(
    make: Callable[[], Any], no_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second rank whose view of the folder is older must not share the cases out differently."""
    trainer = make()
    trainer._validation = trainer._begin_validation(False)
    sent: list[Any] = []

    def broadcast(objects: list[Any], src: int) -> None:
        assert src == 0
        if trainer.local_rank == 0:
            sent[:] = objects
        objects[:] = sent

    monkeypatch.setattr(distributed, "broadcast_object_list", broadcast)
    monkeypatch.setattr(trainer, "is_ddp", True)
    monkeypatch.setattr(type(trainer), "_done", lambda self, case: case == "brain_001" and self.local_rank == 0)
    splits = []
    for rank in (0, 1):
        trainer.local_rank = rank
        splits.append(trainer.do_split()[1])
    trainer._validation = None
    assert splits == [["brain_000", "brain_002"]] * 2


@pytest.mark.parametrize("text", ["soon", "0", "-1", "nan"])
def test_a_timeout_that_is_none(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TIMEOUT_ENV, text)
    with pytest.raises(ConfigError, match=f"{TIMEOUT_ENV}={text}: must be a number of seconds above 0, or not set"):
        export_timeout_s()


def _pid_of_nobody() -> int:
    ended = subprocess.Popen(["true"])
    ended.wait()
    return ended.pid
