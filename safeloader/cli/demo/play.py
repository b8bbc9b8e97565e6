"""The demo from beginning to end: dataset, two trainings, table and picture."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path
from typing import Final

from safeloader.cli.demo import MARKER
from safeloader.cli.demo.picture import Caption, draw
from safeloader.cli.demo.processes import CommandProcess
from safeloader.cli.demo.recording import EVENTS_FILE, RESULTS_FILE, write_events, write_results
from safeloader.cli.demo.screen import Screen, count_signals, describe
from safeloader.cli.demo.training import Length, Outcome, Plan, Run, train
from safeloader.nnunet.brain import DATASET_NAME, write_dataset
from safeloader.nnunet.short import SAFE_TRAINER, STOCK_TRAINER, write_trainers
from safeloader.nnunet.workspace import Workspace, training_device
from safeloader.testing import DEADLY

_CASES: Final = 6
_RESOLUTION_MM: Final = 4
_PATCH: Final = (32, 40, 32)
_FEATURES: Final = (8, 16, 32)


def play(folder: Path, *, device: str, kill_every_s: float) -> int:
    """Run the demo.

    Args:
        folder: Where everything is written; made if it is not there.
        device: "cpu", "cuda" or "auto".
        kill_every_s: Time between two kills with SafeLoader.

    Returns:
        0 if SafeLoader's training finished, was validated and lost no batch; else 1.
    """
    started = time.monotonic()
    screen = Screen()
    screen.say(f"SafeLoader's demo: everything is written into {folder}")
    workspace = Workspace(folder, DATASET_NAME)
    device = training_device() if device == "auto" else device
    _prepare(workspace, screen)
    runs = _train_both(workspace, device, kill_every_s, screen)
    _present(workspace, runs, device, started, screen)
    safe = runs[-1]
    return 0 if safe.dice is not None and safe.lost == 0 else 1


def _prepare(workspace: Workspace, screen: Screen) -> None:
    """The dataset, planned and preprocessed; kept if an earlier demo came so far."""
    marker = workspace.folder / MARKER
    dataset = json.dumps({"cases": _CASES, "resolution_mm": _RESOLUTION_MM})
    if marker.exists() and marker.read_text(encoding="utf-8") == dataset:
        screen.say("1/4, 2/4  the dataset of an earlier demo is used again")
    else:
        workspace.folder.mkdir(parents=True, exist_ok=True)
        marker.touch()
        for folder in (workspace.raw, workspace.preprocessed):
            shutil.rmtree(folder, ignore_errors=True)
        with screen.step(f"1/4  {_CASES} cases made of nilearn's MNI152 brain, at {_RESOLUTION_MM} mm"):
            write_dataset(workspace.raw, cases=_CASES, resolution_mm=_RESOLUTION_MM)
        with screen.step("2/4  nnUNetv2_plan_and_preprocess"):
            log = workspace.folder / "logs" / "plan_and_preprocess.log"
            with CommandProcess(workspace.preprocess_command(), workspace.environment(), log) as process:
                process.check()
        marker.write_text(dataset, encoding="utf-8")
    workspace.add_small_configuration(patch=_PATCH, features=_FEATURES)


def _train_both(workspace: Workspace, device: str, kill_every_s: float, screen: Screen) -> list[Run]:
    length = _length(device)
    write_trainers(
        workspace.trainers,
        epochs=length.epochs,
        iterations=length.iterations,
        val_iterations=length.val_iterations,
    )
    shutil.rmtree(workspace.results, ignore_errors=True)
    runs = []
    for number, plan in enumerate(_plans(kill_every_s), start=3):
        with screen.training(f"{number}/4  nnUNetv2_train on {device}: {plan.title}, {plan.deed}") as view:
            run = train(workspace, plan, length, device=device, show=view.show)
        if run.outcome is not Outcome.FINISHED:
            screen.last_words(run, workspace.folder / "logs" / f"{plan.trainer}.log")
        runs.append(run)
    return runs


def _length(device: str) -> Length:
    """About two minutes of training on 2 cores; a GPU waits for its workers most of the time, and does more."""
    iterations = 90 if device == "cpu" else 400
    return Length(epochs=5, iterations=iterations, val_iterations=iterations // 9)


def _plans(kill_every_s: float) -> tuple[Plan, Plan]:
    stock = Plan("stock nnU-Net", "one worker killed", STOCK_TRAINER, (signal.SIGKILL,), kill_every_s, kill_limit=1)
    every = f"a worker killed every {kill_every_s:g} s"
    return stock, Plan("SafeLoader", every, SAFE_TRAINER, DEADLY, kill_every_s)


def _present(workspace: Workspace, runs: list[Run], device: str, started: float, screen: Screen) -> None:
    events, results = workspace.folder / EVENTS_FILE, workspace.folder / RESULTS_FILE
    picture = workspace.folder / "demo.png"
    write_events(events, runs)
    draw(events, picture, [Caption(f"{run.plan.title}: {run.plan.deed}", describe(run)) for run in runs])
    seconds = time.monotonic() - started
    write_results(results, runs, device=device, seconds=seconds)
    screen.table(runs)
    screen.say(f"kills of SafeLoader's workers: {count_signals(runs[-1])}")
    screen.say(f"picture: {picture}")
    screen.say(f"data: {events}, {results}")
    screen.say(f"took {seconds:.0f} s")
