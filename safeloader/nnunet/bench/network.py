"""What the network takes: `steps` in a process of its own, which may be ended at any time.

A step of a large patch can take minutes on a CPU, or more memory than there is. In a process of its own both cost no
more than the answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import IO, Any, Final

from safeloader.nnunet.bench.measured import Network
from safeloader.nnunet.stock import Asked

_READY_S: Final = 300.0
"""Importing, building the network and making one batch, at the longest."""
_STEPS_S: Final = {True: 300.0, False: 60.0}
"""Steps with and without a GPU, at the longest: on a GPU the first one compiles."""
_LOOK_EVERY_S: Final = 0.2


class NetworkNotMeasuredError(Exception):
    """There is no number; the message says why."""


def measure_network(asked: Asked, seconds: float) -> Network:
    """Train a few steps for about so many seconds, on a GPU if there is one.

    Raises:
        NetworkNotMeasuredError: it failed.
    """
    order = json.dumps({"parent": os.getpid(), "seconds": seconds, "asked": asdict(asked)})
    command = [sys.executable, "-m", "safeloader.nnunet.bench.steps", order]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=errors, start_new_session=True
        )
        try:
            _wait(process, out, seconds)
        finally:
            # Its own session: what it started to compile ends with it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        return network_of(_lines(out), process.returncode, time.monotonic(), _text(errors))


def _wait(process: subprocess.Popen[bytes], out: IO[str], seconds: float) -> None:
    """Until it has ended, or its time is up."""
    started = time.monotonic()
    while True:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_LOOK_EVERY_S)
            return
        lines = _lines(out)
        if not lines:
            late = time.monotonic() > started + _READY_S
        else:
            late = time.monotonic() > lines[0]["ready"] + seconds + _STEPS_S[lines[0]["gpu"]]
        if late:
            return


def network_of(lines: Sequence[dict[str, Any]], exit_code: int, now: float, errors: str) -> Network:
    """What the process said, as the figure.

    Args:
        lines: its whole lines.
        exit_code: as `subprocess` has it, -9 also if it was ended for its time.
        now: when it ended.
        errors: what it wrote to stderr.

    Raises:
        NetworkNotMeasuredError: it was not ready, or failed.
    """
    if exit_code not in (0, -signal.SIGKILL):
        said = errors.strip().splitlines() or ["no message"]
        raise NetworkNotMeasuredError(f"a training step failed: {said[-1]}")
    if not lines:
        raise NetworkNotMeasuredError(f"it was not ready within {_READY_S:g} s, or was killed for its memory")
    ready, steps = lines[0], [line["step_s"] for line in lines[1:] if line["counts"]]
    about = {"device": ready["device"], "gpu": ready["gpu"]}
    if steps:
        return Network(per_s=len(steps) / sum(steps), steps=len(steps), **about)
    elapsed = now - ready["ready"]
    warm = [line["step_s"] for line in lines[1:]]
    if elapsed < _STEPS_S[ready["gpu"]]:
        raise NetworkNotMeasuredError(
            f"it was killed after {elapsed:.0f} s: perhaps memory does not suffice for a step"
        )
    if warm:
        return Network(per_s=len(warm) / sum(warm), steps=len(warm), **about)
    return Network(per_s=1 / elapsed, steps=0, at_most=True, **about)


def _lines(out: IO[str]) -> list[dict[str, Any]]:
    whole = _text(out).rpartition("\n")[0]
    return [json.loads(line) for line in whole.splitlines() if line.startswith("{")]


def _text(file: IO[str]) -> str:
    # pread, since the process writes where this descriptor stands.
    return os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0).decode("utf-8", "replace")
