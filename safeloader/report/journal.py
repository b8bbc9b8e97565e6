"""The journal: what happened to the workers, or which batches there were: a line of JSON each, in the run's folder.

    write(record) ─► queue (of limited size) ─► the writer thread: open, statvfs, one write(2), close ─► file
        returns at once                         lives only while there is something to write

The folder may lie on the very storage whose stall is being recorded, so whoever writes never waits for it: opening,
asking for free space and writing happen in a daemon thread that nobody joins. What can't be written stays queued and
is tried again with the next record. Several processes (the ranks of a DDP training) may append to the same file.

Delivery is at least once: if a storage reports an error only when the file is closed (NFS), the record is written
again. There is no fsync: a line outlives the death of any process, not that of the machine. It does not cover
rotation, and it does not decide what is worth a record.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import stat
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safeloader.report.errand import Errand

logger = logging.getLogger("safeloader")

MAX_QUEUED: Final = 1000
"""Records kept while the file can't be written; further ones are counted and left out: the first ones say why."""
_MAX_DEPTH: Final = 16
"""Containers in containers, below which a value is given as its `str`: it may contain itself."""

_ADVICE: Final = {
    errno.ENOSPC: "Free some space there.",
    errno.EDQUOT: "Free some of your quota there.",
    errno.EFBIG: "Raise the limit on file sizes (`ulimit -f`).",
    errno.EROFS: "Mount it writable: Linux makes a file system read-only when its disk fails (`dmesg | tail`).",
    errno.EACCES: "Give this user the right to write there.",
    errno.EPERM: "Give this user the right to write there.",
    errno.ENOENT: "Make the folder again.",
    errno.ENOTDIR: "Make the folder again.",
}
_ADVICE_OTHERWISE: Final = "Check that storage (`dmesg | tail`)."


class Journal:
    """Appends records to a file, one JSON object a line, without ever making the caller wait.

    Every line also gets `disk_free_nbytes`: what this user could still write on that file system when the line was
    written, or None if unknown; and `records_left_out`, if records before it were.

    Args:
        path: the file.
        what: what a record is about, for the line that says that it can't be written.
        max_queued: records kept while the file can't be written; further ones are counted and left out.
        disk_free: whether lines get `disk_free_nbytes`.

    Attributes:
        path: the file, absolute. It is made when there is something to write; its folder too, once.
    """

    def __init__(
        self, path: Path, *, what: str = "an incident", max_queued: int = MAX_QUEUED, disk_free: bool = True
    ) -> None:
        self.path = path.absolute()
        self._what = what
        self._max_queued = max_queued
        self._disk_free = disk_free
        self._pid = os.getpid()
        self._queue: deque[dict[str, Any]] = deque()  # appended to by the caller, taken from by the thread
        self._left_out = 0
        self._may_make_folder = True
        self._failing = False
        self._errand = Errand("safeloader-journal", self._write_queued)

    @property
    def queued(self) -> int:
        """How many records are not in the file yet."""
        return len(self._queue)

    def write(self, record: Mapping[str, Any]) -> None:
        """Have a record written; it may be changed afterwards. In a forked child of the trainer nothing happens.

        What JSON can't take is given as its `str`, including NaN and infinities, which most parsers refuse. With
        several threads calling at the same moment, the count of records left out may be off by one.
        """
        if os.getpid() != self._pid:
            return
        if len(self._queue) >= self._max_queued:
            self._left_out += 1
        else:
            line = {str(key): _plain(value) for key, value in record.items()}
            if self._left_out:
                line["records_left_out"], self._left_out = self._left_out, 0
            self._queue.append(line)
        self._errand.go()

    def flush(self, timeout_s: float) -> bool:
        """Whether everything is in the file, at the latest by then; what failed before is tried again."""
        if os.getpid() != self._pid:
            return True
        if self._queue:
            self._errand.go()
        return self._errand.wait(timeout_s) and not self._queue

    def close(self, timeout_s: float) -> bool:
        """`flush` for the last time: if no record came after those left out, a line of its own says how many."""
        if os.getpid() == self._pid and self._left_out:
            left_out, self._left_out = self._left_out, 0
            self._queue.append({"records_left_out": left_out})
        return self.flush(timeout_s)

    # ---- the thread ----

    def _write_queued(self) -> None:
        try:
            while self._queue:
                self._append(self._queue[0])
                self._queue.popleft()
                self._failing = False
        except OSError as error:
            if not self._failing:  # one warning until a record gets through again
                self._failing = True
                self._warn(error)

    def _append(self, record: dict[str, Any]) -> None:
        fd = self._open()
        try:
            free = {"disk_free_nbytes": _free_nbytes(fd)} if self._disk_free else {}
            line = json.dumps({**record, **free}, ensure_ascii=False, allow_nan=False)
            encoded = line.encode(errors="backslashreplace") + b"\n"  # a lone surrogate becomes JSON's own escape
            cut = self._last_line_is_cut(fd)
            # One write a line, so that the lines of several processes don't mix. After a short write it is not the
            # rest that follows (others may have appended meanwhile) but the whole line again.
            for _ in range(2):
                whole = b"\n" + encoded if cut else encoded
                if os.write(fd, whole) == len(whole):
                    return
                cut = True
            raise OSError(errno.EIO, "only a part of the line was written, twice")
        finally:
            os.close(fd)

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY
        try:
            return os.open(self.path, flags, 0o666)
        except FileNotFoundError:
            # Once, and only the last folder: what is removed later is meant to be gone, and a path of which more is
            # missing may be that of a storage that is not mounted.
            if not self._may_make_folder:
                raise
            self._may_make_folder = False
            self.path.parent.mkdir(exist_ok=True)
            return os.open(self.path, flags, 0o666)

    def _last_line_is_cut(self, fd: int) -> bool:
        """Whether somebody died, or ran out of space, in the middle of the last line."""
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or not found.st_size:
            return False
        try:
            with self.path.open("rb") as file:
                file.seek(-1, os.SEEK_END)
                return file.read(1) != b"\n"
        except OSError:
            return True  # it can't be read: an empty line does no harm

    def _warn(self, error: OSError) -> None:
        code = errno.errorcode.get(error.errno or 0, "no error number")
        advice = _ADVICE.get(error.errno or 0, _ADVICE_OTHERWISE)
        logger.warning(
            "SafeLoader: the record of %s can't be written to %s: %s (%s). Training goes on; %d of at most %d are kept "
            "and tried again with the next one. %s",
            self._what,
            self.path,
            error.strerror or error,
            code,
            len(self._queue),
            self._max_queued,
            advice,
        )


@dataclass
class Entries:
    """A journal's records, oldest first, as they are read; it can be iterated more than once.

    Attributes:
        path: the file.
        skipped: lines of the iteration so far that hold no whole record: cut off by a crash, or corrupt.
    """

    path: Path
    skipped: int = 0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self.skipped = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    record = None
                if isinstance(record, dict):
                    yield record
                else:
                    self.skipped += 1


def read(path: Path) -> Entries:
    """The records of a journal.

    Iterating over them raises:
        OSError: the file is not there or can't be read.
    """
    return Entries(path)


def _plain(value: Any, depth: int = 0) -> Any:
    """A copy of a value that JSON can take."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if depth < _MAX_DEPTH:
        if isinstance(value, Mapping):
            return {str(key): _plain(inner, depth + 1) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [_plain(inner, depth + 1) for inner in value]
    return str(value)


def _free_nbytes(fd: int) -> int | None:
    try:
        found = os.fstatvfs(fd)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize
