"""A piece of memory that two processes share and that has no name: `memfd_create`.

It lies neither in `/dev/shm` nor in any folder, it is gone with its last descriptor and mapping, and Docker's
64 MiB limit on `/dev/shm` does not apply to it. It is sealed against shrinking, so nobody can make the other side's
mapping fault with SIGBUS.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Final

_GRANULE_NBYTES: Final = 1 << 20
"""Files grow in steps of 1 MiB, so that batches of slightly different size do not remap each time."""


class MemoryFile:
    """One descriptor of a memory file, and this process's mapping of it.

    Attributes:
        fd: the descriptor; closed by `close`.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map: mmap.mmap | None = None

    @classmethod
    def create(cls, name: str, nbytes: int = 0) -> MemoryFile:
        """Make a new one. `name` is only what `/proc/PID/maps` shows.

        Raises:
            OSError: out of descriptors or memory.
        """
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        file = cls(fd)
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
            if nbytes:
                file.grow(nbytes)
        except OSError:
            file.close()
            raise
        return file

    @property
    def nbytes(self) -> int:
        """The file's size; it may have been grown by the other side since it was mapped here."""
        return os.fstat(self.fd).st_size

    def grow(self, nbytes: int) -> None:
        """Make the file at least `nbytes` large. It never shrinks."""
        if self.nbytes < nbytes:
            os.ftruncate(self.fd, -(-nbytes // _GRANULE_NBYTES) * _GRANULE_NBYTES)

    def map(self, *, populate: bool = False) -> mmap.mmap:
        """The whole file as writable shared memory; mapped again only if it has grown.

        With `populate` all its pages come in one go, and not by a page fault for each: 6,400 for a batch of 26 MB. They
        then take memory, written to or not.

        An older mapping stays valid for as long as somebody holds a view on it.
        """
        nbytes = self.nbytes
        if self._map is None or len(self._map) < nbytes:
            flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if populate else 0)
            self._map = mmap.mmap(self.fd, nbytes, flags, mmap.PROT_READ | mmap.PROT_WRITE)
        return self._map

    def maps(self, mapping: mmap.mmap) -> bool:
        """Whether this is the mapping that `map` returned last, and nothing was closed since."""
        return self._map is mapping

    def close(self) -> None:
        """Close the descriptor and drop the mapping; views on it keep the memory until they are gone."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        self._map = None
