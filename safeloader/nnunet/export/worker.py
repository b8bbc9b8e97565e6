"""An export process: does one job after another that the trainer gives it.

    receive Job(number) + memory file → decode (function, arguments) → call → encode the result → send Done
                                          └────────── any exception ────────► encode a Failure → send Failed

It is started by `process.py`, is tied to the trainer's life, shares no lock with anybody, and never returns.
"""

from __future__ import annotations

import os
import time
from typing import Any, NoReturn

from safeloader.faults.exits import ExitCode
from safeloader.nnunet.export.process import Failure, Kind, Link, Packet, private_view
from safeloader.pool import process
from safeloader.pool.failure import describe, format_remote
from safeloader.ring import codec
from safeloader.ring.memfile import MemoryFile


def main(link_fd: int, stacks_fd: int) -> NoReturn:
    """Work for the trainer at the other end of `link_fd` until it is gone. Stacks of a crash go into `stacks_fd`."""
    process.leave_interrupts_to_trainer()
    process.set_title("sl-export")
    process.raise_oom_score()
    process.leave_stacks(stacks_fd)
    link = Link.from_fd(link_fd)
    link.send(Packet(Kind.READY))
    while True:
        received = link.receive(wait=True)
        if received is None:
            os._exit(ExitCode.OK)
        packet, fd = received
        assert packet.kind is Kind.JOB and fd is not None, f"not for an export process: {packet}"
        answer, file = _do(packet.number, fd)
        try:
            link.send(answer, file.fd)
        except ConnectionError:
            os._exit(ExitCode.CHANNEL_LOST)
        finally:
            file.close()
            process.give_back_freed_memory()


def _do(number: int, fd: int) -> tuple[Packet, MemoryFile]:
    """Do one job, and close its memory file."""
    began = time.monotonic()
    kind = Kind.DONE
    answer: Any = None
    result = MemoryFile.create("safeloader-result")
    try:
        function, arguments = codec.decode(private_view(fd), number)
        answer = function(*arguments)
        del function, arguments
        codec.encode(answer, result, number, by_value=False)
    except BaseException as error:  # noqa: BLE001 - the process's outermost boundary: the trainer raises it
        kind = Kind.FAILED
        failure = Failure(*describe(error), format_remote(error), out_of_memory=isinstance(error, MemoryError))
        codec.encode(failure, result, number, by_value=False)
    finally:
        os.close(fd)
    return Packet(kind, number, time.monotonic() - began), result
