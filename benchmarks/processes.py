"""What a process and those below it have used: CPU time and page faults, from /proc."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

import psutil

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_FAULTS, _TIMES = (7, 8), (11, 12, 13, 14)
"""Places in /proc/PID/stat behind the name, which may hold blanks: its own minor faults, and those of children that it
has reaped; user and system time of its own, and theirs. See proc(5)."""


@dataclass(frozen=True)
class Used:
    """Since a process began: CPU seconds, user and system, and page faults that needed no disk."""

    cpu_s: float
    page_faults: int

    def since(self, before: Used) -> Used:
        """What was used in between."""
        return Used(self.cpu_s - before.cpu_s, self.page_faults - before.page_faults)


def used_by(pid: int) -> Used:
    """Of all threads of one process, and of the children that it has reaped.

    Raises:
        ProcessLookupError: it is not there.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    ticks, faults = (sum(int(fields[place]) for place in places) for places in (_TIMES, _FAULTS))
    return Used(ticks / _TICKS_PER_S, faults)


def below() -> list[int]:
    """All processes that descend from this one."""
    return [child.pid for child in psutil.Process().children(recursive=True)]


def used_below() -> Used:
    """Of all processes that descend from this one, also of workers that have left: their nursery has reaped them."""
    each = []
    for pid in reversed(below()):  # a worker before its nursery
        with contextlib.suppress(ProcessLookupError):
            each.append(used_by(pid))
    return Used(sum(used.cpu_s for used in each), sum(used.page_faults for used in each))
