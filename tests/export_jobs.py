"""What the tests let export processes do: importable there by name, with parameters named as nnU-Net names them."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any, NoReturn

import torch

from safeloader.testing import Orders


def kill_self(number: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), number)


def crash() -> None:
    kill_self(signal.SIGSEGV)


def stop() -> None:
    kill_self(signal.SIGSTOP)


def run_out_of_disk() -> NoReturn:
    raise OSError(28, "No space left on device")


def run_out_of_memory() -> NoReturn:
    raise MemoryError("Unable to allocate 12.0 GiB")


DEEDS = {
    "kill": kill_self,
    "crash": crash,
    "stop": stop,
    "disk full": run_out_of_disk,
    "no memory": run_out_of_memory,
}


def orders(folder: Path) -> Orders:
    """What `export` obeys when it has written half of a file; the stage is the case's name."""
    return Orders(folder / "orders", DEEDS)


def export(
    prediction: torch.Tensor,
    properties_dict: dict[str, Any],
    given: Orders,
    output_file_truncated: str,
    save_probabilities: bool = False,
    num_threads_torch: int = 8,
) -> tuple[int, int]:
    """Write the prediction's sum, in two halves; who did it, and with how many threads."""
    began = time.monotonic()
    text = f"{prediction.sum().item():.0f}"
    prediction[:] = -1  # as exports may
    with open(output_file_truncated + ".txt", "w", encoding="utf-8") as file:
        file.write(text[:2])
        file.flush()
        given.obey(os.path.basename(output_file_truncated))
        file.write(text[2:])
    with (given.folder.parent / "times.jsonl").open("a", encoding="utf-8") as log:
        log.write(json.dumps([os.path.basename(output_file_truncated), began, time.monotonic()]) + "\n")
    return os.getpid(), num_threads_torch


def evaluate(prediction_file: str, given: Orders) -> str:
    given.obey(os.path.basename(prediction_file))
    return Path(prediction_file).read_text()


def pid_of(_: object) -> int:
    return os.getpid()


def sleep_for_ever(mark: str) -> None:
    Path(mark).write_text(str(os.getpid()))
    signal.pause()
