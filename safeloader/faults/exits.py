"""How a process ended, from its wait status, in words that a person can act on.

Covers what the kernel says. It does not say *why* a signal was sent: where the kernel does not say it either,
the advice lists what it can be and says that it is a list.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit codes of our own processes: they are protocol, so that what can't start is not started for ever."""

    OK = 0
    ORPHANED = 70
    """The parent was already gone when the process looked."""
    CHANNEL_LOST = 71
    """The socket to the trainer was closed under the worker."""
    START_FAILED = 72
    """The loader raised while it was started; the reason was sent before."""
    RETIRED = 73
    """It was asked to leave."""
    SPENT = 74
    """Its loader is a generator, and a generator that has raised can't go on."""


_ADVICE = {
    signal.SIGKILL: (
        "something outside this program sent it: the kernel when memory runs out, a scheduler or a person; "
        "`dmesg | tail` tells whether it was the kernel. If it was memory, lower nnUNet_n_proc_DA"
    ),
    signal.SIGBUS: (
        "usually a memory-mapped file that became shorter, or storage that failed, while it was read; "
        "check the preprocessed files and their file system"
    ),
    signal.SIGSEGV: (
        "usually native code that read invalid memory: a bug or mismatch in a compiled library, or bad RAM; "
        "`python -X faulthandler` shows where"
    ),
    signal.SIGABRT: (
        "usually native code that gave up because its heap is corrupted; the lines it printed above say more"
    ),
    signal.SIGFPE: "native code divided an integer by zero",
    signal.SIGILL: "a library was built for another CPU than this one",
    signal.SIGTERM: "something asked it to end: a scheduler, `kill` or a person",
    signal.SIGXCPU: "its CPU time limit is used up (`ulimit -t`)",
}


@dataclass(frozen=True)
class ProcessExit:
    """The end of a process.

    Attributes:
        signal: the name of the signal that ended it, for example "SIGKILL", or None.
        code: its exit code, or None if a signal ended it.
    """

    signal: str | None = None
    code: int | None = None

    @classmethod
    def from_wait_status(cls, status: int) -> ProcessExit:
        """Read a status as `os.waitpid` gives it."""
        return cls.from_returncode(os.waitstatus_to_exitcode(status))

    @classmethod
    def from_returncode(cls, code: int) -> ProcessExit:
        """Read a code as `subprocess` gives it: of a signal, its number below zero."""
        return cls(signal=signal_name(-code)) if code < 0 else cls(code=code)

    @property
    def known(self) -> bool:
        """Whether the kernel told how it ended (it tells only the parent, which may have died too)."""
        return self.signal is not None or self.code is not None

    @property
    def what(self) -> str:
        """What happened, as the end of the sentence "the worker …"."""
        if self.signal is not None:
            return f"was killed by {self.signal}"
        if self.code is None:
            return "is gone (its exit status died with the nursery that waited for it)"
        named = f" ({ExitCode(self.code).name})" if self.code in set(ExitCode) and self.code else ""
        return f"exited with code {self.code}{named}"

    @property
    def advice(self) -> str:
        """What to look at or do, or an empty string where there is nothing to say."""
        if self.signal is not None:
            return _ADVICE.get(signal.Signals[self.signal], "") if self.signal in signal.Signals.__members__ else ""
        if self.code is not None and self.code not in set(ExitCode):
            return "something in the loader, a transform or a library called exit; search them for it"
        return ""


def signal_name(number: int) -> str:
    """The signal's name, or its number for one that has none (real-time signals)."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
