"""The gauntlet's command."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from rich.console import Console

from safeloader.cli.command import signals_interrupt
from safeloader.cli.demo.processes import CommandProcess
from safeloader.nnunet.brain import DATASET_NAME, write_dataset
from safeloader.nnunet.kinds import KINDS, Kind, add_kinds
from safeloader.nnunet.workspace import Workspace
from tests.gauntlet.faults import FAULTS, Fault
from tests.gauntlet.outcome import Outcome, compare
from tests.gauntlet.table import show
from tests.gauntlet.training import run_kind

CASES: Final = 5
RESOLUTION_MM: Final = 6


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the gauntlet; 0 if every training came through it as if nothing had happened."""
    options = _parse(arguments)
    console = Console(highlight=False)
    kinds = [kind for kind in KINDS if kind.name in options.kinds]
    faults = [fault for fault in FAULTS if fault.name in options.faults]
    for fault in [fault for fault in faults if fault.impossible() is not None]:
        console.print(f"left out: {fault.name}: {fault.impossible()}")
        faults.remove(fault)
    began = time.monotonic()
    with signals_interrupt(), ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="safeloader-gauntlet-")))
        outcomes = _run(folder.resolve(), kinds, faults, options, console)
        if options.json is not None:
            options.json.write_text(json.dumps([o.to_dict() for o in outcomes], indent=2) + "\n", encoding="utf-8")
    show(outcomes, console)
    console.print(f"took {time.monotonic() - began:.0f} s")
    return 1 if any(outcome.differences for outcome in outcomes) else 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    names, fault_names = [kind.name for kind in KINDS], [fault.name for fault in FAULTS]
    parser = argparse.ArgumentParser("python -m tests.gauntlet", description=sys.modules["tests.gauntlet"].__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--kinds", nargs="+", choices=names, default=names, metavar="KIND", help=", ".join(names))
    parser.add_argument(
        "--faults", nargs="*", choices=fault_names, default=fault_names, metavar="FAULT", help=", ".join(fault_names)
    )
    parser.add_argument("--tiny", action="store_const", const=names[:1], dest="kinds", help=f"only {names[0]}")
    parser.add_argument("--folder", type=Path, help="a new folder where all is kept (default: nothing is)")
    parser.add_argument("--json", type=Path, help="write the outcome into this file")
    parser.add_argument("--seed", type=int, default=1, help="of batches and weights (default: %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.folder is not None and options.folder.exists() and any(options.folder.iterdir()):
        parser.error(f"--folder {options.folder} has files in it: name a new or empty one")
    return options


def _run(
    folder: Path, kinds: Sequence[Kind], faults: Sequence[type[Fault]], options: argparse.Namespace, console: Console
) -> list[Outcome]:
    console.print(f"nnU-Net plans and preprocesses {CASES} brains; then {', '.join(kind.name for kind in kinds)}")
    prepared = _prepare(folder, kinds)
    ended = threading.Event()
    outcomes: list[Outcome] = []
    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            runs = [
                [
                    pool.submit(
                        run_kind, kind, folder / f"{kind.name}-{title}", prepared, what, options.seed, ended.is_set
                    )
                    for title, what in (("undisturbed", ()), ("disturbed", faults))
                ]
                for kind in kinds
            ]
            for kind, (undisturbed, disturbed) in zip(kinds, runs, strict=True):
                for pair in zip(undisturbed.result(), disturbed.result(), strict=False):
                    outcomes.append(compare(kind.name, *pair))
                    well = "as if nothing had happened" if not outcomes[-1].differences else "NOT EQUAL"
                    console.print(f"{kind.name} ({pair[0].configuration}): {well}")
        finally:
            ended.set()
            pool.shutdown(cancel_futures=True)
    return outcomes


def _prepare(folder: Path, kinds: Sequence[Kind]) -> Workspace:
    # One process: each that nnU-Net spawns imports all of it first, which takes longer than its work on this dataset.
    workspace = Workspace(folder / "data", DATASET_NAME, processes=1)
    write_dataset(workspace.raw, cases=CASES, resolution_mm=RESOLUTION_MM)
    command = workspace.preprocess_command("2d", "3d_fullres")
    with CommandProcess(command, workspace.environment(), folder / "preprocess.log") as process:
        process.check()
    add_kinds(workspace, kinds, cases=CASES, resolution_mm=RESOLUTION_MM)
    return workspace


if __name__ == "__main__":
    sys.exit(main())
