"""What importing torch and nnU-Net shows: done by another process, which may crash or hang, and by pip."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from safeloader.nnunet import apart


@dataclass(frozen=True)
class Probed:
    """What each step of `safeloader.nnunet.probe` found.

    Attributes:
        steps: What a step that ended said, by its name; with "error" if it failed.
        ended: Why the process did not come to its end, as the end of a sentence; "" if it did.
        late: Whether that was for want of time.
    """

    steps: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    ended: str = ""
    late: bool = False

    def step(self, name: str) -> Mapping[str, Any]:
        """What a step said; of one that did not come to its end, how the process ended."""
        return self.steps.get(name, {"error": self.ended})

    def unreached(self, name: str) -> bool:
        """Whether nothing is known of a step for want of time: no fault, where storage is slow or the machine busy."""
        return self.late and name not in self.steps


def probe(trainer: str, *, deep: bool, timeout_s: float) -> Probed:
    """Let another process import torch, blosc2 and nnU-Net, and find the trainer."""
    ended, late = "", False
    try:
        done = subprocess.run(
            apart.command("safeloader.nnunet.probe", trainer, *(["--deep"] if deep else [])),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=apart.environment(),
            timeout=timeout_s,
            check=False,
        )
        printed = done.stdout
        if done.returncode:
            ended = f"the process that tried it {_how(done.returncode)}"
    except subprocess.TimeoutExpired as error:
        printed, ended, late = error.stdout or b"", f"it took more than {timeout_s:.0f} s", True
    # A line without its end was being written when the process ended.
    steps = [json.loads(line) for line in printed.decode().split("\n")[:-1]]
    return Probed({step.pop("step"): step for step in steps}, ended, late)


def _how(status: int) -> str:
    return f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with exit code {status}"


def pip_complaints(timeout_s: float) -> list[str] | None:
    """What `pip check` says about installed versions that don't fit; None if it can't be asked."""
    command = [sys.executable, "-m", "pip", "check", "--disable-pip-version-check"]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout_s, check=False
        )
    except subprocess.TimeoutExpired:
        return None
    # Other errors (no pip here) are on stderr, and nothing is on stdout.
    return done.stdout.splitlines() if done.returncode and done.stdout else None if done.returncode else []
