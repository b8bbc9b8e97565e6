"""What a process and those below it have used: CPU time and page faults, from /proc."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_MINOR_FAULTS, _USER, _SYSTEM = 7, 11, 12
"""Places in /proc/PID/stat behind the name, which may hold blanks; see proc(5)."""


@dataclass(frozen=True)
class Used:
    """Since a process began: CPU seconds, user and system, and page faults that needed no disk."""

    cpu_s: float
    page_faults: int

    def since(self, before: Used) -> Used:
        """What was used in between."""
        return Used(self.cpu_s - before.cpu_s, self.page_faults - before.page_faults)


def used_by(pid: int) -> Used:
    """Of all threads of one process.

    Raises:
        ProcessLookupError: it is not there.
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    ticks = int(fields[_USER]) + int(fields[_SYSTEM])
    return Used(ticks / _TICKS_PER_S, int(fields[_MINOR_FAULTS]))


def below() -> list[int]:
    """All processes that descend from this one."""
    return [child.pid for child in psutil.Process().children(recursive=True)]


def used_by_all(pids: list[int]) -> Used:
    """The sum over processes, each of which must still be there."""
    each = [used_by(pid) for pid in pids]
    return Used(sum(used.cpu_s for used in each), sum(used.page_faults for used in each))
