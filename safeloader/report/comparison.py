"""Two audits compared: the first ticket that differs, and how.

    file ─► index: ticket → (checksum, offset of its last line) ─┬─► the first ticket that differs ─► both its lines
    file ─► index ───────────────────────────────────────────────┘

An index holds about 250 bytes per ticket, whatever the lines hold; lines are read again only where two differ. It
does not cover how audits are written (`report.audit`), nor the words for what was found (`cli.audit`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from safeloader.errors import ConfigError
from safeloader.report.audit import FORMAT

_MAX_LINE_NBYTES: Final = 4 << 20
"""No line of ours is longer; a file that is none of ours may be one single line."""
_LOOK_NBYTES: Final = 64 << 20
"""If there is no line of an audit up to here, there won't be one."""


class _Place(NamedTuple):
    checksum: bytes
    offset: int


@dataclass
class Recording:
    """An audit, read once.

    Attributes:
        path: the file.
        headers: one per start of a pool, oldest first.
        tickets: the checksum of each, and where its last line begins.
        left_out: lines that the file says it does not have. cut: lines that are not whole.
        repeats: tickets that stand there again. disagreeing: those of which an earlier line says otherwise.
    """

    path: Path
    headers: list[dict[str, Any]] = field(default_factory=list)
    tickets: dict[int, _Place] = field(default_factory=dict)
    left_out: int = 0
    cut: int = 0
    repeats: int = 0
    disagreeing: set[int] = field(default_factory=set)

    @property
    def streams(self) -> dict[tuple[Any, Any], None]:
        """All (seed, stream) that it was written for, each once, oldest first."""
        return dict.fromkeys((str(header.get("seed")), str(header.get("stream"))) for header in self.headers)

    def of(self, key: str) -> Any:
        """What the last header says."""
        return self.headers[-1].get(key) if self.headers else None

    def line(self, ticket: int) -> dict[str, Any]:
        """The last line about this ticket."""
        with self.path.open("rb") as file:
            file.seek(self.tickets[ticket].offset)
            line = json.loads(file.readline())
        assert isinstance(line, dict)
        return line


def read(path: Path) -> Recording:
    """Index an audit.

    Raises:
        OSError: it can't be read.
        ConfigError: it is none, or one of a later version.
    """
    recording = Recording(path)
    for offset, line in _lines(path):
        record = _record(line)
        if record is None:
            recording.cut += 1
        else:
            _add(recording, record, offset)
        if offset > _LOOK_NBYTES and not recording.headers and not recording.tickets:
            break
    if not recording.headers and not recording.tickets:
        raise ConfigError(
            f"{path} holds no line of an audit: name a safeloader_audit_<pool>.jsonl, which a training with "
            "SAFELOADER_AUDIT=1 writes, or the folder that holds it"
        )
    return recording


def _add(recording: Recording, record: dict[str, Any], offset: int) -> None:
    left_out = record.get("records_left_out")
    recording.left_out += left_out if isinstance(left_out, int) else 0
    if "audit" in record:
        if record["audit"] != FORMAT:
            raise ConfigError(
                f"{recording.path} is an audit of format {record['audit']}, and this SafeLoader reads format {FORMAT}: "
                "compare with the version that wrote it"
            )
        recording.headers.append(record)
        return
    ticket = record.get("ticket")
    if not isinstance(ticket, int):
        return
    checksum = bytes.fromhex(record["checksum"])
    before = recording.tickets.get(ticket)
    if before is not None:
        recording.repeats += 1
        if before.checksum != checksum:
            recording.disagreeing.add(ticket)
    recording.tickets[ticket] = _Place(checksum, offset)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Where each line begins, and the line; one that is too long comes in pieces."""
    with path.open("rb") as file:
        offset = 0
        while line := file.readline(_MAX_LINE_NBYTES):
            if line.strip():
                yield offset, line
            offset += len(line)


def _record(line: bytes) -> dict[str, Any] | None:
    """A line as a record; None if it is no whole one."""
    try:
        record = json.loads(line)
        if isinstance(record, dict) and "ticket" in record:
            bytes.fromhex(record["checksum"])
    except (ValueError, RecursionError, KeyError, TypeError):
        return None
    return record if isinstance(record, dict) else None


# ---- two of them ----


@dataclass(frozen=True)
class Difference:
    """The first ticket that differs.

    Attributes:
        ticket: which.
        a: its line in the one; None if it is missing there. b: in the other.
        before: how many tickets before it are the same.
        all_in_all: how many tickets that both have differ.
    """

    ticket: int
    a: dict[str, Any] | None
    b: dict[str, Any] | None
    before: int
    all_in_all: int

    @property
    def same_cases(self) -> bool:
        """Whether both lines name the same cases in the same order."""
        return self.a is not None and self.b is not None and self.a.get("cases") == self.b.get("cases")

    def parts(self) -> tuple[list[str], list[str]]:
        """The parts that differ (or that only one has), and those that are the same."""
        a, b = (_parts(line) for line in (self.a, self.b))
        names = list(dict.fromkeys([*a, *b]))
        differ = [name for name in names if a.get(name) != b.get(name)]
        return differ, [name for name in names if name not in differ]


@dataclass(frozen=True)
class Comparison:
    """What two audits of a pool say of each other.

    Attributes:
        a: the one. b: the other.
        same: how many tickets are the same in both.
        first: the first that differs; None if none does.
        unrecorded: tickets that only one of them has, because the other had to leave lines out.
    """

    a: Recording
    b: Recording
    same: int
    first: Difference | None
    unrecorded: int

    @property
    def one_stream(self) -> bool:
        """Whether both are of the same stream of the same root seed, as far as their headers say."""
        if not (self.a.headers and self.b.headers):
            return True
        return all(self.a.of(key) == self.b.of(key) for key in ("seed", "stream"))

    @property
    def agree(self) -> bool:
        """Whether every ticket is in both, and the same."""
        return self.first is None and self.unrecorded == 0 and self.one_stream


def compare(a: Recording, b: Recording) -> Comparison:
    """Compare two audits, each ticket by its last line.

    Raises:
        OSError: a file can't be read again.
    """
    both = a.tickets.keys() & b.tickets.keys()
    other = {ticket for ticket in both if a.tickets[ticket].checksum != b.tickets[ticket].checksum}
    differing, unrecorded = set(other), 0
    for there, not_there in ((a, b), (b, a)):
        missing = there.tickets.keys() - not_there.tickets.keys()
        if len(missing) > not_there.left_out:
            differing |= missing
        else:
            unrecorded += len(missing)
    same, first = len(both) - len(other), None
    if differing:
        ticket = min(differing)
        lines = [recording.line(ticket) if ticket in recording.tickets else None for recording in (a, b)]
        before = sum(earlier < ticket for earlier in both)
        first = Difference(ticket, lines[0], lines[1], before, len(other))
    return Comparison(a, b, same, first, unrecorded)


def _parts(line: dict[str, Any] | None) -> dict[str, Any]:
    parts = None if line is None else line.get("parts")
    return parts if isinstance(parts, dict) else {}
