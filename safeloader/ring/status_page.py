"""The page on which a worker writes what it is doing, and which outlives it.

One page per incarnation, so it has one writer ever. The writer makes `seq` odd while it writes (a seqlock): a
reader that sees an odd or changed number reads again, and a writer that died in between leaves an odd number,
which the reader then knows for what it is.

    seq u64 │ stage u32 │ case_nbytes u32 │ ticket i64 │ since_ns u64 │ batches u64 │ case utf-8 …
"""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from safeloader.ring.memfile import MemoryFile

_SEQ: Final = struct.Struct("=Q")
_BODY: Final = struct.Struct("=IIqQQ")
_BODY_AT: Final = _SEQ.size
_CASE_AT: Final = _BODY_AT + _BODY.size
_MAX_CASE_NBYTES: Final = 2048
_NBYTES: Final = 4096
_READ_TRIES: Final = 8


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
    """A page's content: `since` is on `time.monotonic`'s clock, in seconds."""

    stage: Stage
    ticket: int | None
    case: str | None
    since: float
    batches: int


class StatusPage:
    """A page of memory, seen from either side."""

    def __init__(self, file: MemoryFile) -> None:
        self._file = file
        self._map = file.map()
        self._seq = 0
        self._status = Status(Stage.STARTING, None, None, time.monotonic(), 0)

    @classmethod
    def create(cls) -> StatusPage:
        """A new page in stage `STARTING` since now."""
        page = cls(MemoryFile.create("safeloader-status", _NBYTES))
        page._write(page._status)
        return page

    @property
    def fd(self) -> int:
        """The descriptor, to send to the worker."""
        return self._file.fd

    def enter(self, stage: Stage, ticket: int | None = None, *, case: str | None = None, batches: int = 0) -> None:
        """Writer: say what is done from now on."""
        self._write(Status(stage, ticket, case, time.monotonic(), batches))

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

    def close(self) -> None:
        """Close this side's descriptor and mapping."""
        self._file.close()
        del self._map  # the mapping goes now, not when somebody drops the page

    def _write(self, status: Status) -> None:
        case = (status.case or "").encode()[:_MAX_CASE_NBYTES]
        ticket = -1 if status.ticket is None else status.ticket
        _SEQ.pack_into(self._map, 0, self._seq + 1)
        _BODY.pack_into(self._map, _BODY_AT, status.stage, len(case), ticket, int(status.since * 1e9), status.batches)
        self._map[_CASE_AT : _CASE_AT + len(case)] = case
        self._seq += 2
        _SEQ.pack_into(self._map, 0, self._seq)

    def _unpack(self) -> Status | None:
        stage, case_nbytes, ticket, since_ns, batches = _BODY.unpack_from(self._map, _BODY_AT)
        if stage > max(Stage) or case_nbytes > _MAX_CASE_NBYTES:
            return None
        case = self._map[_CASE_AT : _CASE_AT + case_nbytes].decode(errors="replace")
        return Status(Stage(stage), None if ticket < 0 else ticket, case or None, since_ns / 1e9, batches)
