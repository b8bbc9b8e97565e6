"""Every error that SafeLoader raises, each with its evidence as attributes.

All of them are `RuntimeError`s, because that is what the stock augmenter raises: code that catches the stock
error catches ours. A message says what happened, the evidence, and what to do; it never guesses without saying so.

    SafeLoaderError
    ├── ConfigError            bad arguments or environment variables (also a ValueError)
    ├── ClosedError            next() after close()
    ├── ForkedError            the augmenter is used in a process forked from the one that made it
    ├── LoaderFinishedError    a finite loader has come to its end
    ├── WorkerError            loader or transform raised a Python exception in a worker
    │   └── BatchNotPicklableError   the batch can't be sent to the trainer
    ├── StartError             a loader that no worker can start with
    ├── RestartLimitError      workers die again and again without delivering a batch
    ├── BadCaseError           a case fails again and again, and on_bad_case="raise"
    │   └── QuarantineLimitError     more cases fail than may be quarantined
    ├── OutageError            storage has failed for longer than outage_timeout_s
    ├── CheckpointError        a checkpoint's file is damaged, and no other may take its place
    ├── ExportError            predictions of nnU-Net's validation could not be exported
    └── InternalError          a fault of SafeLoader itself
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from safeloader.faults.incident import Incident


class SafeLoaderError(RuntimeError):
    """Base class of everything that SafeLoader raises. Each survives pickling, with its evidence."""

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.args), self.__dict__


def _rebuild(kind: type[SafeLoaderError], args: tuple[object, ...]) -> SafeLoaderError:
    return kind.__new__(kind, *args)


class ConfigError(SafeLoaderError, ValueError):
    """An argument, option or environment variable has a value that can't work."""


class ClosedError(SafeLoaderError):
    """The augmenter was closed and is used again."""


class ForkedError(SafeLoaderError):
    """The augmenter is used in a child that was forked from the process that made it."""


class LoaderFinishedError(SafeLoaderError):
    """The loader raised `StopIteration`: it is finite, and `SafeAugmenter` is for infinite ones."""


class RemoteTraceback(Exception):  # noqa: N818 - shown as a cause, never raised by itself
    """The traceback of a worker as text; the `__cause__` of the error that the trainer raises.

    Attributes:
        text: the formatted traceback, as Python would have printed it in the worker.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f"\n\n{self.text}"


class WorkerError(SafeLoaderError):
    """The loader or the transform raised a Python exception in a worker.

    The remote traceback is the `__cause__`.

    Attributes:
        exception: the worker's own exception object, or None if it can't be pickled.
        exception_type: its type, as `module.Name`.
        ticket: the batch's place in the stream.
        stage: what the worker was doing, for example "loading" or "transforming".
        case: the sample's identifier, where known.
        worker: the worker's index. pid: its process id. incarnation: which life of the worker.
    """

    def __init__(
        self,
        message: str,
        *,
        exception: BaseException | None,
        exception_type: str,
        ticket: int,
        stage: str,
        case: str | None,
        worker: int,
        pid: int,
        incarnation: int,
    ) -> None:
        super().__init__(message)
        self.exception = exception
        self.exception_type = exception_type
        self.ticket = ticket
        self.stage = stage
        self.case = case
        self.worker = worker
        self.pid = pid
        self.incarnation = incarnation


class BatchNotPicklableError(WorkerError):
    """The batch holds something that can't be pickled; the message names its path in the batch."""


class StartError(SafeLoaderError):
    """No worker can start with this loader: it can't be unpickled, or its start raises.

    The remote traceback is the `__cause__`.
    """


class RestartLimitError(SafeLoaderError):
    """Workers died more often than the restart intensity allows, with no batch delivered in between.

    Attributes:
        incidents: the deaths that led here, oldest first.
    """

    def __init__(self, message: str, incidents: tuple[Incident, ...]) -> None:
        super().__init__(message)
        self.incidents = incidents


class BadCaseError(SafeLoaderError):
    """A case has cost two workers, or can't be read, and it is not to be quarantined.

    Attributes:
        case: its identifier.
        incidents: what led here, oldest first.
    """

    def __init__(self, message: str, case: str | None, incidents: tuple[Incident, ...]) -> None:
        super().__init__(message)
        self.case = case
        self.incidents = incidents


class QuarantineLimitError(BadCaseError):
    """More cases fail than may be quarantined: the dataset is broken, or the machine is."""


class OutageError(SafeLoaderError):
    """The data could not be read for longer than `outage_timeout_s`.

    Attributes:
        incidents: what led here, oldest first.
    """

    def __init__(self, message: str, incidents: tuple[Incident, ...]) -> None:
        super().__init__(message)
        self.incidents = incidents


class CheckpointError(SafeLoaderError):
    """A checkpoint can't be loaded because its file is damaged; `path` is the file."""

    def __init__(self, message: str, path: Path) -> None:
        super().__init__(message)
        self.path = path


class ExportError(SafeLoaderError):
    """Exports or evaluations of nnU-Net's validation failed; all others were done before this is raised.

    The first one's remote traceback is the `__cause__`, if it was an exception.

    Attributes:
        cases: the cases that are missing.
    """

    def __init__(self, message: str, cases: tuple[str, ...]) -> None:
        super().__init__(message)
        self.cases = cases


class InternalError(SafeLoaderError):
    """SafeLoader's own supervisor failed: a bug, to be reported with the traceback that is the cause."""
