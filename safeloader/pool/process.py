"""What a nursery or worker does to itself when it starts: signals, name, and its tie to its parent."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import os
import signal
from pathlib import Path
from typing import Final

from safeloader.faults.exits import ExitCode

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15
_COMM_CHARS: Final = 15
_OOM_SCORE_ADJ: Final = 500
"""Well above the trainer's usual 0: the kernel takes a worker, which can be replaced, before the trainer."""
STACKS_SIGNAL: Final = signal.SIGRTMAX - 2
"""Write the Python stacks and end. A real-time signal, since the user's code may use the others."""
_MALLOC: Final = (("MALLOC_MMAP_THRESHOLD_", -3, 32 << 20), ("MALLOC_TRIM_THRESHOLD_", -1, 256 << 20))
"""Environment variable, `mallopt`'s number, and bytes. 32 MiB is the most that glibc takes for the first."""
_libc: Final = ctypes.CDLL(None, use_errno=True)


def die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent (strictly: the thread that forked it) ends in any way.

    The parent may have died before the kernel was asked; then this process ends at once.
    """
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        os._exit(ExitCode.ORPHANED)


def set_title(title: str) -> None:
    """Name the process for `ps`, `top` and `/proc/PID/comm` (15 bytes)."""
    _libc.prctl(_PR_SET_NAME, title.encode()[:_COMM_CHARS], 0, 0, 0)


def leave_interrupts_to_trainer() -> None:
    """Ignore Ctrl-C, which reaches the whole foreground process group; take all other signals as usual."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(
        signal.SIGPIPE, signal.SIG_IGN
    )  # Python's own choice, which a forked nursery's trainer may have undone
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def raise_oom_score() -> None:
    """Offer this process to the OOM killer first; some containers forbid it, which costs only that."""
    adj = Path("/proc/self/oom_score_adj")
    with contextlib.suppress(OSError):
        adj.write_text(str(max(_OOM_SCORE_ADJ, int(adj.read_text()))))


def keep_freed_memory() -> None:
    """Have glibc keep what is freed, unless the user has told it otherwise.

    By itself it gives blocks above the first of `_MALLOC` back to the kernel at once, and the top of the heap above the
    second; a worker then pays a page fault per 4 KiB for each transform. Other C libraries have no such setting.
    """
    mallopt = getattr(_libc, "mallopt", None)
    for variable, parameter, nbytes in _MALLOC:
        if mallopt is not None and variable not in os.environ:
            mallopt(parameter, nbytes)


def give_back_freed_memory() -> None:
    """Give the kernel what `keep_freed_memory` has kept."""
    trim = getattr(_libc, "malloc_trim", None)
    if trim is not None:
        trim(0)


def leave_stacks(fd: int) -> None:
    """Write the Python stacks of all threads into a file when the process crashes, or is told to by `STACKS_SIGNAL`.

    Both are done by a signal handler in C that needs neither the interpreter nor its lock, so it works for native
    code that hangs with the lock held. After `STACKS_SIGNAL` the process ends, since that is the signal's default.
    """
    faulthandler.unregister(STACKS_SIGNAL)  # the nursery's: else it would count as installed
    signal.signal(STACKS_SIGNAL, signal.SIG_DFL)
    faulthandler.enable(fd, all_threads=True)
    faulthandler.register(STACKS_SIGNAL, fd, all_threads=True, chain=True)
