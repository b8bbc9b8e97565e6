r"""A log as lines, whatever wrote it: bounded memory, any encoding, no colours, no progress bars.

    bytes ─► chunks ─► lines at "\n" ─► pieces at "\r" and every 16 KiB ─► text without colours ─► Line

Line numbers count "\n" only, as `grep -n`, `less` and editors do: all pieces of a line carry its number.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from typing import BinaryIO, Final

from safeloader.errors import ConfigError
from safeloader.faults.explain.model import Line

_CHUNK_NBYTES: Final = 1 << 20
_PIECE_NBYTES: Final = 1 << 14
"""A longer piece is cut: what an error message says stands at its beginning."""
_SAMPLE_NBYTES: Final = 1 << 16
_MAX_CONTROL_SHARE: Final = 0.05
"""Of the sampled bytes that are neither text nor NUL; a text has none, a checkpoint about a tenth."""

_COLOUR: Final = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\-_]")
_CONTROL: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_CONTROL_BYTES: Final = bytes(set(range(32)) - {0, 7, 8, 9, 10, 12, 13, 27} | {127})

_PACKED: Final = {
    b"\x1f\x8b": "gzip: `zcat FILE | safeloader explain -`",
    b"BZh": "bzip2: `bzcat FILE | safeloader explain -`",
    b"\xfd7zXZ": "xz: `xzcat FILE | safeloader explain -`",
    b"\x28\xb5\x2f\xfd": "zstd: `zstdcat FILE | safeloader explain -`",
    b"PK\x03\x04": "a zip archive (checkpoints and .npz files are such); name the log inside or beside it",
}


def read_lines(stream: BinaryIO) -> Iterator[Line]:
    """The lines of a log.

    Args:
        stream: Opened for reading in binary; read once, in order.

    Raises:
        ConfigError: It is empty, compressed or not text.
        OSError: It can't be read.
    """
    number, rest = 1, b""
    for chunk in _chunks(stream):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if len(line) <= _PIECE_NBYTES and b"\r" not in line:
                yield Line(number, printable(line.decode("utf-8", "replace")))
            else:
                yield from _pieces(number, line)
            number += 1
        if len(rest) > _CHUNK_NBYTES:  # a line without end: a progress bar, or a dump
            yield from _pieces(number, rest)
            rest = b""
    if rest:
        yield from _pieces(number, rest)


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    """The log in UTF-8, or in what its bytes are: they are decoded line by line."""
    chunk = stream.read(_SAMPLE_NBYTES)
    wide = codecs.getincrementaldecoder("utf-16")("replace") if _is_utf16(chunk) else None
    while chunk:
        yield chunk if wide is None else wide.decode(chunk).encode()
        chunk = stream.read(_CHUNK_NBYTES)


def _pieces(number: int, line: bytes) -> Iterator[Line]:
    for piece in line.rstrip(b"\r").split(b"\r"):
        for start in range(0, max(1, len(piece)), _PIECE_NBYTES):
            yield Line(number, printable(piece[start : start + _PIECE_NBYTES].decode("utf-8", "replace")))


def printable(text: str) -> str:
    """A line without colours, control characters, and blanks at its end."""
    if text.isprintable():
        return text.rstrip()
    text = text.encode("utf-8", "replace").decode()  # JSON may hold halves of a character
    return _CONTROL.sub("", _COLOUR.sub("", text)).rstrip()


def _is_utf16(sample: bytes) -> bool:
    """Whether a log that begins with `sample` is UTF-16 (PowerShell's redirection writes it), and not bytes.

    Raises:
        ConfigError: It is empty, compressed or not text.
    """
    if not sample.strip(b"\0 \t\r\n"):
        raise ConfigError("is empty: nothing was written into it" if not sample else "has nothing but blanks in it")
    if sample.startswith((b"\xff\xfe", b"\xfe\xff")):
        return True
    for start, what in _PACKED.items():
        if sample.startswith(start):
            raise ConfigError(f"is packed, as {what}")
    # NUL bytes alone are no proof: a machine that crashes leaves holes in the files it was writing.
    control = len(sample) - len(sample.translate(None, _CONTROL_BYTES))
    if control > _MAX_CONTROL_SHARE * len(sample.replace(b"\0", b"")):
        raise ConfigError("is not a text file; give the console output, the Slurm output or the training log")
    return False
