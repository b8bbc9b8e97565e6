"""What workers and nurseries write to their stderr: it reaches the terminal as before, and its tail is evidence.

    worker ── its fd 2 ──► Relay (one per process) ── whole lines ──► Outlet (one per trainer) ──► the trainer's fd 2
                            └─ the last 8 KiB: `tail()`                └─ at most 64 KiB wait for it

Relays are read by the supervisor's thread, which must never wait for a terminal: one that was stopped with Ctrl-S, a
pipe into `less`, a log file on a storage that stalls. No system call can promise that for all of these: a blocking
terminal takes as long as it takes for all but the first byte, a file always claims to be writable, between poll(2)
and write(2) the training thread's `print` may fill the pipe, and O_NONBLOCK would be set for all who share the
terminal. So a thread of its own writes; it lives only while there is something to write (`Errand`). What doesn't fit
into 64 KiB meanwhile is left out, oldest first, and the stream says how much. The supervisor gives that thread a
moment (50 ms, once a stall: `Outlet.settle`) before something is left out, and after a process's last words.

SIGPIPE. A relay is closed only after the end of its process, so a live worker always has a reader, except in the
moment in which the trainer dies, whose workers the kernel ends. Python ignores SIGPIPE from its start, for the whole
process, so in that moment nobody dies of a print: `print` raises BrokenPipeError, and C code gets EPIPE from write(2)
(stdio and iostream note an error that nobody looks at). Programs that a loader starts (`subprocess` gives them the
default SIGPIPE back) and that outlive their worker are ended by it when they write to stderr.

What changes for a worker: its stderr is no terminal (`isatty`), so libraries print without colours, and its lines
reach the screen a moment later than before, and than its stdout. Not covered: stdout, which goes where it went.
"""

from __future__ import annotations

import array
import fcntl
import functools
import os
import re
import select
import termios
from collections import deque
from collections.abc import Iterator
from typing import Final

from safeloader.report.errand import Errand

TAIL_NBYTES: Final = 8 << 10
"""What is kept of each process's output."""
TAIL_LINES: Final = 40
"""Lines of it that `Relay.tail` shows."""
PENDING_NBYTES: Final = 64 << 10
"""What waits for the terminal, of all processes together."""
_READ_NBYTES: Final = 32 << 10
"""Read at a time: a process that writes for ever gets one such turn per turn of the supervisor's loop."""
_PARTIAL_NBYTES: Final = 1 << 10
"""An unfinished line waits for its end up to this length."""
_SETTLE_S: Final = 0.05
"""How long the supervisor waits at most for the screen; see `Outlet.settle`."""
_STDERR: Final = 2
_LOOK_AGAIN_MS: Final = 1000
"""A stderr that is non-blocking and full is looked at again after this time, for it may be another one by then."""

_ESCAPES: Final = re.compile(
    r"""\x1b\[[0-?]*[ -/]*[@-~]?                   # CSI: colours, cursor
    |   \x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)    # OSC and other strings: titles, links
    |   \x1b[ -/]*[0-~]                            # the short ones
    |   [\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]      # what else a terminal would obey
    """,
    re.VERBOSE,
)


class Outlet:
    """This process's stderr: file descriptor 2, whatever it is at the moment of writing.

    Not `sys.stderr`, which in a notebook is something else: the stock class's workers write to descriptor 2 as well.
    Fed by one thread. What can't be written (closed, nobody reads, disk full) counts as left out.
    """

    def __init__(self, fd: int = _STDERR) -> None:
        self._fd = fd
        self._pieces: deque[bytes] = deque()
        # No lock: each of these has one writer. These three the feeder,
        self._fed_nbytes = 0
        self._dropped_nbytes = 0
        self._slow = False
        # and these the writing thread.
        self._done_nbytes = 0
        self._lost_nbytes = 0
        self._told_nbytes = 0
        self._in_line = False
        self._errand = Errand("safeloader-stderr", self._write_pieces)

    @property
    def pending_nbytes(self) -> int:
        """What is not written yet."""
        return self._fed_nbytes - self._dropped_nbytes - self._done_nbytes

    def put(self, text: bytes) -> None:
        """Have this written as soon as it can be. It waits as `settle` does, and only before it leaves something out.

        In a forked child of this process it is forgotten.
        """
        if self.pending_nbytes + len(text) > PENDING_NBYTES:
            self.settle()  # the screen is quick, and only its thread had no turn yet
        for piece in _pieces(text):
            self._pieces.append(piece)
            self._fed_nbytes += len(piece)
        while self.pending_nbytes > PENDING_NBYTES:
            try:
                self._dropped_nbytes += len(self._pieces.popleft())
            except IndexError:  # all that is left is being written
                break
        self._errand.go()

    def flush(self, timeout_s: float) -> bool:
        """Whether everything is written, at the latest by then."""
        return self._errand.wait(timeout_s)

    def settle(self) -> None:
        """Wait a moment for all of it to be written: 50 ms at most, and not at all while that did not help last time.

        So last words usually stand above the log line that is about them, and a stopped terminal costs 50 ms once.
        """
        self._slow = not self.flush(0.0 if self._slow else _SETTLE_S)

    # ---- the writing thread ----

    def _write_pieces(self) -> None:
        while self._pieces:
            try:
                piece = self._pieces.popleft()
            except IndexError:  # dropped in this moment
                return
            left_out = self._dropped_nbytes + self._lost_nbytes
            if left_out > self._told_nbytes:
                note = f"[… {left_out - self._told_nbytes} bytes of worker output left out]\n".encode()
                if self._write(b"\n" + note if self._in_line else note):
                    self._told_nbytes = left_out
            if not self._write(piece):
                self._lost_nbytes += len(piece)
            self._done_nbytes += len(piece)

    def _write(self, text: bytes) -> bool:
        """Whether the whole of it could be written. Waits as long as that takes."""
        rest = memoryview(text)
        while rest:
            try:
                written = os.write(self._fd, rest)
            except BlockingIOError:  # somebody who shares it has made it non-blocking
                poll = select.poll()
                poll.register(self._fd, select.POLLOUT)
                poll.poll(_LOOK_AGAIN_MS)
                continue
            except OSError:  # closed, no reader, a terminal that is gone, no space: there is nobody to tell
                return False
            self._in_line = rest[written - 1] not in b"\r\n"
            rest = rest[written:]
        return True


class Relay:
    """The trainer's end of one process's stderr. Used by the supervisor's thread only; `tail` by any.

    In a child forked from the trainer it may only be closed: what is read there is missing in the trainer.
    """

    def __init__(self, fd: int, outlet: Outlet) -> None:
        self._fd = fd
        self._outlet = outlet
        self._tail = b""
        self._cut = False
        self._partial = b""

    @classmethod
    def create(cls, outlet: Outlet | None = None) -> tuple[Relay, int]:
        """A relay into an outlet (this process's), and the descriptor for the new process's stderr: see `adopt`.

        Whoever asked closes that descriptor once it is sent. Both are close-on-exec and above the standard streams,
        even if the trainer has closed those. Only the reading end is non-blocking.

        Raises:
            OSError: out of descriptors.
        """
        ours, theirs = os.pipe2(os.O_CLOEXEC)
        try:
            ours = _above_standard_streams(ours)
            theirs = _above_standard_streams(theirs)
            os.set_blocking(ours, False)
        except OSError:
            os.close(ours)
            os.close(theirs)
            raise
        return cls(ours, outlet or _outlet_of(os.getpid())), theirs

    def fileno(self) -> int:
        """The reading end, for selectors."""
        return self._fd

    def on_readable(self) -> bool:
        """Take in what is there, 32 KiB at most.

        Returns:
            False at the end of the stream: nobody can write any more (or the process has redirected its stderr), and
            the descriptor must be taken out of the selector, since from now on it is readable for ever.
        """
        text = self._read(_READ_NBYTES)
        return text is None or bool(text)

    def drain(self) -> None:
        """Once the process has ended: take in what it left in the pipe, end its last line, and let that be shown.

        It reads what is there now, not to the end of the stream: a process that the worker started may hold the pipe
        for ever, and write. It waits for the screen as `Outlet.settle` does.
        """
        if self._fd < 0:
            return
        available = array.array("i", [0])
        fcntl.ioctl(self._fd, termios.FIONREAD, available)
        left_nbytes = available[0]
        while left_nbytes > 0 and (text := self._read(min(left_nbytes, _READ_NBYTES))):
            left_nbytes -= len(text)
        if self._partial:
            # A line end, so that the next line on the screen does not begin in the middle of this one.
            self._outlet.put(self._partial + b"\n")
            self._partial = b""
        self._outlet.settle()

    def tail(self) -> str:
        """The last lines, at most 40 and 8 KiB, as a terminal would show them but for colours; "" if there are none.

        A progress bar is given in its last state. "…" says that a line began before what is kept.
        """
        text = self._tail.lstrip(_UTF8_CONTINUATIONS) if self._cut else self._tail
        lines = [_last_state(line) for line in text.decode(errors="replace").split("\n")]
        if self._cut:
            lines[0] = "…" + lines[0]
        return "\n".join("\n".join(lines).rstrip().split("\n")[-TAIL_LINES:])

    def close(self) -> None:
        """Close the reading end; `tail` stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read(self, limit_nbytes: int) -> bytes | None:
        """Take in what is there: b"" at the end of the stream, None if there is nothing now."""
        try:
            text = os.read(self._fd, limit_nbytes)
        except BlockingIOError:
            return None
        self._take(text)
        return text

    def _take(self, text: bytes) -> None:
        kept = self._tail + text[-TAIL_NBYTES:]
        self._cut = self._cut or len(self._tail) + len(text) > TAIL_NBYTES
        self._tail = kept[-TAIL_NBYTES:]
        text = self._partial + text
        # A progress bar's "\r" ends a line, too: it would not be seen for a long time otherwise.
        end = max(text.rfind(b"\n"), text.rfind(b"\r")) + 1
        if len(text) - end > _PARTIAL_NBYTES:
            end = len(text)
        self._partial = text[end:]
        if end:
            self._outlet.put(text[:end])


def adopt(fd: int) -> None:
    """In the new process: make this its stderr. Inherited by what it starts, as any stderr is."""
    os.dup2(fd, _STDERR)
    os.close(fd)


def flush(timeout_s: float) -> bool:
    """Whether all that this process's relays have passed on is written, at the latest by then."""
    return _outlet_of(os.getpid()).flush(timeout_s)


@functools.cache
def _outlet_of(_pid: int) -> Outlet:
    """The process's outlet: there is one descriptor 2. A forked child has no use for its parent's."""
    return Outlet()


_UTF8_CONTINUATIONS: Final = bytes(range(0x80, 0xC0))


def _last_state(line: str) -> str:
    """What is left to see of a line whose beginning was overwritten."""
    states = _ESCAPES.sub("", line).split("\r")
    return next((state.rstrip() for state in reversed(states) if state.strip()), "")


def _pieces(text: bytes) -> Iterator[bytes]:
    """Whole lines, as many as a pipe takes in one go (POSIX: PIPE_BUF bytes do not mix with others'); long ones cut."""
    start = 0
    while start < len(text):
        stop = start + select.PIPE_BUF
        if stop < len(text):
            stop = text.rfind(b"\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop


def _above_standard_streams(fd: int) -> int:
    """The same descriptor, or another in its place: what is 0, 1 or 2 would be taken for a standard stream."""
    if fd > _STDERR:
        return fd
    moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _STDERR + 1)
    os.close(fd)
    return moved
