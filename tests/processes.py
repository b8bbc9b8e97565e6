"""Asking processes that may end, and be waited for by their parents, between two questions; what our own has open."""

from __future__ import annotations

import contextlib
import os

import psutil


def lives(process: psutil.Process) -> bool:
    """Whether it runs, or is stopped. One that has ended does not, also if its parent has not waited for it yet."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    return False


def children(name: str = "", *, recursive: bool = False) -> list[psutil.Process]:
    """Of the test's own process, by the beginning of their names; also those that nobody has waited for yet."""
    found = []
    for child in psutil.Process().children(recursive):
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.name().startswith(name):
                found.append(child)
    return found


def open_files() -> list[str]:
    """What this process has open: where each of its descriptors leads."""
    leads_to = []
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):  # the descriptor of this listing itself
            leads_to.append(os.readlink(f"/proc/self/fd/{fd}"))
    return leads_to
