"""Real trainings by `nnUNetv2_train`, with workers killed from outside: what the demo shows."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import torch

from safeloader.cli.demo.picture import Caption, draw
from safeloader.cli.demo.recording import read_events, write_events
from safeloader.cli.demo.screen import describe
from safeloader.cli.demo.training import Length, Outcome, Plan, Run, train
from safeloader.cli.report.story import Story
from safeloader.nnunet.short import SAFE_TRAINER, STOCK_TRAINER, read_steps, write_trainers
from safeloader.nnunet.workspace import Workspace
from safeloader.testing import DEADLY

LENGTH = Length(epochs=3, iterations=25, val_iterations=2)
CALM_STEPS = 8


@pytest.fixture(scope="module")
def workspace(make_workspace: Callable[..., Workspace]) -> Workspace:
    return make_workspace(epochs=LENGTH.epochs, iterations=LENGTH.iterations, val_iterations=LENGTH.val_iterations)


@pytest.fixture(scope="module")
def stock(workspace: Workspace) -> Run:
    plan = Plan(
        "stock", "one worker killed", STOCK_TRAINER, (signal.SIGKILL,), 1.0, kill_limit=1, calm_steps=CALM_STEPS
    )
    return train(workspace, plan, LENGTH, device="cpu", show=lambda run: None)


@pytest.fixture(scope="module")
def safe(workspace: Workspace) -> Run:
    plan = Plan("SafeLoader", "three workers killed", SAFE_TRAINER, DEADLY, 0.25, kill_limit=3, calm_steps=CALM_STEPS)
    return train(workspace, plan, LENGTH, device="cpu", show=lambda run: None)


def training_log(workspace: Workspace, trainer: str) -> str:
    """All of nnU-Net's logs of one trainer, oldest first."""
    logs = sorted(workspace.output_folder(trainer).glob("training_log_*.txt"), key=lambda path: path.stat().st_mtime)
    return "\n".join(path.read_text() for path in logs)


def report(workspace: Workspace) -> dict[str, object]:
    return json.loads((workspace.output_folder(SAFE_TRAINER) / "safeloader_report.json").read_text())


class TestStock:
    def test_dies_of_one_killed_worker(self, stock: Run, workspace: Workspace) -> None:
        assert stock.outcome is Outcome.DIED
        assert len(stock.kills) == 1
        # Its thread and its main thread print a traceback each, at the same time: any line may be the last.
        printed = (workspace.folder / "logs" / f"{STOCK_TRAINER}.log").read_text()
        assert "One or more background workers are no longer alive" in printed
        assert stock.last_words

    def test_its_lost_batches_are_counted_from_recorded_steps(self, stock: Run) -> None:
        assert CALM_STEPS <= len(stock.steps) < LENGTH.batches
        assert stock.lost == LENGTH.batches - len(stock.steps)


class TestSafeLoader:
    def test_finishes_with_every_batch_and_nnunets_dice(self, safe: Run) -> None:
        assert safe.outcome is Outcome.FINISHED, safe.last_words
        assert len(safe.kills) == 3
        assert safe.lost == 0
        assert safe.dice is not None
        assert 0 < safe.dice < 1

    def test_every_kill_is_an_incident_with_its_evidence(self, safe: Run, workspace: Workspace) -> None:
        incidents = report(workspace)["loaders"]["train"]["incidents"]
        assert [(i["pid"], i["signal"]) for i in incidents] == [(kill.pid, kill.signal) for kill in safe.kills]
        assert safe.restarts == 3

    def test_the_report_tells_how_the_training_ended_and_what_was_delivered(
        self, safe: Run, workspace: Workspace
    ) -> None:
        written = report(workspace)
        assert written["outcome"] == "finished"
        assert written["trainer"] == SAFE_TRAINER
        # nnU-Net takes one batch of each loader when it makes them.
        assert written["loaders"]["train"]["batches"] == LENGTH.epochs * LENGTH.iterations + 1
        assert written["loaders"]["val"]["batches"] == LENGTH.epochs * LENGTH.val_iterations + 1
        assert written["loaders"]["train"]["seed"] == written["loaders"]["val"]["seed"]
        assert written["loaders"]["train"]["stream"] != written["loaders"]["val"]["stream"]

    def test_an_epoch_has_a_line_if_and_only_if_something_happened(self, safe: Run, workspace: Workspace) -> None:
        ends = {step.epoch: step.monotonic_s for step in safe.steps}
        epochs_with_kills = {min(e for e, end in ends.items() if kill.monotonic_s <= end) for kill in safe.kills}
        epoch, epochs_with_lines = -1, set()
        for line in training_log(workspace, SAFE_TRAINER).splitlines():
            if match := re.search(r": Epoch (\d+) *$", line):
                epoch = int(match[1])
            if "unfinished batches made again" in line:
                assert epoch not in epochs_with_lines, "one line per epoch"
                epochs_with_lines.add(epoch)
        assert epochs_with_lines == epochs_with_kills

    def test_its_story_is_told_from_its_files(self, safe: Run, workspace: Workspace) -> None:
        story = Story.read(workspace.output_folder(SAFE_TRAINER))
        assert [epoch.batches for epoch in story.epochs] == [{"train": 25, "val": 2}] * 3
        assert sum(epoch.restarts["train"] for epoch in story.epochs) == 3
        for epoch in story.epochs:
            assert epoch.time_s and epoch.dice is not None and epoch.train_loss is not None
            assert epoch.wait_s["train"] + epoch.wait_s["val"] <= epoch.time_s + 0.5  # nnU-Net's ends a little earlier
            assert epoch.trainer_nbytes and epoch.workers_nbytes
        (start,) = story.starts
        assert start["versions"]["torch"] == version("torch") and start["machine"]["device"] == "cpu"

    def test_the_log_ends_its_training_with_a_summary(self, safe: Run, workspace: Workspace) -> None:
        log = training_log(workspace, SAFE_TRAINER)
        _, _, after = log.partition("Training done.")
        assert re.search(r"SafeLoader: train: 76 batches, 3 workers replaced \(1 × SIG\w+, .*\), waited", after)
        assert re.search(r"SafeLoader: val: 7 batches, 0 workers replaced, waited", after)

    def test_a_replaced_worker_is_said_once_on_the_console(self, safe: Run, workspace: Workspace) -> None:
        console = (workspace.folder / "logs" / f"{SAFE_TRAINER}.log").read_text()
        for kill in safe.kills:
            assert console.count(f"(pid {kill.pid})") == 1

    def test_the_checkpoint_has_the_base_trainers_name(self, safe: Run, workspace: Workspace) -> None:
        path = workspace.output_folder(SAFE_TRAINER) / "checkpoint_final.pth"
        assert torch.load(path, weights_only=False)["trainer_name"] == STOCK_TRAINER

    def test_val_and_c_go_on_under_the_same_name(self, safe: Run, workspace: Workspace) -> None:
        output = workspace.output_folder(SAFE_TRAINER)
        summary = output / "validation" / "summary.json"
        summary.unlink()
        write_trainers(workspace.trainers, epochs=LENGTH.epochs + 1, iterations=5, val_iterations=1)
        nnunet_train(workspace, "--c")
        assert len(read_steps(output)) == LENGTH.batches + 6
        assert report(workspace)["first_epoch"] == LENGTH.epochs
        # The last batch before the checkpoint is given once more: nnU-Net draws one of each loader and drops it.
        assert report(workspace)["loaders"]["train"]["next_ticket"] == LENGTH.epochs * LENGTH.iterations + 1 + 5
        assert "the batches go on where the checkpoint left them (train: ticket 76, val: ticket 7; root seed" in (
            training_log(workspace, SAFE_TRAINER)
        )
        assert [run["outcome"] for run in report(workspace)["earlier_runs"]] == ["finished"]
        assert summary.exists()
        summary.unlink()
        nnunet_train(workspace, "--val")
        assert summary.exists()


def nnunet_train(workspace: Workspace, option: str) -> None:
    command = workspace.train_command(SAFE_TRAINER, option)
    done = subprocess.run(command, env=workspace.environment(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def drawn(stock: Run, safe: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with events and picture. Not in the test itself: matplotlib keeps its fonts' files open."""
    folder = tmp_path_factory.mktemp("picture")
    write_events(folder / "events.csv", [stock, safe])
    captions = [Caption("stock", describe(stock)), Caption("SafeLoader", describe(safe))]
    draw(folder / "events.csv", folder / "demo.png", captions)
    return folder


def test_the_demos_picture_is_drawn_from_what_was_recorded(stock: Run, safe: Run, drawn: Path) -> None:
    events = read_events(drawn / "events.csv")
    assert [event.detail for event in events if event.event == "end"] == ["died", "finished"]
    assert sum(event.event == "batch" for event in events) == len(stock.steps) + len(safe.steps)
    assert (drawn / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert re.fullmatch(r"died \d+\.\d s after the kill", describe(stock))
    assert describe(safe) == "finished, 3 workers replaced"
