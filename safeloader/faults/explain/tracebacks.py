"""Follows the tracebacks in a log, line by line, and tells code from what programs say.

Several processes print at once, and their lines mix. So a traceback is not parsed as a unit: the frames since the
last header are remembered, whoever printed them, and an exception gets all of them. A few frames of another process
do no harm, because they are only asked whether a certain function is among them.

What it must tell apart, all of it real:

    Traceback (most recent call last):                           header
      File ".../numpy/lib/_npyio_impl.py", line 463, in load     frame
        raise EOFError("No data left in file")                   code: says the same words, and is no evidence
    EOFError: No data left in file                               exception
"""

from __future__ import annotations

import re
from collections import deque
from functools import lru_cache
from typing import Final, NamedTuple

from safeloader.faults.explain.model import Line, Place, Raised

_MAX_FRAMES: Final = 120
_MAX_TRACEBACK_LINES: Final = 1000
"""A header that no exception has followed by then was cut off."""

_CODE_INDENT: Final = 4

_HEADER: Final = "Traceback (most recent call last)"
_STACK: Final = "(most recent call first):"
_FRAME: Final = re.compile(r'File "(?P<path>[^"]+)", line (?P<line>\d+),? in (?P<function>\S+)')
_PREFIX: Final = re.compile(
    r"^(?:\[?(?:rank|default|trainer)?\d+\]?:\s?"  # torchrun, srun --label
    r"|[\w.-]+\s+\|\s"  # docker compose
    r"|\d{4}-\d\d-\d\dT[\d:.]+Z?\s(?:std(?:err|out)\s[FP]\s)?"  # Kubernetes
    r"|>\s)"  # a quotation
)
_NAME: Final = r"(?:[A-Za-z_]\w*\.)*"
_RAISED: Final = re.compile(rf"^(?P<kind>{_NAME}(?:[A-Z]\w*|error|timeout))(?::\s(?P<message>.*)|:?$)")
_CERTAIN: Final = re.compile(r"(?:Error|Exception|Interrupt|Failed|Missing|Exit|Empty|BadZipFile)$")
"""How the names of exceptions end: needed outside a traceback, where "Label: text" is anything."""
_CAUSED: Final = ("The above exception was the direct cause", "During handling of the above exception")
_MARKS: Final = re.compile(r"^[\s~^|]+$")
_INSTALLED: Final = re.compile(
    r"(?:site|dist)-packages|[/\\]lib(?:64)?[/\\]python|[/\\]Lib[/\\]|^<|\.pyx$|nnunetv2|batchgenerators|[/\\]safeloader[/\\]"
)

_PLACES: Final = (
    # Where a frame is enough to know the process. The first that fits counts: a worker's loader runs below `producer`.
    (Place.FEEDER, re.compile(r"queues\.py:_feed$")),
    (Place.RECEIVER, re.compile(r":results_loop$|:_pin_memory_loop$")),
    (Place.WORKER, re.compile(r":producer$|:generate_train_batch$|safeloader/pool/worker\.py")),
    (Place.TRAINER, re.compile(r":run_training$|:run_training_entry$|:perform_actual_validation$|/bin/nnUNet")),
    (
        Place.POOL,
        re.compile(r"multiprocessing[/\\](?:process\.py:_bootstrap|pool\.py:worker)$|:export_prediction_from_logits$"),
    ),
)


class _Frame(NamedTuple):
    """A frame: `path:function`, which process it can only be in, and where it is if it is the user's own code."""

    name: str
    place: Place
    code: str


class Tracebacks:
    """The state of what was read so far; `feed` each line."""

    def __init__(self) -> None:
        self._frames: deque[_Frame] = deque(maxlen=_MAX_FRAMES)
        self._joined = ""
        self._code = ""
        self._open = 0
        self._since_header = 0
        self._after_frame = ""
        self._last: Raised | None = None
        self._chained = False

    @property
    def frames(self) -> str:
        """The frames that what is said now may belong to, one `path:function` a line."""
        if not self._joined:
            self._joined = "\n".join(frame.name for frame in self._frames)
        return self._joined

    def feed(self, line: Line) -> Raised | bool:
        """Look at the next line.

        Returns:
            The exception that it names; True if it is something that a program says; False if it is a part of a
            traceback (a header, a frame or code), which says nothing by itself.
        """
        text = strip_prefix(line.text)
        after_frame, self._after_frame = self._after_frame, ""
        self._count()
        if _HEADER in text or _STACK in text:
            self._header()
            return False
        frame = _parsed(text) if 'File "' in text else None
        if frame is not None:
            self._frames.append(frame)
            self._joined = ""
            self._code = frame.code or self._code
            self._after_frame = _indent(line.text) or "unindented"
            return False
        raised = self._raised(line, text)
        if raised is not None:
            return raised
        if text.startswith(_CAUSED):
            self._chained = True
            return False
        indented = self._open > 0 and len(_indent(line.text)) >= _CODE_INDENT
        # Pasted text may have lost its indentation: then code follows its frame without any.
        code = after_frame == "unindented" or (after_frame != "" and _indent(line.text) != "")
        return not (code or indented or _MARKS.match(text))

    def _count(self) -> None:
        self._since_header += 1
        if self._since_header > _MAX_TRACEBACK_LINES:
            self._open = 0

    def _header(self) -> None:
        if self._open == 0:
            self._frames.clear()
            self._joined = ""
            self._code = ""
        self._open += 1
        self._since_header = 0

    def _raised(self, line: Line, text: str) -> Raised | None:
        found = _RAISED.match(text)
        if found is None:
            return None
        dotted = self._open > 0 and "." in found["kind"] and found["message"] is not None
        if not (dotted or _CERTAIN.search(found["kind"])):
            return None
        root = self._last.root or self._last if self._chained and self._last is not None else None
        raised = Raised(line=line, kind=found["kind"], place=self._place(), code=self._code, root=root)
        self._last, self._chained = raised, False
        self._open = max(0, self._open - 1)
        return raised

    def _place(self) -> Place:
        places = {frame.place for frame in self._frames}
        return next((place for place, _ in _PLACES if place in places), Place.ELSEWHERE)


@lru_cache(maxsize=4096)
def _parsed(text: str) -> _Frame | None:
    """The frame that a line names; the same ones come again and again."""
    found = _FRAME.search(text)
    if found is None:
        return None
    path, function = found["path"], found["function"]
    name = f"{path}:{function}"
    place = next((place for place, pattern in _PLACES if pattern.search(name)), Place.ELSEWHERE)
    own = function != "<module>" and not _INSTALLED.search(path)
    return _Frame(name, place, f"{path}, line {found['line']}, in {function}" if own else "")


def _indent(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def strip_prefix(text: str) -> str:
    """The line without what launchers put before it."""
    if text[:1].isalpha() and " | " not in text:
        return text
    prefix = _PREFIX.match(text)
    return text if prefix is None else text[prefix.end() :]
