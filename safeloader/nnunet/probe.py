"""What importing torch, blosc2 and nnU-Net shows, step by step: for `safeloader doctor`, in a process of its own.

    python -m safeloader.nnunet.probe TRAINER [--deep]

Prints one JSON object a line, as soon as a step is done: `{"step": "torch", "version": …}`, or with "error". So a step
that crashes or hangs leaves what came before.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable
from typing import Any, Final, TextIO

from safeloader.nnunet.apart import answers


def torch_step() -> dict[str, Any]:
    """The build of torch, and the GPUs that it can use."""
    import torch

    found: dict[str, Any] = {
        "version": torch.__version__,
        "cuda": torch.version.cuda or torch.version.hip or "",
        "archs": [],
        "gpus": [],
        "refused": "",
    }
    if not found["cuda"]:
        return found
    found["archs"] = torch.cuda.get_arch_list()
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        found["refused"] = str(error).partition("\n")[0]
        return found
    found["cudnn"] = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        memory_nbytes = torch.cuda.get_device_properties(index).total_memory
        found["gpus"].append(
            {"name": torch.cuda.get_device_name(index), "capability": [major, minor], "memory_nbytes": memory_nbytes}
        )
    return found


def blosc2_step() -> dict[str, Any]:
    """The library that nnU-Net's preprocessed files are read with."""
    import blosc2

    return {"version": blosc2.__version__}


def trainer_step(name: str) -> dict[str, Any]:
    """Whether nnU-Net finds the trainer; its search prints, and imports each trainer on its way."""
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    found = recursive_find_trainer_class_by_name(name)
    return {"found": f"{found.__module__}.{found.__qualname__}"}


def compile_step() -> dict[str, Any]:
    """Compile a small function for the device that a training would use."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    compiled = torch.compile(lambda x: torch.nn.functional.leaky_relu(x * 2 + 1).sum())
    compiled(torch.ones(64, device=device, requires_grad=True)).backward()  # type: ignore[no-untyped-call]
    return {"device": device}


_FAILURES: Final = (
    ImportError,
    OSError,
    RuntimeError,
    AttributeError,
    ValueError,
    TypeError,
    AssertionError,
    SyntaxError,
    subprocess.SubprocessError,
)
"""What broken installations raise when they are imported."""


def main() -> None:
    """Take the steps, and say what each found."""
    parser = argparse.ArgumentParser()
    parser.add_argument("trainer")
    parser.add_argument("--deep", action="store_true")
    arguments = parser.parse_args()
    with answers() as lines:
        _take("torch", torch_step, lines)
        _take("blosc2", blosc2_step, lines)
        _take("trainer", lambda: trainer_step(arguments.trainer), lines)
        if arguments.deep:
            _take("compile", compile_step, lines)


def _take(name: str, step: Callable[[], dict[str, Any]], lines: TextIO) -> None:
    try:
        found = step()
    except _FAILURES as error:
        words = str(error).strip().splitlines()
        found = {"error": f"{type(error).__name__}: {words[0]}" if words else type(error).__name__}
    print(json.dumps({"step": name, **found}), file=lines, flush=True)


if __name__ == "__main__":
    main()
