"""The user's loader and transform, and how they reach the workers.

Usually pickled by value (cloudpickle: lambdas and classes of the user's script included) into a memory file, from
which the clean nursery loads them. What can't be pickled, or is too large, reaches the workers by fork instead.
"""

from __future__ import annotations

import pickle
import types
from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import cloudpickle
import numpy as np

from safeloader.ring.memfile import MemoryFile


@dataclass(frozen=True)
class Work:
    """What a worker runs: `next(loader)`, then `transform(**batch)` if there is one."""

    loader: Any
    transform: Callable[..., Any] | None


@dataclass(frozen=True)
class EpochEnd:
    """Stands in a finite loader's stream where an epoch has come to its end."""


class WorkTooLargeError(RuntimeError):
    """The pickle exceeds the limit."""


class WorkNotPicklableError(RuntimeError):
    """Pickling raised; the message is in one line."""


def _reduce_code(code: types.CodeType) -> tuple[Any, ...]:
    make, arguments = cloudpickle.Pickler.dispatch_table[types.CodeType](code)
    return _code_of_file, (make, arguments, code.co_filename)


def _code_of_file(make: Callable[..., types.CodeType], arguments: tuple[Any, ...], file: str) -> types.CodeType:
    return make(*arguments).replace(co_filename=file)


class ByValuePickler(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no types
    """Code of the user's script by value, with the name of its file: cloudpickle leaves that out from 3.1.3 on.

    Without it a worker's traceback would not show a single line of the user's code.
    """

    dispatch_table: ClassVar[Any] = ChainMap({types.CodeType: _reduce_code}, cloudpickle.Pickler.dispatch_table)


class _Bounded:
    """A file for a pickler that refuses to grow beyond a limit."""

    def __init__(self, limit_nbytes: int) -> None:
        self.chunks: list[bytes] = []
        self.nbytes = 0
        self._left = limit_nbytes

    def write(self, chunk: bytes) -> int:
        self._left -= len(chunk)
        if self._left < 0:
            raise WorkTooLargeError
        self.chunks.append(bytes(chunk))
        self.nbytes += len(chunk)
        return len(chunk)


def pack(work: Work, limit_nbytes: int) -> tuple[MemoryFile, int]:
    """Pickle the work into a memory file.

    Returns:
        The file, and how many bytes of it the pickle takes.

    Raises:
        WorkTooLargeError: it takes more than `limit_nbytes`.
        WorkNotPicklableError: it can't be pickled.
    """
    out = _Bounded(limit_nbytes)
    try:
        ByValuePickler(out, protocol=5).dump(work)
    except WorkTooLargeError:
        raise
    except Exception as error:
        raise WorkNotPicklableError(f"the loader can't be pickled: {type(error).__name__}: {error}") from error
    file = MemoryFile.create("safeloader-loader", max(1, out.nbytes))
    memory = np.frombuffer(file.map(), dtype=np.uint8)
    at = 0
    for chunk in out.chunks:
        memory[at : at + len(chunk)] = np.frombuffer(chunk, dtype=np.uint8)
        at += len(chunk)
    return file, out.nbytes


def unpack(file: MemoryFile, nbytes: int) -> Work:
    """Load what `pack` wrote; raises whatever unpickling raises."""
    work = pickle.loads(memoryview(file.map())[:nbytes])
    assert isinstance(work, Work)
    return work
