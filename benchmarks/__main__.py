"""Run all benchmarks, each in a process of its own, and put their results together in one report.

    python -m benchmarks [--tiny] [--only transport,memory] [--out FOLDER]   # hours; with --tiny, minutes
    python -m benchmarks --report [--out FOLDER]                             # only the report, from what is there

One that fails does not stop the others; it is named at the end, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import importlib
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks import BENCHMARKS
from benchmarks.common import RESULTS, default_folder
from benchmarks.report import found, markdown

REPORT = "REPORT.md"
_TRIED = Path(__file__).with_name("tried.md")


def main(argv: Sequence[str] | None = None) -> int:
    """Run and report; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="smallest sizes: only to see that all run")
    parser.add_argument("--only", type=_names, default=BENCHMARKS, help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS}; of --tiny, a new temporary folder")
    arguments = parser.parse_args(argv)
    folder = arguments.out or default_folder(tiny=arguments.tiny)
    failed = [] if arguments.report else run_all(arguments.only, folder, tiny=arguments.tiny)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).write_text(report(folder))
    print(f"\n{folder / REPORT}")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def run_all(names: Iterable[str], folder: Path, *, tiny: bool) -> list[str]:
    """Run each in a process of its own; returns those that failed."""
    failed = []
    for name in names:
        print(f"\n==== {name}", flush=True)
        command = [sys.executable, "-m", f"benchmarks.{name}", "--out", str(folder), *(["--tiny"] if tiny else [])]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    return failed


def report(folder: Path) -> str:
    """The report of what is in a folder."""
    titles = {name: _title(name) for name in BENCHMARKS}
    return markdown(found(folder, titles), titles, _TRIED.read_text() if _TRIED.exists() else None)


def _title(name: str) -> str:
    docstring = importlib.import_module(f"benchmarks.{name}").__doc__ or name
    return docstring.strip().splitlines()[0].rstrip(".")


def _names(text: str) -> tuple[str, ...]:
    chosen = tuple(text.split(","))
    unknown = [name for name in chosen if name not in BENCHMARKS]
    if unknown:
        raise argparse.ArgumentTypeError(f"there is no {', '.join(unknown)}, only {', '.join(BENCHMARKS)}")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
