"""Lines that follow from any failure. The first of them is the most famous message of nnU-Net, and never the cause."""

from __future__ import annotations

from typing import Final

from safeloader.faults.explain.model import Echo, Sign

_BETWEEN: Final = r":rebuild_storage|resource_sharer|multiprocessing[/\\](?:connection|queues|managers)\.py"
"""Frames of one process that talks to another."""

ECHOES: Final = (
    Echo(
        key="workers-no-longer-alive",
        of="is printed after any failure, also of the training process itself",
        signs=(
            Sign("One or more background workers are no longer alive"),
            Sign("Abort event was set. So someone died"),
            Sign("abort_event was set, something went wrong"),
        ),
    ),
    Echo(
        key="broken-connection",
        of="follows from the end of the process at the other end",
        signs=(
            Sign("ConnectionResetError", within=rf"{_BETWEEN}|\A\Z"),
            Sign("ConnectionRefusedError", within=rf"{_BETWEEN}|\A\Z"),
            Sign("BrokenPipeError", within=rf"{_BETWEEN}|\A\Z"),
            Sign("EOFError", within=_BETWEEN),
            Sign("FileNotFoundError", within=_BETWEEN),
            Sign("OSError: handle is closed"),
        ),
    ),
    Echo(
        key="teardown",
        of="is printed while the processes end",
        signs=(
            Sign("KeyboardInterrupt"),
            Sign("SystemExit"),
            Sign("Exception ignored in"),
            Sign("can only join a started process"),
            Sign("'NoneType' object has no attribute 'terminate'"),
            Sign("'NoneType' object has no attribute 'is_alive'"),
            Sign("leaked semaphore"),
            Sign("queue.Empty"),
        ),
    ),
    Echo(
        key="rethrown",
        of="repeats an exception of another process",
        signs=(
            Sign("ProcessRaisedException"),
            Sign("ProcessExitedException"),
            Sign("ChildFailedError"),
            Sign("RemoteTraceback"),
            Sign("WorkerError: "),
        ),
    ),
)
