"""One export process as the trainer sees it: how it is started, what it is told and says, how it ends.

The two share a SOCK_SEQPACKET pair and nothing else: a packet arrives whole or not at all, so one that is killed in
the middle of anything leaves no half message and no lock behind. What is large (a prediction, a result) lies in a
memory file whose descriptor goes with the packet, so `/dev/shm` isn't needed.
"""

from __future__ import annotations

import array
import contextlib
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final

from safeloader.faults.exits import ExitCode, ProcessExit
from safeloader.pool.process import STACKS_SIGNAL
from safeloader.ring import codec
from safeloader.ring.memfile import MemoryFile

_BOOTSTRAP: Final = f"""\
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, {int(signal.SIGKILL)}, 0, 0, 0)
os.getppid() == int(sys.argv[1]) or os._exit({int(ExitCode.ORPHANED)})
sys.path[:] = sys.argv[4:]
from safeloader.nnunet.export.worker import main
main(int(sys.argv[2]), int(sys.argv[3]))
"""
"""A fresh interpreter, neither forked from a process that uses CUDA nor one that imports the user's script. It dies
with the thread that started it."""

_PACKET_NBYTES: Final = 4096
_STACKS_NBYTES: Final = 16 << 10
_END_S: Final = 2.0
"""How long a process may take to end once it was killed. One that waits for storage (state D) is left to the kernel."""
_STACKS_S: Final = 0.5
"""How long one that hangs may take to write its stacks."""
GOODBYE_S: Final = 0.5
"""How long after the end of its socket a process ends by itself: the kernel closes descriptors first."""


class Kind(Enum):
    """What a packet says."""

    READY = "it runs"
    JOB = "do this"
    DONE = "it is done, here is the result"
    FAILED = "it raised, here is the failure"


@dataclass(frozen=True)
class Packet:
    """One message; `number` is the job's, `seconds` how long it took."""

    kind: Kind
    number: int = -1
    seconds: float = 0.0


@dataclass(frozen=True)
class Failure:
    """An exception in an export process: its type, its text, and the traceback as Python would print it."""

    kind: str
    text: str
    traceback: str
    out_of_memory: bool = False

    @property
    def summary(self) -> str:
        """The exception in one line."""
        lines = self.text.strip().splitlines()
        return f"{self.kind}: {lines[0][:500]}" if lines else self.kind


class Link:
    """One end of the socket pair."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    @classmethod
    def pair(cls) -> tuple[Link, Link]:
        """Two connected ends, both close-on-exec."""
        a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(a), cls(b)

    @classmethod
    def from_fd(cls, fd: int) -> Link:
        """Take over an inherited descriptor."""
        return cls(socket.socket(fileno=fd))

    def fileno(self) -> int:
        """The descriptor."""
        return self._sock.fileno()

    def send(self, packet: Packet, fd: int | None = None) -> None:
        """Send a packet and a copy of a descriptor.

        Raises:
            ConnectionError: the other end is gone.
        """
        socket.send_fds(self._sock, [pickle.dumps(packet)], [] if fd is None else [fd])

    def receive(self, *, wait: bool) -> tuple[Packet, int | None] | None:
        """The next packet and the descriptor that came with it; None at the end of the stream.

        Raises:
            BlockingIOError: there is none now (only without `wait`).
        """
        flags = socket.MSG_CMSG_CLOEXEC | (0 if wait else socket.MSG_DONTWAIT)
        try:
            data, ancillary, _, _ = self._sock.recvmsg(_PACKET_NBYTES, socket.CMSG_SPACE(4), flags)
        except ConnectionResetError:
            return None
        if not data:
            return None
        fds = array.array("i")
        for _, _, content in ancillary:
            fds.frombytes(content)
        packet = pickle.loads(data)
        assert isinstance(packet, Packet)
        return packet, fds[0] if fds else None

    def close(self) -> None:
        """Close this end."""
        self._sock.close()


def private_view(fd: int) -> memoryview:
    """What a memory file holds; what is written to the view stays this process's own (copy on write).

    A process that dies in the middle of its work leaves the file as it was, for the next one.
    """
    nbytes = os.fstat(fd).st_size
    return memoryview(mmap.mmap(fd, nbytes, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE))


class ExportProcess:
    """A running one.

    Attributes:
        pid: its process id.
        jobs: numbers of the jobs that it has, in order; it works at the first.
        since: when it began with the first (or was started), on `time.monotonic`'s clock.
        ready: whether it has started.
    """

    def __init__(self) -> None:
        """Start it; raises OSError if the system refuses."""
        self.jobs: list[int] = []
        self.since = time.monotonic()
        self.ready = False
        self._link, theirs = Link.pair()
        self._stacks_fd = -1
        try:
            self._stacks_fd = os.memfd_create("safeloader-stacks", os.MFD_CLOEXEC)
            fds = [theirs.fileno(), self._stacks_fd]
            command = [sys.executable, "-c", _BOOTSTRAP, str(os.getpid()), *map(str, fds), *sys.path]
            self._popen = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=fds)
        except OSError:
            self.close()
            raise
        finally:
            theirs.close()
        self.pid = self._popen.pid

    def fileno(self) -> int:
        """Readable when it has said something, or is gone."""
        return self._link.fileno()

    def give(self, number: int, file: MemoryFile) -> None:
        """Give it a job. If it is gone, `receive` and `end` tell."""
        if not self.jobs:
            self.since = time.monotonic()
        self.jobs.append(number)
        with contextlib.suppress(ConnectionError):
            self._link.send(Packet(Kind.JOB, number), file.fd)

    def receive(self) -> tuple[Packet, Any] | None:
        """What it says next: a job's end with its result or `Failure`; None at the end of the stream.

        Raises:
            BlockingIOError: nothing now.
        """
        received = self._link.receive(wait=False)
        if received is None:
            return None
        packet, fd = received
        self.ready, self.since = True, time.monotonic()
        if fd is None:
            return packet, None
        try:
            answer = codec.decode(private_view(fd), packet.number)
        finally:
            os.close(fd)
        self.jobs.remove(packet.number)
        return packet, answer

    def condemn(self) -> ProcessExit:
        """It hangs: have it write its stacks, and end it."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, STACKS_SIGNAL)
            os.kill(self.pid, signal.SIGCONT)  # one that is stopped takes the other signal only then
        return self.end(patience_s=_STACKS_S)

    def end(self, *, patience_s: float = 0.0) -> ProcessExit:
        """Make sure that it ends, by itself within `patience_s` or by SIGKILL, and say how it did.

        Unknown if not even SIGKILL ends it in time.
        """
        self._waited(patience_s)
        if self._popen.returncode is None:
            self._popen.kill()
            self._waited(_END_S)
        code = self._popen.returncode
        return ProcessExit() if code is None else ProcessExit.from_returncode(code)

    def _waited(self, timeout_s: float) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(timeout_s)

    def stacks(self) -> str | None:
        """The Python stacks that it left when it crashed or was told to; None if it left none."""
        text = os.pread(self._stacks_fd, _STACKS_NBYTES, 0).decode(errors="replace").strip()
        return text or None

    def close(self) -> None:
        """Close our end of everything."""
        self._link.close()
        if self._stacks_fd >= 0:
            os.close(self._stacks_fd)
            self._stacks_fd = -1
