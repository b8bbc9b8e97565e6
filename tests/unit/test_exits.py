"""Wait statuses in words."""

from __future__ import annotations

import re
import signal

import pytest

from safeloader.faults.exits import ExitCode, ProcessExit


@pytest.mark.parametrize(
    ("status", "what", "advice"),
    [
        (signal.SIGKILL, "was killed by SIGKILL", "dmesg"),
        (signal.SIGSEGV | 0x80, "was killed by SIGSEGV", "invalid memory"),
        (signal.SIGBUS, "was killed by SIGBUS", "file system"),
        (signal.SIGRTMIN + 3, f"was killed by signal {signal.SIGRTMIN + 3}", "^$"),
        (3 << 8, "exited with code 3", "called exit"),
        (ExitCode.CHANNEL_LOST << 8, r"exited with code 71 \(CHANNEL_LOST\)", "^$"),
        (0, "exited with code 0", "^$"),
    ],
)
def test_a_status_in_words(status: int, what: str, advice: str) -> None:
    end = ProcessExit.from_wait_status(int(status))
    assert end.known
    assert re.fullmatch(what, end.what)
    assert re.search(advice, end.advice)


def test_what_is_not_known_is_said_to_be_unknown() -> None:
    end = ProcessExit()
    assert not end.known
    assert "is gone" in end.what
    assert end.advice == ""
