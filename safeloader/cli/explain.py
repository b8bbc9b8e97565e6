"""`safeloader explain`: why a training failed, from the text that it left."""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, BinaryIO, Final

from safeloader.cli.command import Command, show
from safeloader.errors import ConfigError
from safeloader.faults.explain import explain
from safeloader.faults.explain.catalogue import page
from safeloader.faults.explain.incident_files import is_incidents, summarize
from safeloader.faults.explain.reader import read_lines
from safeloader.faults.explain.words import in_words, summary_in_words

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_HEAD_NBYTES: Final = 1 << 16


class Explain(Command):
    """Say why a training failed, from its log.

    Reads the console output of any nnU-Net training (with or without SafeLoader), the output of a Slurm job, nnU-Net's
    training_log_*.txt, or SafeLoader's safeloader_incidents.jsonl and safeloader_report.json. Says what went wrong
    first, the lines that show it, and what to do. The message "background workers are no longer alive" is printed
    after any failure and is never the cause; if it is all there is, the answer is what to look at next.

    Exit codes: 0 explained (or nothing went wrong), 1 it doesn't know, 2 the file can't be read.
    """

    name = "explain"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declare the file, or `--list`."""
        what = parser.add_mutually_exclusive_group(required=True)
        what.add_argument(
            "path", metavar="PATH", nargs="?", help="the file; - reads what is piped in, or pasted (end: Ctrl-D)"
        )
        what.add_argument("--list", action="store_true", help="print all that it knows, as Markdown")

    def run(self, arguments: argparse.Namespace) -> int:
        """Explain the file."""
        if arguments.list:
            show(page())
            return 0
        name = "stdin" if arguments.path == "-" else arguments.path
        try:
            with _opened(arguments.path) as stream:
                text, known = _explained(stream, name)
        except OSError as error:
            raise ConfigError(f"{name} can't be read: {error.strerror or error}") from error
        except ConfigError as error:
            raise ConfigError(f"{name} {error}") from error
        show(text)
        return 0 if known else 1


def _explained(file: BinaryIO, name: str) -> tuple[str, bool]:
    """The answer as text, and whether it is one."""
    head = file.read(_HEAD_NBYTES)
    stream = io.BufferedReader(_Resumed(head, file), _HEAD_NBYTES)
    if is_incidents(head):
        return summary_in_words(summarize(stream, head), name), True
    diagnosis = explain(read_lines(stream))
    return in_words(diagnosis, name), diagnosis.known


class _Resumed(io.RawIOBase):
    """A stream of which the beginning has been read, from its beginning: a pipe can't be rewound."""

    def __init__(self, head: bytes, rest: BinaryIO) -> None:
        self._head = head
        self._rest = rest

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        """Fill the buffer, first with what was read before."""
        view = memoryview(buffer)
        taken = self._head[: len(view)] or self._rest.read(len(view))
        self._head = self._head[len(taken) :]
        view[: len(taken)] = taken
        return len(taken)


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """The file, or stdin, which stays open."""
    if path == "-":
        yield sys.stdin.buffer
        return
    with open(path, "rb") as file:
        yield file
