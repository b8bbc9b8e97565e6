"""Processes to which a command leaves what may crash or hang: `python -m safeloader.…`, answering in lines of JSON."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import safeloader


def command(module: str, *arguments: str) -> list[str]:
    """What starts a module of ours, in this Python."""
    return [sys.executable, "-m", module, *arguments]


def environment(**more: str) -> dict[str, str]:
    """This process's, in which this very SafeLoader is found, installed or not; and `more`."""
    package = str(Path(safeloader.__file__).parents[1])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path, **more}


@contextmanager
def answers() -> Iterator[TextIO]:
    """In such a process: stdout, for our lines alone. What others print (nnU-Net does on import) goes to stderr."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as lines:
        os.dup2(2, 1)
        yield lines
