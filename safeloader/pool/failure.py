"""The record of an exception in a worker: written into the ticket's slot there, turned into an error here."""

from __future__ import annotations

import pickle
import traceback
from dataclasses import dataclass
from typing import Final

import cloudpickle

from safeloader.errors import (
    BatchNotPicklableError,
    LoaderFinishedError,
    RemoteTraceback,
    SafeLoaderError,
    WorkerError,
)
from safeloader.faults.storage import ReadFailure
from safeloader.pool.events import Failure
from safeloader.pool.wire import MAX_TEXT_CHARS, clip
from safeloader.ring.status_page import Stage, words

_MAX_EXCEPTION_NBYTES: Final = 1 << 20
"""An exception object that pickles to more than this is described, not sent."""
_MAX_PART_CHARS: Final = MAX_TEXT_CHARS // 4
"""Longest frame or message in a remote traceback."""


@dataclass(frozen=True)
class FailureRecord:
    """What the trainer needs to raise a worker's exception. All plain text but `pickled`."""

    kind: str
    text: str
    traceback: str
    stage: Stage
    cases: tuple[str, ...]
    place: str
    read: str | None
    pid: int
    worker: int
    incarnation: int
    unpicklable_path: str | None = None
    pickled: bytes | None = None

    @property
    def case(self) -> str | None:
        """The cases in hand, for a person; None if they are not known."""
        return words(self.cases)

    @property
    def ended(self) -> bool:
        """Whether the loader has come to its end: it is finite."""
        return self.kind == "StopIteration" and self.stage is Stage.LOADING

    @property
    def failure(self) -> Failure:
        """As the machine is told."""
        culprit = self.cases[0] if len(self.cases) == 1 and self.stage is not Stage.ENCODING else None
        return Failure(
            place=self.place,
            case=culprit,
            reading=self.read is not None,
            broken=self.read == ReadFailure.CONTENT,
            final=self.ended or self.unpicklable_path is not None,
        )

    @property
    def summary(self) -> str:
        """The exception in one line."""
        first = self.text.strip().splitlines()[0] if self.text.strip() else ""
        return f"{self.kind}: {first[:500]}" if first else self.kind


def describe(error: BaseException) -> tuple[str, str]:
    """An exception's type and text, in one line each; its `__str__` may itself raise."""
    kind = type(error).__name__
    if type(error).__module__ not in ("builtins", "__main__"):
        kind = f"{type(error).__module__}.{kind}"
    try:
        text = str(error)
        return kind, text if len(text) <= MAX_TEXT_CHARS else f"{text[:MAX_TEXT_CHARS]} […]"
    except BaseException as second:  # noqa: BLE001 - a user's __str__ may raise anything
        return kind, f"(its __str__ raised {type(second).__name__})"


def format_remote(error: BaseException) -> str:
    """The traceback as Python would print it; a huge message is shortened, so that the frames are kept."""
    return clip("".join(clip(part, _MAX_PART_CHARS) for part in traceback.format_exception(error)))


def pickle_exception(error: BaseException) -> bytes | None:
    """The exception object, if it survives a round trip and is not huge."""
    try:
        pickled = cloudpickle.dumps(error)
        if len(pickled) > _MAX_EXCEPTION_NBYTES:
            return None
        pickle.loads(pickled)
    except Exception:  # noqa: BLE001 - a user's __reduce__ may raise anything
        return None
    assert isinstance(pickled, bytes)
    return pickled


def to_error(record: FailureRecord, ticket: int, pool: str) -> SafeLoaderError:
    """The error that `next()` raises for this record; the remote traceback is its `__cause__`."""
    error: SafeLoaderError
    where = f"worker {pool}-{record.worker} (pid {record.pid}) while {record.stage.word} the batch of ticket {ticket}"
    if record.case:
        where += f" (case {record.case})"
    if record.ended:
        error = LoaderFinishedError(
            f"the loader of pool {pool!r} came to its end at ticket {ticket}: SafeAugmenter takes infinite loaders "
            "only (batchgenerators' DataLoader: infinite=True). For finite epochs use SafeMultiThreadedAugmenter."
        )
    else:
        unpicklable = record.unpicklable_path is not None
        message = f"{record.summary}, raised in {where}."
        if unpicklable:
            message = (
                f"{record.unpicklable_path} can't be sent to the trainer: {record.summary}. It comes from {where}; "
                "return something that pickle can handle there."
            )
        error = (BatchNotPicklableError if unpicklable else WorkerError)(
            message,
            exception=pickle.loads(record.pickled) if record.pickled is not None else None,
            exception_type=record.kind,
            ticket=ticket,
            stage=record.stage.word,
            case=record.case,
            worker=record.worker,
            pid=record.pid,
            incarnation=record.incarnation,
        )
    error.__cause__ = RemoteTraceback(record.traceback)
    return error
