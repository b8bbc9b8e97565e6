"""One training of the demo: nnU-Net's own `nnUNetv2_train`, watched while its workers are killed."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, Final

from safeloader.cli.demo.killing import Kill, Killer
from safeloader.cli.demo.processes import CommandProcess, tail
from safeloader.faults.cpus import available_cpus
from safeloader.nnunet.record import REPORT_FILE
from safeloader.nnunet.short import Step, read_steps
from safeloader.nnunet.workspace import Workspace

_POLL_S: Final = 0.2
HANG_S: Final = 45.0
"""A training that makes no step for so long after a kill is called hanging. An epoch's end takes about 2 s."""


class Outcome(Enum):
    """How a training ended."""

    FINISHED = "finished"
    DIED = "died"
    HUNG = "hung"


@dataclass(frozen=True)
class Length:
    """How much both trainings are asked to train."""

    epochs: int
    iterations: int
    val_iterations: int

    @property
    def batches(self) -> int:
        """Batches that a complete training trains and validates on."""
        return self.epochs * (self.iterations + self.val_iterations)


@dataclass(frozen=True)
class Plan:
    """What is done to a training.

    Attributes:
        title: What the table calls it.
        deed: What happens to its workers, in words.
        trainer: The class for `-tr`.
        signals: Sent in turn, one per kill.
        kill_every_s: Time between two kills.
        kill_limit: Largest number of kills; None is as many as there is time for.
        calm_steps: Training steps without a kill at the beginning, so that the picture shows what undisturbed
            training looks like, and at the end, when the workers have nothing left to do.
    """

    title: str
    deed: str
    trainer: str
    signals: tuple[signal.Signals, ...]
    kill_every_s: float
    kill_limit: int | None = None
    calm_steps: int = 30


@dataclass
class Run:
    """What was measured of one training.

    Attributes:
        plan: What was done to it.
        length: What it was asked to train.
        steps: Every batch that the network has seen.
        kills: Every kill.
        outcome: How it ended; None while it runs.
        ended_s: When, on the monotonic clock.
        last_words: The last lines that it printed.
        dice: Mean foreground Dice of nnU-Net's validation, or None if it did not come to it.
        report: SafeLoader's report, or None for the stock trainer.
    """

    plan: Plan
    length: Length
    steps: list[Step] = field(default_factory=list)
    kills: list[Kill] = field(default_factory=list)
    outcome: Outcome | None = None
    ended_s: float | None = None
    last_words: list[str] = field(default_factory=list)
    dice: float | None = None
    report: dict[str, Any] | None = None

    @property
    def lost(self) -> int:
        """Batches that the training was asked for and the network has not seen."""
        return self.length.batches - len(self.steps)

    @property
    def restarts(self) -> int | None:
        """Workers that SafeLoader replaced; None for the stock trainer."""
        if self.report is None:
            return None
        return sum(int(loader["restarts"]) for loader in self.report["loaders"].values())


def train(workspace: Workspace, plan: Plan, length: Length, *, device: str, show: Callable[[Run], None]) -> Run:
    """Run one training to its end, which for the stock trainer is its death.

    Args:
        workspace: Prepared, with the trainer classes in its `trainers` folder.
        plan: Which trainer, and what is done to it.
        length: What the trainer classes were written with.
        device: For `-device`.
        show: Called about 5 times per second with what is known so far.
    """
    output = workspace.output_folder(plan.trainer)
    run = Run(plan, length)
    log = workspace.folder / "logs" / f"{plan.trainer}.log"
    env = workspace.environment(
        {
            # Python's prints in the order in which they were made, stderr among them.
            "PYTHONUNBUFFERED": "1",
            # Workers there must be, whatever the user's environment says, and not more than can be told apart.
            "nnUNet_n_proc_DA": str(min(8, max(2, available_cpus().cpus))),
            "nnUNet_wandb_enabled": "0",
        }
    )
    with CommandProcess(workspace.train_command(plan.trainer, device=device), env, log) as process:
        killer = Killer(process.pid, plan.signals, plan.kill_every_s, plan.kill_limit, run.kills)
        while (returncode := process.wait(_POLL_S)) is None and not _hangs(run):
            run.steps += read_steps(output, start=len(run.steps))
            if _may_kill(run):
                killer.tick(run.steps[-1].workers)
            show(run)
        run.ended_s = time.monotonic()
    run.steps += read_steps(output, start=len(run.steps))
    run.last_words = tail(log, 8)
    run.outcome = _outcome(returncode)
    run.dice = _dice(output) if run.outcome is Outcome.FINISHED else None
    run.report = _report(output)
    show(run)
    return run


def _may_kill(run: Run) -> bool:
    trained = sum(step.phase == "train" for step in run.steps)
    calm = run.plan.calm_steps
    return calm <= trained < run.length.epochs * run.length.iterations - calm


def _hangs(run: Run) -> bool:
    """No step since the last kill, for `HANG_S`."""
    if not run.kills or len(run.steps) == run.length.batches:
        return False
    since = max(run.kills[-1].monotonic_s, run.steps[-1].monotonic_s)
    return time.monotonic() - since > HANG_S


def _outcome(returncode: int | None) -> Outcome:
    if returncode is None:
        return Outcome.HUNG
    return Outcome.FINISHED if returncode == 0 else Outcome.DIED


def _dice(output: Path) -> float | None:
    """Mean Dice over cases and foreground labels, from nnU-Net's own `summary.json`."""
    path = output / "validation" / "summary.json"
    if not path.exists():
        return None
    return float(json.loads(path.read_text(encoding="utf-8"))["foreground_mean"]["Dice"])


def _report(output: Path) -> dict[str, Any] | None:
    path = output / REPORT_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
