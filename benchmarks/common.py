"""What all benchmarks share: how one is run, and what it leaves.

    python -m benchmarks.NAME [--tiny] [--rounds 5] [--out FOLDER] [its own sizes]

A benchmark says which cases there are (a contestant with a configuration) and how one is measured. Each measurement is
a fresh process, so nobody inherits another's warm caches or threads; the contestants take turns, so that a machine
that gets slower in between does so for all. What is left is `NAME.csv` (one `Row` each: its fields are the columns,
with units), `NAME.json` (machine, versions, commit, command, sizes, and the tables that were printed), and `NAME.png`,
drawn from the CSV alone. All three are written anew with each round, and the CSV file with each measurement: whoever
ends a benchmark early has what was measured until then.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar, get_type_hints

import psutil
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from safeloader.report.versions import versions_of

Size = int | float | str
RowT = TypeVar("RowT")

RESULTS = Path("benchmarks/results")
VERSIONS = ("torch", "numpy", "batchgenerators", "batchgeneratorsv2", "nnunetv2", "blosc2", "spdl_core", "ray")


@dataclass(frozen=True)
class Table:
    """What a person reads: cells are text already."""

    title: str
    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]

    def markdown(self) -> str:
        """As a table that is legible in a terminal, too."""
        widths = [max(len(line[column]) for line in (self.header, *self.lines)) for column in range(len(self.header))]

        def row(cells: Sequence[str]) -> str:
            return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

        rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
        return "\n".join([f"{self.title}\n", row(self.header), rule, *map(row, self.lines)])


class Benchmark(ABC, Generic[RowT]):
    """One benchmark; the module's docstring is its help.

    Attributes:
        name: of its module and its files.
        row: the dataclass of one measurement.
        full: its sizes by name; each is an option. `rounds` is among them.
        tiny: those that are smaller where only that it runs is of interest.
    """

    name: ClassVar[str]
    row: ClassVar[type[Any]]
    full: ClassVar[Mapping[str, Size]]
    tiny: ClassVar[Mapping[str, Size]]

    @abstractmethod
    def cases(self, sizes: Mapping[str, Any]) -> list[dict[str, Any]]:
        """What is measured in each round, in this order: the arguments of `measure`, ready for JSON.

        `rounds` among them is how many rounds this case has, if it is to have fewer than others, and no argument.
        """

    @abstractmethod
    def measure(self, number: int, **case: Any) -> list[RowT]:
        """One measurement, in this process; `number` is the round."""

    @abstractmethod
    def tables(self, rows: Sequence[RowT]) -> list[Table]:
        """What the rows say, for a person."""

    @abstractmethod
    def draw(self, rows: Sequence[RowT], figure: Figure) -> None:
        """The picture."""

    def missing(self) -> str | None:
        """Why it can't be run on this machine, or None."""
        return None

    def prepare(self, sizes: Mapping[str, Any]) -> None:
        """What all measurements need; once, before the first."""

    def more(self, sizes: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ARG002
        """What else belongs into the JSON file; measured once, after all rounds."""
        return {}

    # ---- running it ----

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run all rounds, print the tables, write the files."""
        parser = argparse.ArgumentParser(
            description=sys.modules[type(self).__module__].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        for size, default in self.full.items():
            parser.add_argument(f"--{size}", type=type(default), help=f"default: {default}")
        parser.add_argument("--tiny", action="store_true", help="smallest sizes: only to see that it runs")
        parser.add_argument("--out", type=Path, help=f"default: {RESULTS}; of --tiny, a new temporary folder")
        parser.add_argument("--one", help=argparse.SUPPRESS)
        arguments = parser.parse_args(argv)
        if arguments.one:
            print(json.dumps([asdict(row) for row in self.measure(**json.loads(arguments.one))]))  # type: ignore[call-overload]
            return 0
        missing = self.missing()
        if missing is not None:
            print(f"{self.name}: not run, {missing}")
            return 0
        defaults = {**self.full, **(self.tiny if arguments.tiny else {})}
        given = {size: getattr(arguments, size) for size in defaults}
        sizes = {size: default if given[size] is None else given[size] for size, default in defaults.items()}
        folder = arguments.out or default_folder(tiny=arguments.tiny)
        self.prepare(sizes)
        folder.mkdir(parents=True, exist_ok=True)
        rows: list[RowT] = []
        tables: list[Table] = []
        for number in range(int(sizes["rounds"])):
            self._measure_round(number, sizes, rows, folder)
            tables = self._publish(folder, rows, sizes, rounds=number + 1)
        for table in tables:
            print(f"\n{table.markdown()}")
        print(f"\n{folder / self.name}.csv, .json, .png")
        return 0

    def _measure_round(self, number: int, sizes: Mapping[str, Any], rows: list[RowT], folder: Path) -> None:
        for case in self.cases(sizes):
            if number >= case.pop("rounds", sizes["rounds"]):
                continue
            for found in _in_a_fresh_process(self.name, {"number": number, **case}):
                rows.append(self.row(**found))
                print(rows[-1], flush=True)
            with (folder / f"{self.name}.csv").open("w", newline="") as file:
                writer = csv.DictWriter(file, [field.name for field in fields(self.row)])
                writer.writeheader()
                writer.writerows(asdict(row) for row in rows)  # type: ignore[call-overload]

    def _publish(self, folder: Path, rows: Sequence[RowT], sizes: Mapping[str, Any], *, rounds: int) -> list[Table]:
        tables = self.tables(rows)
        measured = {**sizes, "rounds": rounds}
        about = {
            "machine": machine(),
            "command": command(self.name, measured, self.full),
            "sizes": measured,
            "tables": [asdict(table) for table in tables],
        }
        more = self.more(sizes) if rounds == sizes["rounds"] else {}
        (folder / f"{self.name}.json").write_text(json.dumps({**about, **more}, indent=2) + "\n")
        self.redraw(folder)
        return tables

    def redraw(self, folder: Path) -> None:
        """Draw the picture from the CSV file."""
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        FigureCanvasAgg(figure)
        self.draw(self.read(folder), figure)
        figure.savefig(folder / f"{self.name}.png", dpi=120)

    def read(self, folder: Path) -> list[RowT]:
        """The rows of a CSV file."""
        types = get_type_hints(self.row)
        with (folder / f"{self.name}.csv").open(newline="") as file:
            return [
                self.row(**{name: _parsed(text, types[name]) for name, text in line.items()})
                for line in csv.DictReader(file)
            ]


def default_folder(*, tiny: bool) -> Path:
    """Where results go: tiny ones never over those that are kept."""
    return Path(tempfile.mkdtemp(prefix="safeloader-benchmarks-")) if tiny else RESULTS


def command(benchmark: str, sizes: Mapping[str, Size], full: Mapping[str, Size]) -> str:
    """What measures the same again: the sizes that are not the usual ones are options."""
    options = [f" --{size} {shlex.quote(str(value))}" for size, value in sizes.items() if value != full[size]]
    return f"python -m benchmarks.{benchmark}{''.join(options)}"


def _parsed(text: str, kind: Any) -> Any:
    if kind in (int, float, str):
        return kind(text)
    return None if text == "" else float(text)  # float | None


def _in_a_fresh_process(benchmark: str, case: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Run `python -m benchmarks.BENCHMARK --one CASE`, whose last line is JSON; returns that.

    Raises:
        RuntimeError: it failed; with the end of what it wrote to stderr. (Of one that did not, stderr is dropped: the
            stock class's threads print tracebacks when it ends.)
    """
    command = [sys.executable, "-m", f"benchmarks.{benchmark}", "--one", json.dumps(case)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {ended.returncode}:\n{ended.stderr[-4000:]}")
    found: list[dict[str, Any]] = json.loads(ended.stdout.splitlines()[-1])
    return found


def median(rows: Sequence[Any], column: str, **which: Any) -> float:
    """The median of a column over the rows whose fields are as `which` says; NaN if there is none."""
    chosen = [row for row in rows if all(getattr(row, name) == value for name, value in which.items())]
    values = [float(value) for row in chosen if (value := getattr(row, column)) is not None]
    return statistics.median(values) if values else float("nan")


def times(value: float, stock: float) -> str:
    """`value` as a multiple of `stock`, where there is one."""
    return f"{value / stock:.2f} ×" if stock > 0 else "–"


def machine() -> dict[str, Any]:
    """What the figures belong to."""
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_at_the_end": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **versions_of(*VERSIONS),
        "commit": commit.stdout.strip() or None,
    }
