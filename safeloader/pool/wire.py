"""What the processes say to each other, and the socket that carries it.

Every message is one packet on a private SOCK_SEQPACKET pair: it arrives whole or not at all, so a process that is
killed in the middle of anything leaves no half message and no lock behind. Batches never pass through here (they
lie in slots); a packet is a frozen dataclass as `pack` pickles it, of well under `MAX_PACKET_NBYTES`.

    trainer ─ Load, Unload, Fork, Kill ────────────────────────────► nursery
    trainer ◄ NurseryReady, Loaded, LoadFailed, Forked, ForkFailed, Reaped ─ nursery
    trainer ─ Produce, Avoid, Retire ──────────────────────────────► worker
    trainer ◄ Ready, Done, Failed, StartFailed ──────────────────────── worker
"""

from __future__ import annotations

import array
import errno
import os
import pickle
import select
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from safeloader import killpoints

MAX_PACKET_NBYTES: Final = 96 * 1024
"""Below the kernel's smallest usual socket buffer (net.core.wmem_default, 208 KiB)."""
MAX_TEXT_CHARS: Final = 16 * 1024
"""Longest text in a packet (up to 4 bytes a character in UTF-8)."""
_FDS_NBYTES: Final = socket.CMSG_SPACE(4 * array.array("i").itemsize)
"""Room for the descriptors of one packet; none has more than four."""

_NOT_WAITING: Final = int(socket.MSG_DONTWAIT)


class Message:
    """Base class of everything that a `Channel` carries."""


@dataclass(frozen=True)
class Load(Message):
    """Trainer → nursery: unpickle the loader in the attached memory file. Fds: the file."""

    pool: int
    nbytes: int


@dataclass(frozen=True)
class Unload(Message):
    """Trainer → nursery: the pool is closed, drop its loader."""

    pool: int


@dataclass(frozen=True)
class Course:
    """For a worker whose loader goes on from batch to batch, in a lane of its own.

    Attributes:
        lanes: how many there are; the worker's tickets are so far apart.
        numpy_seed: what `numpy.random` begins with, as with the stock class; None follows from the root seed.
    """

    lanes: int
    numpy_seed: int | None


@dataclass(frozen=True)
class Fork(Message):
    """Trainer → nursery: make a worker.

    Fds: the worker's end of its socket, its status page, its stderr, and with `course` its bookmark.
    """

    pool: int
    worker: int
    incarnation: int
    title: str
    cwd: str | None
    seed: int
    stream: int
    audit: bool
    course: Course | None = None


@dataclass(frozen=True)
class Kill(Message):
    """Trainer → nursery: end this worker. Only its parent can be sure that the pid is still its own.

    With `stacks` it gets the chance to write its Python stacks onto its status page first; then SIGKILL.
    """

    pool: int
    worker: int
    incarnation: int
    stacks: bool = False


@dataclass(frozen=True)
class NurseryReady(Message):
    """Nursery → trainer: imports are done."""

    pid: int


@dataclass(frozen=True)
class Loaded(Message):
    """Nursery → trainer: the pool's loader is unpickled, workers can be forked."""

    pool: int


@dataclass(frozen=True)
class LoadFailed(Message):
    """Nursery → trainer: the loader can't be unpickled there."""

    pool: int
    reason: str
    traceback: str


@dataclass(frozen=True)
class Forked(Message):
    """Nursery → trainer: the worker exists."""

    pool: int
    worker: int
    incarnation: int
    pid: int


@dataclass(frozen=True)
class ForkFailed(Message):
    """Nursery → trainer: the kernel refused to fork."""

    pool: int
    worker: int
    incarnation: int
    reason: str


@dataclass(frozen=True)
class Reaped(Message):
    """Nursery → trainer: the worker has ended; its memory is unmapped and it writes no more."""

    pool: int
    worker: int
    incarnation: int
    pid: int
    status: int


@dataclass(frozen=True)
class Produce(Message):
    """Trainer → worker: make the batch of `ticket` in `slot`, passing over its first `attempt` draws.

    Fds: the slot, if the worker hasn't got it yet.
    """

    ticket: int
    slot: int
    attempt: int


@dataclass(frozen=True)
class Avoid(Message):
    """Trainer → worker: pass over draws that hold one of these cases, too."""

    cases: tuple[str, ...]


@dataclass(frozen=True)
class Retire(Message):
    """Trainer → worker: leave."""


@dataclass(frozen=True)
class Ready(Message):
    """Worker → trainer: started, give me tickets.

    `cases`: how many the loader draws from, if that is known. `cpus`: those on which the worker may run, as bits; 0 if
    it can't measure what its work takes.
    """

    cases: int | None
    cpus: int


@dataclass(frozen=True)
class Done(Message):
    """Worker → trainer: the slot holds the ticket's batch. The slot is the trainer's from here on.

    `cases` are those of the batch, where they are known, and `effort` what it took, as a `crowd.Effort` says it.
    `checksum` is that of its content and `parts` those of its parts (name, checksum), if an audit is asked for: see
    `ring.digest`, which keeps them few and short.
    """

    ticket: int
    slot: int
    cases: tuple[str, ...]
    effort: tuple[float, float] | None = None
    checksum: str | None = None
    parts: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Failed(Message):
    """Worker → trainer: the slot holds the record of the exception that the ticket ended in."""

    ticket: int
    slot: int


@dataclass(frozen=True)
class StartFailed(Message):
    """Worker → trainer: the loader raised before the first ticket."""

    reason: str
    traceback: str


ROUTES: Final[dict[type[Message], tuple[str, str]]] = {
    Load: ("trainer", "nursery"),
    Unload: ("trainer", "nursery"),
    Fork: ("trainer", "nursery"),
    Kill: ("trainer", "nursery"),
    NurseryReady: ("nursery", "trainer"),
    Loaded: ("nursery", "trainer"),
    LoadFailed: ("nursery", "trainer"),
    Forked: ("nursery", "trainer"),
    ForkFailed: ("nursery", "trainer"),
    Reaped: ("nursery", "trainer"),
    Produce: ("trainer", "worker"),
    Avoid: ("trainer", "worker"),
    Retire: ("trainer", "worker"),
    Ready: ("worker", "trainer"),
    Done: ("worker", "trainer"),
    Failed: ("worker", "trainer"),
    StartFailed: ("worker", "trainer"),
}
"""Who sends each message to whom."""
_KINDS: Final = tuple(ROUTES)
_NUMBERS: Final = {kind: number for number, kind in enumerate(_KINDS)}


def pack(message: Message) -> bytes:
    """By number and fields: to find its class by name would take longer than all the rest."""
    return pickle.dumps((_NUMBERS[type(message)], *vars(message).values()), protocol=5)


def unpack(packet: bytes) -> Message:
    """The reverse."""
    number, *fields = pickle.loads(packet)
    message: Message = _KINDS[number](*fields)
    return message


class ChannelClosedError(ConnectionError):
    """The other end is gone."""


class Channel:
    """One end of a private SOCK_SEQPACKET pair.

    Not thread-safe: each end has one thread that uses it.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """Two connected ends, both close-on-exec."""
        a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(a), cls(b)

    def fileno(self) -> int:
        """The descriptor, for selectors and for sending it to another process."""
        return self._sock.fileno()

    def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Send one message and, with it, copies of `fds`.

        Raises:
            ChannelClosedError: the other end is gone.
        """
        name = type(message).__name__
        packet = pack(message)
        killpoints.reach_message("sending", name)
        try:
            if fds:
                socket.send_fds(self._sock, [packet], list(fds))
            else:
                self._sock.send(packet)
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ChannelClosedError(name) from error
        killpoints.reach_message("sent", name)

    def wait(self, timeout_s: float) -> bool:
        """Whether there is something to receive, be it the end of the stream, within so many seconds."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return bool(poll.poll(timeout_s * 1000))

    def receive(self) -> tuple[Message, list[int]]:
        """The next message and the descriptors that came with it; waits for it.

        Raises:
            ChannelClosedError: the other end is gone and everything it sent has been received.
            OSError: this process has no room for a descriptor that came with the message.
        """
        try:
            # Not socket.recv_fds: it ignores its flags.
            packet, ancillary, outcome, _ = self._sock.recvmsg(MAX_PACKET_NBYTES, _FDS_NBYTES, socket.MSG_CMSG_CLOEXEC)
        except ConnectionResetError as error:
            raise ChannelClosedError from error
        fds = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(content)
        message = _opened(packet)
        if outcome & socket.MSG_CTRUNC:  # the kernel leaves out descriptors that this process may not have
            for fd in fds:
                os.close(fd)
            lost = f"a descriptor that came with {type(message).__name__} could not be received"
            raise OSError(errno.EMFILE, f"{os.strerror(errno.EMFILE)}: {lost}; raise `ulimit -n`")
        killpoints.reach_message("received", type(message).__name__)
        return message, list(fds)

    def hear(self) -> Message | None:
        """The next message, or None if there is none yet. For the trainer, which is sent no descriptors.

        Raises:
            ChannelClosedError: as of `receive`.
        """
        try:
            packet = self._sock.recv(MAX_PACKET_NBYTES, _NOT_WAITING)
        except BlockingIOError:
            return None
        except ConnectionResetError as error:
            raise ChannelClosedError from error
        message = _opened(packet)
        killpoints.reach_message("received", type(message).__name__)
        return message

    def close(self) -> None:
        """Close this end; the other one sees the end of the stream."""
        self._sock.close()

    @classmethod
    def from_fd(cls, fd: int) -> Channel:
        """Take over a descriptor that was inherited or received."""
        return cls(socket.socket(fileno=fd))


def clip(text: str, limit: int = MAX_TEXT_CHARS) -> str:
    """Shorten a text for a packet, keeping its end, where tracebacks say what happened."""
    return text if len(text) <= limit else f"[{len(text) - limit} characters left out]\n{text[-limit:]}"


def _opened(packet: bytes) -> Message:
    if not packet:  # the stream's end: no message is empty
        raise ChannelClosedError
    return unpack(packet)
