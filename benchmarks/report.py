"""The report of all benchmarks, put together from what each has left: `NAME.json` and `NAME.png`.

Results may be of several machines, cards or days. The report names the machine that most of them come from, and each
benchmark whose machine, versions or commit are other ones says which. A benchmark without results is named, too.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.common import Table

Machine = Mapping[str, Any]

_LABELS: Final = {"cpu": "CPU", "cores": "cores", "memory_gib": "memory, GiB", "gpu": "GPU", "commit": "commit"}
"""What of a machine is not a version."""
_OF_ONE_RUN: Final = "load_at_the_end"
_ABOUT: Final = frozenset({"machine", "command", "sizes", "tables"})


@dataclass(frozen=True)
class Result:
    """What a benchmark has left.

    Attributes:
        name: of its module and its files.
        title: the first line of its docstring.
        about: its JSON file.
        picture: whether there is one.
    """

    name: str
    title: str
    about: Mapping[str, Any]
    picture: bool

    @property
    def machine(self) -> Machine:
        """Where it ran, without what differs in each run."""
        return {name: value for name, value in self.about["machine"].items() if name != _OF_ONE_RUN}


def found(folder: Path, titles: Mapping[str, str]) -> list[Result]:
    """The results in a folder, in the order of `titles`.

    A JSON file without a machine and tables is of an older version of the benchmark, and counts as none.
    """
    results = []
    for name, title in titles.items():
        path = folder / f"{name}.json"
        about = json.loads(path.read_text()) if path.exists() else {}
        if {"machine", "tables"} <= about.keys():
            results.append(Result(name, title, about, (folder / f"{name}.png").exists()))
    return results


def usual_machine(results: Sequence[Result]) -> Machine:
    """The machine, with versions and commit, that most results come from; of several, the first."""
    counts = Counter(json.dumps(result.machine) for result in results)
    usual: Machine = json.loads(counts.most_common(1)[0][0])
    return usual


def differences(machine: Machine, usual: Machine) -> dict[str, Any]:
    """What is another value than the usual one, or is only in one of the two (None, then)."""
    names = [*machine, *(name for name in usual if name not in machine)]
    return {name: machine.get(name) for name in names if machine.get(name) != usual.get(name)}


def markdown(results: Sequence[Result], titles: Mapping[str, str], tried: str | None = None) -> str:
    """The whole report.

    Args:
        results: in the order in which they are shown.
        titles: of all benchmarks by name: those without results are named.
        tried: markdown about what did not help.
    """
    parts = ["# Benchmarks", "Put together by `python -m benchmarks --report`. A loss is shown like a win."]
    if results:
        usual = usual_machine(results)
        parts += ["## Machine", _described(usual)]
        for result in results:
            parts += _section(result, usual)
    without = [f"{titles[name]} (`{name}`)" for name in titles if name not in {result.name for result in results}]
    if without:
        parts += ["## Not run", "\n".join(f"* {line}" for line in without)]
    if tried:
        parts += ["## What was tried and did not help", tried.strip()]
    return "\n\n".join(parts) + "\n"


def _described(machine: Machine) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in machine.items() if name not in _LABELS)
    lines = [f"* {label}: {_value(machine.get(name))}" for name, label in _LABELS.items()]
    return "\n".join([*lines, f"* versions: {versions}"])


def _section(result: Result, usual: Machine) -> list[str]:
    about = result.about
    sizes = ", ".join(f"{name} {value}" for name, value in about.get("sizes", {}).items())
    parts = [f"## {result.title}", f"`{about.get('command', f'python -m benchmarks.{result.name}')}` ({sizes})"]
    other = differences(result.machine, usual)
    if other:
        said = ", ".join(f"{_LABELS.get(name, name)} {_value(value)}" for name, value in other.items())
        parts.append(f"**Not as above:** {said}.")
    parts += [_table(table) for table in about["tables"]]
    if "remark" in about:  # written by hand: what a reader must know about this run
        parts.append(str(about["remark"]))
    also = [f"{name} {value}" for name, value in about.items() if name not in _ABOUT and isinstance(value, int | float)]
    if also:
        parts.append(f"Also: {', '.join(also)}.")
    if result.picture:
        parts.append(f"![{result.title}]({result.name}.png)")
    return parts


def _table(table: Mapping[str, Any]) -> str:
    lines = tuple(tuple(line) for line in table["lines"])
    return Table(table["title"], tuple(table["header"]), lines).markdown()


def _value(value: Any) -> str:
    return "none" if value is None else str(value)
