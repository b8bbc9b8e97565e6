"""Named points at which a test lets a process of ours die, on purpose.

Each message of `pool.wire` has three points by construction (just before it is sent, just after, just after it was
received), and the steps between messages are named in `STEPS`. So the list can't forget a message, and
`tests/process/test_kill_points.py` dies at every point of it.

Outside tests `reach` is one comparison: nothing is armed unless `SAFELOADER_KILL_POINT` is set.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import Final

ENV: Final = "SAFELOADER_KILL_POINT"
MARK_ENV: Final = "SAFELOADER_KILL_MARK"

STEPS: Final = (
    "nursery.step.started",
    "nursery.step.loading",
    "nursery.step.forked",
    "nursery.step.reaped",
    "worker.step.started",
    "worker.step.seeded",
    "worker.step.loaded",
    "worker.step.transformed",
    "worker.step.pickled",
    "worker.step.grown",
    "worker.step.copied",
    "worker.step.encoded",
    "worker.step.keeping",
    "worker.step.kept",
    "trainer.step.spawned",
    "trainer.step.forked",
    "trainer.step.taken",
    "trainer.step.decoded",
    "trainer.step.released",
    "trainer.step.closing",
)
"""What our processes do between two messages, by role and step."""


@dataclass
class _Armed:
    """One armed point: die when `point` is reached for the `nth` time in the first life of `role`.

    `mark` is a file that is made just before, so that a test knows that the point was reached.
    """

    point: str
    nth: int = 1
    mark: str | None = None
    role: str = "trainer"
    first_life: bool = True
    count: int = 0

    def reach(self, point: str) -> None:
        if self.first_life and point == self.point:
            self.count += 1
            if self.count == self.nth:
                if self.mark is not None:
                    os.close(os.open(self.mark, os.O_CREAT))
                os.kill(os.getpid(), signal.SIGKILL)


def _from_environment() -> _Armed | None:
    text = os.environ.get(ENV)
    if not text:
        return None
    point, _, nth = text.partition("@")
    return _Armed(point, int(nth or 1), os.environ.get(MARK_ENV))


_armed: Final = _from_environment()


def enter(role: str, *, first_life: bool) -> None:
    """Say what this process is; only a first life dies at a kill point, its successors go on."""
    if _armed is not None:
        _armed.role, _armed.first_life, _armed.count = role, first_life, 0


def reach(step: str) -> None:
    """Pass the step `role.step.name` of `STEPS`."""
    if _armed is not None:
        _armed.reach(step)


def reach_message(moment: str, message: str) -> None:
    """Pass a message's point: `moment` is "sending", "sent" or "received"."""
    if _armed is not None:
        _armed.reach(f"{_armed.role}.{moment}.{message}")
