"""Runs one of nnU-Net's commands so that nothing of it is left running, however the demo ends."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import psutil

from safeloader.errors import SafeLoaderError

_GONE_TIMEOUT_S = 10.0


class CommandFailedError(SafeLoaderError):
    """A command of nnU-Net's ended with an error that the demo did not expect.

    Attributes:
        returncode: Its exit status.
        log: The file with its output.
    """

    def __init__(self, argv: Sequence[str], returncode: int, log: Path) -> None:
        last = "\n".join(tail(log, 5))
        super().__init__(f"{Path(argv[0]).name} failed with exit status {returncode}; {log} ends with\n{last}")
        self.returncode = returncode
        self.log = log


class CommandProcess:
    """A command in a session of its own, with its output in a file.

    A context manager: on leaving, its whole process group and all descendants are killed and waited for. Being in
    another session, it does not get the terminal's Ctrl-C; the demo does, and leaves the context.
    """

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        """Start `argv`; its stdout and stderr go to `log`, which is made anew."""
        self.argv = list(argv)
        self.log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "wb") as output:
            self._process = subprocess.Popen(
                self.argv,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        # The demo sends SIGSEGV and SIGBUS: without this, each would leave a core file in the working folder.
        resource.prlimit(self._process.pid, resource.RLIMIT_CORE, (0, 0))

    @property
    def pid(self) -> int:
        """The command's process id."""
        return self._process.pid

    def wait(self, timeout_s: float) -> int | None:
        """Wait at most `timeout_s`; the exit status, or None if it still runs."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def check(self) -> None:
        """Wait for the end.

        Raises:
            CommandFailedError: It ended with an error.
        """
        returncode = self._process.wait()
        if returncode != 0:
            raise CommandFailedError(self.argv, returncode, self.log)

    def kill(self) -> None:
        """Kill the group and everything that descends from the command, and wait until all are gone."""
        descendants = self._descendants()
        # Suppressed: who is gone by itself needs no signal.
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        for process in descendants:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        psutil.wait_procs(descendants, timeout=_GONE_TIMEOUT_S)

    def _descendants(self) -> list[psutil.Process]:
        try:
            return list(psutil.Process(self.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            return []

    def __enter__(self) -> CommandProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()


def tail(log: Path, lines: int) -> list[str]:
    """The last lines of a file that are not empty."""
    text = log.read_text(encoding="utf-8", errors="replace")
    return [line.rstrip() for line in text.splitlines() if line.strip()][-lines:]
