"""The page on which a worker writes what it is doing, and which outlives it.

One page per incarnation, so it has one writer ever. The writer makes `seq` odd while it writes (a seqlock): a
reader that sees an odd or changed number reads again, and a writer that died in between leaves an odd number,
which the reader then knows for what it is.

    seq u64 │ stage u32 │ cases_nbytes u32 │ ticket i64 │ since_ns u64 │ batches u64 │ cases utf-8, a line each …
    from 4096: what faulthandler writes when the process crashes or is condemned
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from safeloader.ring.memfile import MemoryFile

_SEQ: Final = struct.Struct("=Q")
_BODY: Final = struct.Struct("=IIqQQ")
_BODY_AT: Final = _SEQ.size
_CASES_AT: Final = _BODY_AT + _BODY.size
_MAX_CASES_NBYTES: Final = 2048
_NBYTES: Final = 4096
_MAX_STACKS_NBYTES: Final = 16 * 1024
_READ_TRIES: Final = 8
_MAX_NAMED: Final = 4


class Stage(IntEnum):
    """What a worker is doing."""

    STARTING = 0
    LOADING = 1
    TRANSFORMING = 2
    ENCODING = 3
    IDLE = 4

    @property
    def word(self) -> str:
        """The glossary's word."""
        return self.name.lower()


@dataclass(frozen=True)
class Status:
    """A page's content: `since` is on `time.monotonic`'s clock, in seconds.

    `cases` are those that the worker has in hand: one where it is known which, else all of the batch.
    """

    stage: Stage
    ticket: int | None
    cases: tuple[str, ...]
    since: float
    batches: int

    @property
    def case(self) -> str | None:
        """The cases for a person, or None."""
        return words(self.cases)

    @property
    def culprit(self) -> str | None:
        """The one case that it can be, or None."""
        return self.cases[0] if len(self.cases) == 1 else None


def words(cases: Sequence[str]) -> str | None:
    """Cases for a person: the first few of many; None if there are none."""
    if len(cases) > _MAX_NAMED:
        return f"{', '.join(cases[:_MAX_NAMED])} and {len(cases) - _MAX_NAMED} more"
    return ", ".join(cases) or None


class StatusPage:
    """A page of memory, seen from either side."""

    def __init__(self, file: MemoryFile) -> None:
        self._file = file
        self._map = file.map()
        self._seq = 0
        self._status = Status(Stage.STARTING, None, (), time.monotonic(), 0)

    @classmethod
    def create(cls) -> StatusPage:
        """A new page in stage `STARTING` since now."""
        file = MemoryFile.create("safeloader-status", _NBYTES)
        try:
            page = cls(file)  # a mapping takes a descriptor of its own
        except OSError:
            file.close()
            raise
        page._write(page._status)
        return page

    @property
    def fd(self) -> int:
        """The descriptor, to send to the worker."""
        return self._file.fd

    def enter(self, stage: Stage, ticket: int | None = None, *, cases: Sequence[str] = (), batches: int = 0) -> None:
        """Writer: say what is done from now on."""
        self._write(Status(stage, ticket, tuple(cases), time.monotonic(), batches))

    def stacks_file(self) -> int:
        """Writer: the descriptor for faulthandler, at the place where `stacks` looks."""
        os.lseek(self._file.fd, _NBYTES, os.SEEK_SET)
        return self._file.fd

    def read(self) -> Status:
        """Reader: the last complete entry; after a death in mid-write, what could be read of it."""
        status = self._status
        for _ in range(_READ_TRIES):
            (before,) = _SEQ.unpack_from(self._map, 0)
            status = self._unpack() or status
            (after,) = _SEQ.unpack_from(self._map, 0)
            if before == after and before % 2 == 0:
                break
        return status

    def stacks(self) -> str | None:
        """Reader: the Python stacks at the process's end, or None if it left none."""
        text = os.pread(self._file.fd, _MAX_STACKS_NBYTES, _NBYTES).rstrip(b"\0").decode(errors="replace").strip()
        return text or None

    def close(self) -> None:
        """Close this side's descriptor and mapping."""
        self._file.close()
        del self._map  # the mapping goes now, not when somebody drops the page

    def _write(self, status: Status) -> None:
        cases = "\n".join(status.cases).encode()[:_MAX_CASES_NBYTES]
        ticket = -1 if status.ticket is None else status.ticket
        _SEQ.pack_into(self._map, 0, self._seq + 1)
        _BODY.pack_into(self._map, _BODY_AT, status.stage, len(cases), ticket, int(status.since * 1e9), status.batches)
        self._map[_CASES_AT : _CASES_AT + len(cases)] = cases
        self._seq += 2
        _SEQ.pack_into(self._map, 0, self._seq)

    def _unpack(self) -> Status | None:
        stage, cases_nbytes, ticket, since_ns, batches = _BODY.unpack_from(self._map, _BODY_AT)
        if stage > max(Stage) or cases_nbytes > _MAX_CASES_NBYTES:
            return None
        text = self._map[_CASES_AT : _CASES_AT + cases_nbytes].decode(errors="replace")
        cases = tuple(text.split("\n")) if text else ()
        return Status(Stage(stage), None if ticket < 0 else ticket, cases, since_ns / 1e9, batches)
