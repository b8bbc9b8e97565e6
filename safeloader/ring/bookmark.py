"""Where a worker keeps the place in a loader that goes on from batch to batch, so that its replacement can take over.

    half 0: number │ nbytes │ crc │ state …        the state before the even batches
    half 1: number │ nbytes │ crc │ state …        and before the odd ones

A worker writes the state before batch n + 1 and then says that batch n is done. So when it dies, the trainer waits for
one of the last two numbers, and that one's half was not being written to. One file per incarnation, so it has one
writer ever, even if a worker that can't be killed comes back; the next incarnation gets a copy.

The file is sparse: only what was written takes memory.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final

from safeloader import killpoints
from safeloader.ring.memfile import MemoryFile

MAX_STATE_NBYTES: Final = 4 << 20
"""A larger state is not kept: writing it after every batch would cost more than it saves."""
_HEADER: Final = struct.Struct("=qQI")
_HALF_NBYTES: Final = _HEADER.size + MAX_STATE_NBYTES
_NOTHING: Final = -1


class Bookmark:
    """One incarnation's file, seen from either side."""

    def __init__(self, file: MemoryFile) -> None:
        self._file = file
        self._map = file.map()

    @classmethod
    def create(cls, previous: Bookmark | None = None) -> Bookmark:
        """A new one, with what the previous incarnation has kept.

        Raises:
            OSError: out of descriptors or memory.
        """
        file = MemoryFile.create("safeloader-bookmark", 2 * _HALF_NBYTES)
        try:
            bookmark = cls(file)
        except OSError:
            file.close()
            raise
        for half in (0, 1):
            kept = None if previous is None else previous._read(half)
            if kept is None:
                bookmark._clear(half)
            else:
                bookmark._write(*kept)
        return bookmark

    @property
    def fd(self) -> int:
        """The descriptor, to send to the worker."""
        return self._file.fd

    @property
    def empty(self) -> bool:
        """Whether nothing was ever kept."""
        return self._read(0) is None and self._read(1) is None

    def write(self, number: int, state: bytes) -> None:
        """Keep the state before batch `number`; the one before batch `number` - 2 is forgotten."""
        self._clear(number % 2)
        killpoints.reach("worker.step.keeping")
        self._write(number, state)
        killpoints.reach("worker.step.kept")

    def read(self, number: int) -> bytes | None:
        """The state before batch `number`, or None if it is not (or not wholly) there."""
        kept = self._read(number % 2)
        return kept[1] if kept is not None and kept[0] == number else None

    def close(self) -> None:
        """Close this side's descriptor and mapping."""
        self._file.close()
        del self._map  # the mapping goes now, not when somebody drops the bookmark

    def _write(self, number: int, state: bytes) -> None:
        at = number % 2 * _HALF_NBYTES
        self._map[at + _HEADER.size : at + _HEADER.size + len(state)] = state
        _HEADER.pack_into(self._map, at, number, len(state), _checksum(number, state))

    def _clear(self, half: int) -> None:
        _HEADER.pack_into(self._map, half * _HALF_NBYTES, _NOTHING, 0, 0)

    def _read(self, half: int) -> tuple[int, bytes] | None:
        at = half * _HALF_NBYTES
        number, nbytes, crc = _HEADER.unpack_from(self._map, at)
        if number == _NOTHING or nbytes > MAX_STATE_NBYTES:
            return None
        state = bytes(self._map[at + _HEADER.size : at + _HEADER.size + nbytes])
        return (number, state) if _checksum(number, state) == crc else None


def _checksum(number: int, state: bytes) -> int:
    """Of the number, too: else one that was written into a cleared half alone would stand for an empty state."""
    return zlib.crc32(state, zlib.crc32(number.to_bytes(8, "little", signed=True)))
