"""The user's loader and transform, and how they reach the workers.

Usually pickled by value (cloudpickle: lambdas and classes of the user's script included) into a memory file, from
which the clean nursery loads them. What can't be pickled, or is too large, reaches the workers by fork instead.
"""

from __future__ import annotations

import io
import pickle
import types
from collections import ChainMap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import cloudpickle

from safeloader.ring.memfile import MemoryFile


@dataclass(frozen=True)
class Work:
    """What a worker runs: `next(loader)`, then `transform(**batch)` if there is one."""

    loader: Any
    transform: Callable[..., Any] | None


@dataclass(frozen=True)
class EpochEnd:
    """Stands in a finite loader's stream where an epoch has come to its end."""


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


class TooLargeError(RuntimeError):
    """A pickle exceeds its limit."""


class Bounded(io.BytesIO):
    """A file for a pickler that refuses to grow beyond a limit."""

    def __init__(self, limit_nbytes: int) -> None:
        super().__init__()
        self._limit_nbytes = limit_nbytes

    def write(self, chunk: Any) -> int:
        """Take what the pickler gives: bytes, or the memory of an array in whatever order."""
        with pickle.PickleBuffer(chunk).raw() as flat:
            if self.tell() + flat.nbytes > self._limit_nbytes:
                raise TooLargeError
            return super().write(flat)


def pack(work: Work, limit_nbytes: int) -> tuple[MemoryFile, int]:
    """Pickle the work into a memory file.

    Returns:
        The file, and how many bytes of it the pickle takes.

    Raises:
        TooLargeError: it takes more than `limit_nbytes`.
        WorkNotPicklableError: it can't be pickled.
    """
    out = Bounded(limit_nbytes)
    try:
        ByValuePickler(out, protocol=5).dump(work)
    except TooLargeError:
        raise
    except Exception as error:
        raise WorkNotPicklableError(f"the loader can't be pickled: {type(error).__name__}: {error}") from error
    nbytes = out.tell()
    file = MemoryFile.create("safeloader-loader", nbytes)
    with memoryview(file.map()) as memory:
        memory[:nbytes] = out.getbuffer()
    return file, nbytes


def unpack(file: MemoryFile, nbytes: int) -> Work:
    """Load what `pack` wrote; raises whatever unpickling raises."""
    work = pickle.loads(memoryview(file.map())[:nbytes])
    assert isinstance(work, Work)
    return work
