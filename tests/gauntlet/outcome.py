"""Two trainings of the same seed compared: all that must be equal, whatever was thrown at one of them."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from safeloader.nnunet.loaders import LOADERS
from safeloader.report import comparison
from safeloader.report.audit import audit_file
from tests.gauntlet.training import Training

_PATHS: Final = ("prediction_file", "reference_file")


@dataclass
class Outcome:
    """What one configuration of a kind ended with.

    Attributes:
        kind: Its name.
        undisturbed: The training without faults. disturbed: the one with.
        dice: Mean foreground Dice of both, as nnU-Net's `summary.json` says; None where there is none.
        differences: What is not equal, or went wrong. Empty is well.
    """

    kind: str
    undisturbed: Training
    disturbed: Training
    dice: tuple[float | None, float | None] = (None, None)
    differences: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For a file of JSON."""
        return json.loads(json.dumps(asdict(self), default=str))  # type: ignore[no-any-return]


def compare(kind: str, undisturbed: Training, disturbed: Training) -> Outcome:
    """Everything that two trainings have left, and what went wrong in either."""
    outcome = Outcome(kind, undisturbed, disturbed)
    for title, training in (("undisturbed", undisturbed), ("disturbed", disturbed)):
        if training.failure is not None:
            outcome.differences.append(f"{title}: {training.failure}")
        outcome.differences += [f"{title}: left behind: {what}" for what in training.left]
    for fault in disturbed.struck:
        if not fault.proven:
            outcome.differences.append(f"{fault.name} did not strike, or nothing shows it (injected {fault.times})")
    if undisturbed.failure is None and disturbed.failure is None:
        outcome.differences += _unequal(undisturbed.output, disturbed.output)
        a, b = (_summary(training.output)["foreground_mean"]["Dice"] for training in (undisturbed, disturbed))
        outcome.dice = (a, b)
    return outcome


def _unequal(a: Path, b: Path) -> list[str]:
    found = []
    for pool in LOADERS:
        audits = [comparison.read(output / audit_file(pool)) for output in (a, b)]
        compared = comparison.compare(*audits)
        if not compared.agree:
            first = "" if compared.first is None else f", first at ticket {compared.first.ticket}"
            found.append(f"the batches of {pool} differ{first}")
    weights = [torch.load(output / "checkpoint_final.pth", weights_only=False)["network_weights"] for output in (a, b)]
    if weights[0].keys() != weights[1].keys() or any(
        weights[0][name].numpy().tobytes() != weights[1][name].numpy().tobytes() for name in weights[0]
    ):
        found.append("the weights in checkpoint_final.pth differ")
    if _summary(a) != _summary(b):
        found.append("summary.json differs")
    return found


def _summary(output: Path) -> dict[str, Any]:
    """Nnu-Net's summary, but for the paths in it."""
    text = (output / "validation" / "summary.json").read_text(encoding="utf-8")
    summary: dict[str, Any] = json.loads(text)
    for case in summary["metric_per_case"]:
        for path in _PATHS:
            case[path] = Path(case[path]).name
    return summary
