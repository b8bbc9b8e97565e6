"""R10 and the rest of what an installation lacks."""

from __future__ import annotations

from typing import Final

from safeloader.faults.explain.model import Cause, Sign

CAUSES: Final = (
    Cause(
        key="spawn-platform",
        group="R10",
        title="Workers can't be started on this platform as the program expects",
        what=(
            "On Windows and macOS workers are not forked but import the main script anew. What it holds must be "
            "importable and picklable, and the script needs the guard `if __name__ == '__main__':`."
        ),
        remedy=(
            "In a script of your own, put what starts the training below `if __name__ == '__main__':`; define trainer, "
            "loader and transforms in a module, not in the script, a notebook or a function.",
            "Or train without workers to see whether the rest works: `nnUNet_n_proc_DA=0` (slow); or under Linux "
            "(WSL2).",
        ),
        safeloader="Outside Linux the stock loader runs, with its limits. On Linux SafeLoader needs no guard.",
        signs=(
            Sign("before the current process has finished its bootstrapping phase"),
            Sign("freeze_support()"),
            Sign("Can't pickle local object"),
            Sign("Can't get attribute", within=r"multiprocessing[/\\]spawn\.py"),
        ),
        sources=("pytorch#80802", "nnUNet#1437"),
    ),
    Cause(
        key="missing-module",
        group="",
        title="A Python package is missing or does not fit",
        what="An import failed, so the program did not start, or a worker could not.",
        remedy=(
            "Install it into the environment that runs nnU-Net: `python -m pip install PACKAGE` with the same `python` "
            "that `head -1 $(which nnUNetv2_train)` names.",
            "If it is installed and the import fails, its parts don't fit each other: `python -m pip check`.",
        ),
        safeloader="It fails with SafeLoader as well.",
        signs=(
            Sign("ModuleNotFoundError:"),
            Sign("ImportError:"),
            Sign("DLL load failed"),
            Sign("undefined symbol:"),
        ),
        unless=("compile-no-triton", "compile-no-libcuda"),
    ),
)
