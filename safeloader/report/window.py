"""A window into a process with pools: who looks through it sees what they are doing, and the process does nothing else.

    the trainer   Window: listens on an abstract Unix socket, "@safeloader-PID-random"; who connects gets one answer
    safeloader top   windows() finds them in /proc/net/unix ─► look(name)

An abstract name lies in no folder and is gone with the process. It has no permissions either, so the trainer asks the
kernel who has connected, and answers its own user and root alone. Both must be in one network namespace: the same
machine, or the same container. What the answer says is for those who make and read it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

_PREFIX: Final = "safeloader-"
_CREDENTIALS: Final = struct.Struct("3i")
"""Process, user and group of the other side; see unix(7), SO_PEERCRED."""
_MAX_NBYTES: Final = 1 << 20
_BACKLOG: Final = 8


class WindowError(Exception):
    """Nothing can be seen there; the message says why."""


class Window:
    """The trainer's side: see the module. `fd` is readable when somebody looks; then `answer` is to be called."""

    def __init__(self, state: Callable[[], Mapping[str, Any]]) -> None:
        """Open it.

        Args:
            state: What there is to see, ready for `json.dumps`; asked for each time that somebody looks.

        Raises:
            OSError: No socket can be had.
        """
        self._state = state
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        try:
            # Random, because two containers may share a network namespace and have the same pids.
            self._listener.bind(f"\0{_PREFIX}{os.getpid()}-{secrets.token_hex(4)}")
            self._listener.listen(_BACKLOG)
        except OSError:
            self._listener.close()
            raise

    @property
    def fd(self) -> int:
        """The descriptor to wait for."""
        return self._listener.fileno()

    def answer(self) -> None:
        """Show the state to whoever waits; never blocks."""
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while True:
                viewer, _ = self._listener.accept()
                with viewer:
                    viewer.setblocking(False)
                    if self._may_look(viewer):
                        viewer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MAX_NBYTES)
                        # What does not fit at once is cut off, and the other side says so.
                        viewer.send(json.dumps(self._state()).encode() + b"\n")

    def close(self) -> None:
        """Close it; safe to call again."""
        self._listener.close()

    @staticmethod
    def _may_look(viewer: socket.socket) -> bool:
        _, user, _ = _CREDENTIALS.unpack(viewer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        return user in (0, os.geteuid())


def windows(system: Path = Path("/")) -> list[str]:
    """The names of all windows in this network namespace, of whatever user.

    Args:
        system: Where `proc` is found; tests give a recorded tree.

    Raises:
        WindowError: They can't be listed.
    """
    try:
        lines = (system / "proc/net/unix").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise WindowError(f"/proc/net/unix can't be read: {error.strerror}") from error
    names = (line.split()[-1] for line in lines[1:])
    # A connection carries the listener's name as well.
    return sorted({name.removeprefix("@") for name in names if name.startswith(f"@{_PREFIX}")})


def process_of(name: str) -> int:
    """The pid that a window's name tells, as its own process knows it."""
    return int(name.removeprefix(_PREFIX).partition("-")[0])


def look(name: str, timeout_s: float) -> dict[str, Any]:
    """See what the process behind a window is doing.

    Raises:
        WindowError: It is another user's, is gone, or does not answer in time.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as viewer:
        viewer.settimeout(timeout_s)
        try:
            viewer.connect(f"\0{name}")
            with viewer.makefile("rb") as answer:
                said = answer.readline(_MAX_NBYTES)
        except TimeoutError as error:
            raise WindowError(f"it does not answer within {timeout_s:g} s") from error
        except OSError as error:
            raise WindowError(f"it is gone ({error.strerror})") from error
    if not said:
        raise WindowError("it is another user's")
    try:
        state: dict[str, Any] = json.loads(said)
    except ValueError as error:
        raise WindowError("its answer was cut off, or is of another version of SafeLoader") from error
    return state
