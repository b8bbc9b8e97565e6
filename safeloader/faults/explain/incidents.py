"""SafeLoader's incidents, counted by cause, with what to do about the most frequent. Pure; see `incident_files.py`.

It takes whatever keys the records have: those of an older or newer SafeLoader are summed up as well.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from safeloader.faults.exits import ProcessExit
from safeloader.faults.explain import explain_text
from safeloader.faults.explain.causes import BY_KEY
from safeloader.faults.explain.model import Answer, Cause, Weight
from safeloader.faults.explain.reader import printable

Record = Mapping[str, Any]

_MAX_GROUPS: Final = 500
_TAIL_LINES: Final = 6
_REACTIONS: Final = ("quarantine", "redraw", "degrade", "recovery", "recycle", "outage-over")
"""Kinds that are no failures but what SafeLoader did about them."""
_TITLES: Final = {
    "oom-kill": "killed by the kernel, because memory ran out",
    "worker-hang": "no progress, replaced by the watchdog",
    "outage": "many cases could not be read at once",
    "start-failed": "no worker could start",
}
_CAUSES: Final = {"oom-kill": "out-of-memory", "worker-hang": "hang", "outage": "storage-failed"}
_EXCEPTION: Final = re.compile(r"((?:\w+\.)*\w*(?:Error|Exception|Interrupt|BadZipFile))\b")


@dataclass
class Group:
    """The incidents of one cause.

    Attributes:
        title: What happened, in a few words.
        count: How often.
        cases, stages, pools: How often each is named.
        example: The record with the most evidence; the later of two.
    """

    title: str
    count: int = 0
    cases: Counter[str] = field(default_factory=Counter)
    stages: Counter[str] = field(default_factory=Counter)
    pools: Counter[str] = field(default_factory=Counter)
    example: Record = field(default_factory=dict)

    def add(self, record: Record) -> None:
        """Count one incident."""
        self.count += 1
        self.cases.update(name for name in text_of(record, "case").split(", ") if name)
        self.stages.update(filter(None, [text_of(record, "stage")]))
        self.pools.update(filter(None, [text_of(record, "pool")]))
        if _evidence_of(record) >= _evidence_of(self.example):
            self.example = record

    @property
    def message(self) -> str:
        """The example's message."""
        return text_of(self.example, "message") or text_of(self.example, "cause") or self.title

    @property
    def tail(self) -> tuple[str, ...]:
        """The end of what the process wrote to stderr, else of its stacks."""
        said = text_of(self.example, "stderr_tail") or text_of(self.example, "stacks")
        return tuple(line for line in said.splitlines() if line.strip())[-_TAIL_LINES:]

    @property
    def known_as(self) -> Cause | None:
        """The known cause that this is, by what the process wrote, else by the kind of incident."""
        said = "\n".join(text_of(self.example, key) for key in ("cause", "stderr_tail", "stacks"))
        found = explain_text(said).primary
        if found.cause.answer is Answer.KNOWN and found.weight is Weight.DECISIVE:
            return found.cause
        return BY_KEY.get(_CAUSES.get(text_of(self.example, "kind"), ""))

    @property
    def todo(self) -> tuple[str, ...]:
        """What to do about it, the incident's own advice first."""
        advice = text_of(self.example, "advice") or ProcessExit(signal=text_of(self.example, "signal") or None).advice
        known = self.known_as
        steps = [f"{advice[0].upper()}{advice[1:]}."] if advice else []
        return (*steps, *(known.remedy if known is not None else ()))


@dataclass(frozen=True)
class Summary:
    """What a file of incidents says.

    Attributes:
        groups: Failures by cause, most frequent first.
        reactions: What SafeLoader did about them, by kind.
        first, last: Times of the first and last record, as written.
        skipped: Lines that hold no whole record.
        outcome: How the training ended, if the file is a report.
    """

    groups: tuple[Group, ...]
    reactions: Counter[str]
    first: str
    last: str
    skipped: int = 0
    outcome: str = ""

    @property
    def total(self) -> int:
        """How many failures there were."""
        return sum(group.count for group in self.groups)


def sum_up(records: Iterable[Record]) -> Summary:
    """Count the records of incidents, given in the order in which they happened."""
    groups: dict[str, Group] = {}
    reactions: Counter[str] = Counter()
    times = ["", ""]
    for record in records:
        at = text_of(record, "at")
        times = [times[0] or at, at or times[1]]
        if record.get("kind") in _REACTIONS:
            reactions[text_of(record, "kind")] += 1
            continue
        title = _title(record)
        if title not in groups and len(groups) >= _MAX_GROUPS:
            title = "others"
        groups.setdefault(title, Group(title)).add(record)
    ordered = sorted(groups.values(), key=lambda group: -group.count)
    return Summary(tuple(ordered), reactions, first=times[0], last=times[1])


def _title(record: Record) -> str:
    """What incidents of one cause have in common."""
    kind = text_of(record, "kind") or "incident"
    if kind in _TITLES:
        return _TITLES[kind]
    signal, code, said = text_of(record, "signal"), record.get("exit_code"), text_of(record, "cause")
    if kind == "worker-error":
        exception = _EXCEPTION.search(said) or _EXCEPTION.search(text_of(record, "message"))
        return f"an exception in a worker: {exception[1]}" if exception else "an exception in a worker"
    who = {"worker-death": "worker", "nursery-death": "nursery"}.get(kind, kind)
    if signal:
        return f"{who} killed by {signal}"
    if isinstance(code, int):
        return f"{who} exited with code {code}"
    return f"{who}: {re.sub(r'[0-9]+', '#', said)[:100]}" if said else f"{who} ended, nobody knows how"


def _evidence_of(record: Record) -> int:
    return sum(bool(record.get(key)) for key in ("stderr_tail", "stacks", "advice", "message", "case"))


def text_of(record: Record, key: str) -> str:
    """A record's value as text, whatever it is: "" for what is not there, lines for a list."""
    value = record.get(key)
    if isinstance(value, (list, tuple)):
        value = "\n".join(str(part) for part in value)
    elif isinstance(value, dict):
        value = "\n".join(f"{name}:\n{part}" for name, part in value.items())
    return "" if value is None else "\n".join(printable(line) for line in str(value).splitlines())
