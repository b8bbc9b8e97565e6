"""Whether an exception is a failure to read data, so that a later try may succeed, and where it was raised.

    an exception ─► and those it was made of ─► is it the file system's answer (errno)?      STORAGE
                    (`raise … from`, `raise`    does a reader find the file damaged?         CONTENT
                    in an `except`)             else                                         None: code, for all we know
                                                CONTENT ─► ask for the file again: an error? STORAGE

A *reader* is a library function that is known to raise about what it reads. Only frames inside of the user's innermost
one are looked for readers: a transform's ValueError is the transform's, whatever called it.

What really happens (nnU-Net 2.8.1, blosc2 4.14, NumPy 2.4; found with `tests/damage.py` and a FUSE file system):

* blosc2 hides the errno. A file that can't be opened and one that is damaged both give `RuntimeError: … returned
  NULL`, hence the question to the file system. One that can't even be looked up (EIO, ESTALE, EACCES, ENOTCONN) is
  `FileNotFoundError` without an errno.
* A `.b2nd` that is damaged inside passes `load_case`; the crop raises `RuntimeError: Error while getting the buffer`,
  but only a crop that needs that block. There is no checksum: of single flipped bytes in a brain MRI half, in its
  labels a third, are *silently* read as wrong values. Zeros raise. `.npy` never tells, `.npz` always does (CRC).
* What can't be read through a mapping (`.b2nd`: from its header on; `.npy`: in the crop, or, as that is a view, in
  the transform) is SIGBUS and not an exception. So is a file that shrinks meanwhile.
* zipfile turns EIO into `BadZipFile`; EAGAIN looks like the end of the file; `np.fromfile` reads less and says nothing.
* A damaged `.pkl` raises nearly anything. It is a failure to read if nothing but `load_pickle` had a hand in it.

A missing key of an `.npz` is not one: its directory is written last, so an archive that opens is whole, and the key
is wrong. A file that is not there always is one, even if user code opened it: a mount that was lost looks the same,
and the price of a wrong guess is that the exception is raised seconds later.

Not covered: deaths (see `exits`), hangs, and what is read wrong without an error.
"""

from __future__ import annotations

import contextlib
import errno
import io
import opcode
import os
import pathlib
import struct
import tokenize
from collections.abc import Iterator
from enum import Enum
from types import FrameType, TracebackType
from typing import Any, Final


class ReadFailure(str, Enum):
    """What could not be read."""

    STORAGE = "storage"
    """The file system answered with an error."""
    CONTENT = "content"
    """The file was read, but it is truncated, half-written or corrupt."""


_STORAGE: Final = frozenset(
    {
        # The device fails, or the way to it. Besides EIO: the block layer's words for it (blk-core.c, `blk_errors`).
        *(errno.EIO, errno.ENODATA, errno.ENOLINK, errno.EREMOTEIO, errno.EBADE, errno.EILSEQ, errno.ETIME),
        *(errno.ENODEV, errno.ENXIO, errno.ENOMEDIUM),
        # ext4, XFS: the file system found itself damaged, or a checksum of its own wrong.
        *(errno.EUCLEAN, errno.EBADMSG),
        # NFS, Lustre, CIFS, FUSE: the server or daemon is away, came back without knowing the file, or evicted us.
        *(errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.ESHUTDOWN, errno.EHOSTDOWN, errno.EHOSTUNREACH),
        *(errno.ENETDOWN, errno.ENETUNREACH, errno.ENETRESET, errno.ECONNREFUSED, errno.ECONNRESET),
        *(errno.ECONNABORTED, errno.ECOMM, errno.EPROTO, errno.EREMCHG, errno.ENOLCK),
        # It has no time for us.
        *(errno.EAGAIN, errno.EBUSY, errno.EINTR),
        # A mount is gone, or an automounter has put something else there.
        *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP),
        # Rights that come and go: a Kerberos ticket that ran out, a server that lost its table of users.
        *(errno.EACCES, errno.EPERM, errno.ENOKEY, errno.EKEYEXPIRED, errno.EKEYREVOKED, errno.EKEYREJECTED),
    }
)
"""Left out: limits of the process (EMFILE, ENFILE, ENOMEM), what only writing meets (ENOSPC, EDQUOT, EROFS), bugs
(EBADF, EFAULT, EINVAL, ENAMETOOLONG) and what is about processes (EPIPE, ECHILD, ESRCH)."""

_STORAGE_TYPES: Final = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
"""Raised by libraries without an errno, as what the file system said to them."""

_DAMAGED: Final = frozenset(
    {
        *("builtins.EOFError", "zlib.error", "_lzma.LZMAError", "compression.zstd.ZstdError"),
        *("zipfile.BadZipFile", "gzip.BadGzipFile", "tarfile.ReadError", "_pickle.UnpicklingError"),
        *("nibabel.filebasedimages.ImageFileError", "nibabel.spatialimages.HeaderDataError"),
        *("PIL.UnidentifiedImageError", "tifffile.tifffile.TiffFileError"),
    }
)
"""Types that say by themselves that a file is damaged. By name: not every Python has every codec."""

_SHORT: Final = ("mmap length is greater than file size", "cannot mmap an empty file", "mmap offset is greater than")

_READERS: Final = {
    ("blosc2.schunk", "open"): "urlpath",
    ("batchgenerators.utilities.file_and_folder_operations", "load_pickle"): "file",
    ("batchgenerators.utilities.file_and_folder_operations", "load_json"): "file",
    ("numpy.lib._npyio_impl", "load"): "file",
    ("numpy._core.memmap", "__new__"): "filename",
    ("numpy.lib.npyio", "load"): "file",  # this and the next are NumPy 1's
    ("numpy.core.memmap", "__new__"): "filename",
    ("nibabel.loadsave", "load"): "filename",
    ("nibabel.volumeutils", "array_from_file"): "infile.name",
    ("SimpleITK.extra", "ReadImage"): "fileName",
    ("PIL.ImageFile", "load"): "self.filename",
    ("torch.serialization", "load"): "f",
    ("json", "load"): "fp.name",
}
"""Functions that read files, and where in their variables the file is named."""

_NAMING: Final = _READERS | {
    ("blosc2.ndarray", "__getitem__"): "self.urlpath",
    ("numpy.lib._npyio_impl", "__getitem__"): "self.zip.filename",
    ("numpy.lib.npyio", "__getitem__"): "self.zip.filename",
}
"""These, too, know the file, but raise about their arguments as well."""

_READER_MODULES: Final = (
    *("numpy.lib._format_impl", "numpy.lib.format", "tifffile", "zipfile", "tarfile"),
    *("gzip", "bz2", "lzma", "_compression", "compression"),
)
"""Modules that do nothing but read (a training writes nothing with them)."""

_FORMAT: Final = (
    *(ValueError, RuntimeError, OverflowError, SyntaxError, SystemError, struct.error, tokenize.TokenError),
)
"""What readers raise about damaged files. Not ImportError, AttributeError, TypeError, LookupError: those are about
versions, arguments and keys. Not MemoryError: usually there is none left."""

_NOT_DATA: Final = (
    "subprocess",
    "multiprocessing.popen_",
    "multiprocessing.connection",
    "multiprocessing.shared_memory",
)
"""What fails in here is about programs and processes, though it speaks the file system's language."""

_MAX_CHAIN: Final = 32
"""Exceptions of one chain that are looked at."""

_LIBRARIES: Final = (os.path.dirname(os.__file__) + os.sep, str(pathlib.Path(__file__).parents[1]) + os.sep)
_PACKAGES: Final = tuple(f"{os.sep}{name}{os.sep}" for name in ("site-packages", "dist-packages"))


def read_failure(error: BaseException) -> ReadFailure | None:
    """Whether the exception is a failure to read data; None if it may as well be a bug.

    Never raises. If the file seems damaged and is known, its first byte is read, to hear the file system's own word.
    """
    damaged = False
    for one in _chain(error):
        found = _judge(one)
        if found is ReadFailure.STORAGE:
            return found
        damaged = damaged or found is ReadFailure.CONTENT
    if not damaged:
        return None
    path = file_of(error)
    return ReadFailure.CONTENT if path is None or _is_readable(path) else ReadFailure.STORAGE


def place(error: BaseException) -> str:
    """Where an exception was raised: `module.Type at file.py:12 in function`; the same for the same bug on other data.

    The frame is the innermost of the user's code. If there is none (a library was called by libraries only), it is
    the innermost of all. Never raises.
    """
    steps = list(_steps(error))
    kind = _name(type(error))
    if not steps:
        return f"{kind} at an unknown place"
    step = next((step for step in steps if not _in_library(step.tb_frame)), steps[0])
    code = step.tb_frame.f_code
    return f"{kind} at {os.path.basename(code.co_filename)}:{step.tb_lineno} in {code.co_name}"


def file_of(error: BaseException) -> str | None:
    """The path concerned, if the exception or a reader that it went through says; for messages. Never raises."""
    for one in _chain(error):
        if issubclass(type(one), OSError):
            path = _as_path(_slot(OSError, "filename", one))
            if path is not None:
                return path
        for step in _steps(one):
            variable = _NAMING.get(_function(step.tb_frame))
            path = _as_path(_look_up(step.tb_frame, variable)) if variable else None
            if path is not None:
                return path
    return None


# ---- one exception ----


def _judge(error: BaseException) -> ReadFailure | None:
    kind = type(error)
    inner = _inner_functions(error)
    if inner and inner[0][0].startswith(_NOT_DATA):
        return None
    is_os_error = issubclass(kind, OSError)
    number = _slot(OSError, "errno", error) if is_os_error else None
    if isinstance(number, int) and number in _STORAGE:
        return ReadFailure.STORAGE
    if number is None and issubclass(kind, _STORAGE_TYPES):
        return ReadFailure.STORAGE
    if any(_name(base) in _DAMAGED for base in _slot(type, "__mro__", kind)):
        return ReadFailure.CONTENT
    if kind is ValueError and _text(error).startswith(_SHORT):
        return ReadFailure.CONTENT
    if issubclass(kind, RuntimeError) and inner and inner[0][0].startswith("blosc2.blosc2_ext"):
        return ReadFailure.CONTENT
    bad_format = issubclass(kind, _FORMAT) or (is_os_error and number in (None, errno.EINVAL))
    if bad_format and any(_is_reader(function) for function in inner):
        return ReadFailure.CONTENT
    return None


def _is_reader(function: tuple[str, str]) -> bool:
    return function in _READERS or function[0].startswith(_READER_MODULES)


def _is_readable(path: str) -> bool:
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            os.read(file, 1)
        finally:
            os.close(file)
    except OSError as answer:
        return answer.errno not in _STORAGE
    except ValueError:  # it is no path
        return True
    return True


# ---- chains, frames and attributes ----


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The exception, and those that it stands for: its causes, and what an `except` caught that raised it."""
    current: BaseException | None = error
    for _ in range(_MAX_CHAIN):  # a chain may be very long, or closed
        if current is None:
            return
        yield current
        cause = _slot(BaseException, "__cause__", current)
        context = _slot(BaseException, "__context__", current)
        current = cause if cause is not None else context if _is_translation(current, context) else None


def _is_translation(error: BaseException, context: BaseException | None) -> bool:
    """Whether `error` was raised by a `raise` in the very `except` that caught `context`.

    Otherwise it came up while `context` was dealt with, and may be about something else: a bug in a fallback.
    """
    if context is None:
        return False
    step = next(_steps(error), None)
    caught = _slot(BaseException, "__traceback__", context)
    if step is None or caught is None or step.tb_frame is not caught.tb_frame:
        return False
    instructions = step.tb_frame.f_code.co_code
    return 0 <= step.tb_lasti < len(instructions) and opcode.opname[instructions[step.tb_lasti]] == "RAISE_VARARGS"


def _steps(error: BaseException) -> Iterator[TracebackType]:
    """The traceback, innermost first."""
    steps: list[TracebackType] = []
    step: TracebackType | None = _slot(BaseException, "__traceback__", error)
    while step is not None:
        steps.append(step)
        step = step.tb_next
    return reversed(steps)


def _inner_functions(error: BaseException) -> list[tuple[str, str]]:
    """Module and name of the functions inside of the user's innermost one, innermost first."""
    functions = []
    for step in _steps(error):
        if not _in_library(step.tb_frame):
            break
        functions.append(_function(step.tb_frame))
    return functions


def _function(frame: FrameType) -> tuple[str, str]:
    module, name = dict.get(frame.f_globals, "__name__"), frame.f_code.co_name
    if isinstance(module, str):
        return module, name
    module, _, name = name.rpartition(".")  # Cython's frames have no globals, but their name is the full one
    return module, name


def _in_library(frame: FrameType) -> bool:
    path = frame.f_code.co_filename
    if not os.path.isabs(path):  # made by Cython, or by `exec`, or typed in
        file = dict.get(frame.f_globals, "__file__")
        if not isinstance(file, str):
            return dict.get(frame.f_globals, "__name__") != "__main__"
        path = file
    return path.startswith(_LIBRARIES) or any(part in path for part in _PACKAGES)


def _slot(owner: type, name: str, thing: object) -> Any:
    """A built-in attribute itself: a subclass may hide it behind a property, and that may raise."""
    return owner.__dict__[name].__get__(thing)


def _name(kind: type) -> str:
    module = _slot(type, "__module__", kind)
    name = _slot(type, "__qualname__", kind)
    return f"{module}.{name}" if isinstance(module, str) else str(name)


def _text(error: BaseException) -> str:
    """What it was made with; `str()` would call the user's `__str__`."""
    args = _slot(BaseException, "args", error)
    return args[0] if args and type(args[0]) is str else ""


def _look_up(frame: FrameType, variable: str) -> object:
    name, *attributes = variable.split(".")
    value = frame.f_locals.get(name)
    with contextlib.suppress(AttributeError, ValueError, RuntimeError):
        for attribute in attributes:
            value = getattr(value, attribute)
        return value
    return None


def _as_path(value: object) -> str | None:
    if type(value) in (io.FileIO, io.BufferedReader, io.TextIOWrapper):
        value = getattr(value, "name", None)
    if isinstance(value, (str, bytes, pathlib.PurePath)):
        return os.fsdecode(value) or None
    return None
