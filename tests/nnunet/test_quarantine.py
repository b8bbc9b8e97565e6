"""Real trainings by `nnUNetv2_train` over a dataset with one truncated case: they finish without it, and say so.

    first ──► the case is quarantined; log, summary, report and incidents say so
    --c   ──► avoids it from its first batch on, and says so at its start
    anew  ──► puts the old incidents aside and finds out by itself

None of them writes anything into the preprocessed folder.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from safeloader.nnunet.short import SAFE_TRAINER, Step, read_steps, write_trainers
from safeloader.nnunet.workspace import Workspace
from tests import damage
from tests.nnunet.conftest import WITHOUT_VALIDATION

EPOCHS, ITERATIONS = 2, 8


@dataclass(frozen=True)
class Training:
    """One run of `nnUNetv2_train`, and what it left."""

    console: str
    log: str
    steps: list[Step]
    report: dict[str, Any]
    incidents: list[dict[str, Any]]

    @property
    def trained_on(self) -> set[str]:
        return {case for step in self.steps if step.phase == "train" for case in step.cases}


@pytest.fixture(scope="module")
def workspace(make_workspace: Callable[..., Workspace]) -> Workspace:
    """With a dataset of its own, since it will be damaged."""
    made = make_workspace()
    _write_trainers(made, EPOCHS)
    shared = made.preprocessed.resolve()
    made.preprocessed.unlink()
    shutil.copytree(shared, made.preprocessed)
    splits = [{"train": cases[1:], "val": cases[:1]} for cases in [_cases(made)]]
    (made.preprocessed / made.dataset / "splits_final.json").write_text(json.dumps(splits))
    return made


@pytest.fixture(scope="module")
def bad(workspace: Workspace) -> str:
    """A truncated case of the training set."""
    case = _cases(workspace)[-1]
    damage.truncate(_folder(workspace) / f"{case}.b2nd", 1000)
    return case


@pytest.fixture(scope="module")
def before(workspace: Workspace, bad: str) -> dict[str, tuple[int, int]]:
    return _listing(workspace.preprocessed)


@pytest.fixture(scope="module")
def first(workspace: Workspace, before: dict[str, tuple[int, int]]) -> Training:
    return _train(workspace)


@pytest.fixture(scope="module")
def copy(workspace: Workspace, first: Training, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The same data, and a copy of what the first training has left."""
    made = replace(workspace, folder=tmp_path_factory.mktemp("copy"))
    made.preprocessed.symlink_to(workspace.preprocessed)
    shutil.copytree(workspace.results, made.results)
    return made


@pytest.fixture(scope="module")
def both(workspace: Workspace, copy: Workspace) -> tuple[Training, Training]:
    """The training continued, and in the copy anew, at once: most of what they do is to import nnU-Net."""
    _write_trainers(workspace, EPOCHS + 1)
    _write_trainers(copy, EPOCHS)
    with ThreadPoolExecutor(2) as at_once:
        continued, anew = at_once.submit(_train, workspace, "--c"), at_once.submit(_train, copy)
    return continued.result(), anew.result()


@pytest.fixture(scope="module")
def continued(both: tuple[Training, Training]) -> Training:
    return both[0]


@pytest.fixture(scope="module")
def anew(both: tuple[Training, Training]) -> Training:
    return both[1]


def _write_trainers(workspace: Workspace, epochs: int) -> None:
    path = write_trainers(workspace.trainers, epochs=epochs, iterations=ITERATIONS, val_iterations=1)
    path.write_text(path.read_text() + WITHOUT_VALIDATION)


def _folder(workspace: Workspace) -> Path:
    return next((workspace.preprocessed / workspace.dataset).glob("*_3d_fullres"))


def _cases(workspace: Workspace) -> list[str]:
    return sorted(path.stem for path in _folder(workspace).glob("*.pkl"))


def _listing(folder: Path) -> dict[str, tuple[int, int]]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def _train(workspace: Workspace, *options: str) -> Training:
    output = workspace.output_folder(SAFE_TRAINER)
    logs, known = set(output.glob("training_log_*.txt")), len(read_steps(output))
    command = workspace.train_command(SAFE_TRAINER, *options)
    environment = workspace.environment({"nnUNet_n_proc_DA": "2", "SAFELOADER_SEED": "5"})
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (log,) = set(output.glob("training_log_*.txt")) - logs
    file = output / "safeloader_incidents.jsonl"
    return Training(
        console=done.stdout + done.stderr,
        log=log.read_text(),
        steps=read_steps(output, known),
        report=json.loads((output / "safeloader_report.json").read_text()),
        incidents=[json.loads(line) for line in file.read_text().splitlines()] if file.exists() else [],
    )


def _epoch_lines(log: str) -> list[str]:
    """What SafeLoader says within each epoch."""
    epochs = re.split(r": Epoch \d+ *$", log.partition("Training done.")[0], flags=re.MULTILINE)[1:]
    return ["\n".join(line for line in epoch.splitlines() if "SafeLoader:" in line) for epoch in epochs]


class TestTheFirstTraining:
    def test_finishes_with_every_batch_and_without_the_case(
        self, first: Training, workspace: Workspace, bad: str
    ) -> None:
        assert [step.phase for step in first.steps].count("train") == EPOCHS * ITERATIONS
        assert first.trained_on == set(_cases(workspace)[1:]) - {bad}

    def test_each_epochs_line_says_so(self, first: Training, bad: str) -> None:
        lines = _epoch_lines(first.log)
        assert len(lines) == EPOCHS
        for line in lines:
            assert re.search(rf"SafeLoader: .*1 quarantined cases? \(train: {bad}\)", line), line
            assert line.rstrip().endswith("Details: safeloader_incidents.jsonl")

    def test_the_summary_and_the_report_say_so(self, first: Training, bad: str) -> None:
        summary = first.log.partition("Training done.")[2]
        assert re.search(rf"SafeLoader: train: trained without 1 quarantined cases?: {bad}", summary), summary
        assert first.report["outcome"] == "finished"
        assert first.report["loaders"]["train"]["quarantined"] == [bad]
        assert first.report["loaders"]["val"]["quarantined"] == []

    def test_the_incidents_lie_in_the_output_folder_with_their_evidence(self, first: Training, bad: str) -> None:
        kinds = [incident["kind"] for incident in first.incidents]
        assert kinds.count("quarantine") == 1
        assert set(kinds) <= {"worker-error", "worker-death", "redraw", "quarantine"}
        for incident in first.incidents:
            if incident["kind"] in ("worker-error", "worker-death"):
                assert (incident["pool"], incident["case"], incident["stage"]) == ("train", bad, "loading")
                assert incident["figures"] and incident["advice"]
        (quarantine,) = [incident for incident in first.incidents if incident["kind"] == "quarantine"]
        assert f"case {bad} of pool 'train' has two strikes while others have none" in quarantine["message"]
        assert quarantine["message"] in first.console, "said live, too"

    def test_nothing_is_written_into_the_preprocessed_folder(
        self, anew: Training, workspace: Workspace, before: dict[str, tuple[int, int]]
    ) -> None:
        """Not by any of the three trainings."""
        assert _listing(workspace.preprocessed) == before


class TestAContinuedTraining:
    def test_still_avoids_the_case_without_trying_it(self, continued: Training, bad: str, first: Training) -> None:
        assert [step.epoch for step in continued.steps if step.phase == "train"] == [EPOCHS] * ITERATIONS
        assert bad not in continued.trained_on
        assert continued.incidents == first.incidents, "nothing new"

    def test_says_so_at_its_start(self, continued: Training, workspace: Workspace, bad: str) -> None:
        file = workspace.output_folder(SAFE_TRAINER) / "safeloader_incidents.jsonl"
        said = (
            rf"1 cases? of pool 'train' (is|are) quarantined since an earlier run \({bad}\): remove (its|their) lines? "
            rf"from {re.escape(str(file))} to have (it|them) drawn again\."
        )
        assert re.search(said, continued.console)
        start = continued.log.partition("Epoch ")[0]
        assert re.search(rf"SafeLoader: .*quarantined.*{bad}", start), "the training log is what is kept"

    def test_each_epochs_line_and_the_summary_still_say_so(self, continued: Training, bad: str) -> None:
        (line,) = _epoch_lines(continued.log)
        assert re.search(rf"SafeLoader: 1 quarantined cases? \(train: {bad}\)\. Details: ", line)
        assert re.search(rf"trained without 1 quarantined cases?: {bad}", continued.log)
        assert continued.report["loaders"]["train"]["quarantined"] == [bad]


class TestATrainingAnew:
    def test_puts_the_old_incidents_aside(self, anew: Training, copy: Workspace, first: Training, bad: str) -> None:
        (aside,) = copy.output_folder(SAFE_TRAINER).glob("safeloader_incidents.*.jsonl")
        assert [json.loads(line) for line in aside.read_text().splitlines()] == first.incidents
        assert "quarantined since an earlier run" not in anew.console

    def test_finds_the_case_by_itself(self, anew: Training, bad: str) -> None:
        assert [incident["case"] for incident in anew.incidents if incident["kind"] == "quarantine"] == [bad]
        assert bad not in anew.trained_on
