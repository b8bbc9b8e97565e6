"""What a check of `safeloader doctor` is: it looks at facts, and says what they mean for a training.

A new check is a subclass of `Check` of about ten lines, and its place in `CHECKS`. It reads `Facts` and nothing else,
so a test gives it the facts of any machine.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

from safeloader.cli.doctor.facts import Facts


class Verdict(Enum):
    """What was found means for a training with SafeLoader."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing: stock nnU-Net would break, or the training is slower than it could be."""
    WARNING = "warn"
    """It may break a training."""
    BREAKS = "FAIL"
    """It will break a training."""
    UNKNOWN = "?"
    """It could not be found out."""


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        verdict: What it means.
        evidence: What was seen, with numbers, as the start of a sentence without a full stop.
        remedy: A command to paste or a step to take; "" if there is nothing to do.
    """

    verdict: Verdict
    evidence: str
    remedy: str = ""


class Check(ABC):
    """One question about this machine; a subclass's docstring says what it asks, and why it matters.

    Attributes:
        title: What it is about, in at most 14 characters.
    """

    title: ClassVar[str]

    @abstractmethod
    def look(self, facts: Facts) -> Finding | None:
        """What the facts mean; None if the question does not arise here."""


def ok(evidence: str) -> Finding:
    """Nothing to do."""
    return Finding(Verdict.OK, evidence)


def note(evidence: str, remedy: str = "") -> Finding:
    """Worth knowing."""
    return Finding(Verdict.NOTE, evidence, remedy)


def warning(evidence: str, remedy: str) -> Finding:
    """It may break a training."""
    return Finding(Verdict.WARNING, evidence, remedy)


def breaks(evidence: str, remedy: str) -> Finding:
    """It will break a training."""
    return Finding(Verdict.BREAKS, evidence, remedy)


def unknown(evidence: str, remedy: str = "") -> Finding:
    """It could not be found out."""
    return Finding(Verdict.UNKNOWN, evidence, remedy)
