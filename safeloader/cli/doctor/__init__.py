"""`safeloader doctor`: will a training run on this machine, and what would break it?

facts.py      what is known of the machine       probing.py   what importing torch and nnU-Net shows
check.py      what a check is                    machine.py, software.py   the checks
"""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any, Final

from safeloader.cli.command import Command, show
from safeloader.cli.doctor import machine, software
from safeloader.cli.doctor.check import Check, Finding, Verdict
from safeloader.cli.doctor.facts import Facts
from safeloader.words import counted

CHECKS: Final[tuple[type[Check], ...]] = (
    machine.Cpus,
    machine.Memory,
    machine.SharedMemory,
    machine.OpenFiles,
    machine.Processes,
    machine.AddressSpace,
    machine.Container,
    machine.Slurm,
    software.Versions,
    software.Fit,
    software.Torch,
    software.Blosc2,
    software.Compile,
    software.Folders,
    software.Trainer,
)
"""In the order in which they are shown."""

_TIMEOUT_S: Final = 8.0
_DEEP_TIMEOUT_S: Final = 120.0


class Doctor(Command):
    """Look for what would break a training on this machine.

    Takes a few seconds, also where torch or nnU-Net are missing or broken, and changes nothing. Run it where the
    training will run: inside of the container, in a job of the cluster.

      ok     fine
      note   worth knowing: stock nnU-Net would break of it, or the training is slower than it could be
      warn   it may break a training
      FAIL   it will break a training
      ?      could not be found out

    Exit codes: 0 nothing will break a training, 1 something will, 2 wrong arguments.
    """

    name = "doctor"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declare the options."""
        parser.add_argument("--json", action="store_true", help="print JSON, for scripts")
        parser.add_argument("--deep", action="store_true", help="also compile a small function; up to 2 minutes")
        parser.add_argument(
            "-tr", dest="trainer", default="nnUNetTrainerSafeLoader", help="trainer (default: nnUNetTrainerSafeLoader)"
        )

    def run(self, arguments: argparse.Namespace) -> int:
        """Gather the facts, look at them, and say what was found."""
        timeout_s = _DEEP_TIMEOUT_S if arguments.deep else _TIMEOUT_S
        facts = Facts.gather(trainer=arguments.trainer, deep=arguments.deep, timeout_s=timeout_s)
        findings = look(facts)
        show(json.dumps(_as_json(facts, findings), indent=2) if arguments.json else in_words(findings))
        return 1 if any(finding.verdict is Verdict.BREAKS for _, finding in findings) else 0


def look(facts: Facts) -> list[tuple[str, Finding]]:
    """All findings, each with its check's title."""
    found = [(check.title, check().look(facts)) for check in CHECKS]
    return [(title, finding) for title, finding in found if finding is not None]


def in_words(findings: Sequence[tuple[str, Finding]]) -> str:
    """The findings for a person: one line each, with what to do below; the answer last."""
    lines = []
    for title, finding in findings:
        head = f"  {finding.verdict.value:<5} {title:<14} "
        width = max(40, shutil.get_terminal_size((110, 24)).columns - 1)
        lines += textwrap.wrap(finding.evidence, width, initial_indent=head, subsequent_indent=" " * len(head))
        if finding.remedy:  # not wrapped: it is there to be pasted
            lines.append(f"{'':<{len(head)}}-> {finding.remedy}")
    return "\n".join([*lines, "", _answer([finding.verdict for _, finding in findings])])


def _answer(verdicts: Sequence[Verdict]) -> str:
    broken, doubtful, unknown = map(verdicts.count, (Verdict.BREAKS, Verdict.WARNING, Verdict.UNKNOWN))
    may = f"; {counted(doubtful, 'thing')} may" if doubtful else ""
    more = f"{may}; {unknown} could not be found out" if unknown else may
    if broken:
        return f"{counted(broken, 'thing')} will break a training{more}."
    return f"Nothing that was looked at will break a training{more}."


def _as_json(facts: Facts, findings: Sequence[tuple[str, Finding]]) -> dict[str, Any]:
    return {
        "breaks": any(finding.verdict is Verdict.BREAKS for _, finding in findings),
        "checks": [
            {
                "check": title,
                "verdict": finding.verdict.name.lower(),
                "evidence": finding.evidence,
                "remedy": finding.remedy,
            }
            for title, finding in findings
        ],
        "versions": dict(facts.versions),
    }
