"""SafeLoader's own files, as records of incidents.

Two formats, told apart by how they begin:

    safeloader_incidents.jsonl    one JSON object a line, as `faults.incident.Incident`
    safeloader_report.json        one object, {"loaders": {name: {"incidents": [...]}}}

A line that a crash has cut off is left out and counted.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from typing import Any, BinaryIO, Final

from safeloader.errors import ConfigError
from safeloader.faults.explain.incidents import Record, Summary, sum_up, text_of

_MAX_REPORT_NBYTES: Final = 256 << 20
_MAX_LINE_NBYTES: Final = 16 << 20
_HEAD_LINES: Final = 5


def is_incidents(head: bytes) -> bool:
    """Whether a file that begins like this is a file of incidents, or a report."""
    return _is_report(head) or _has_records(head)


def summarize(stream: BinaryIO, head: bytes) -> Summary:
    """Sum up a file for which `is_incidents(head)` holds.

    Raises:
        ConfigError: A report that is cut off, or too large.
        OSError: It can't be read.
    """
    if _is_report(head):
        return _report(stream)
    lines = _Lines(stream)
    summary = sum_up(lines)
    return dataclasses.replace(summary, skipped=lines.skipped)


class _Lines:
    """The records of a file of incidents."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.skipped = 0

    def __iter__(self) -> Iterator[Record]:
        while line := self._stream.readline(_MAX_LINE_NBYTES):
            record = _parsed(line)
            if isinstance(record, dict):
                yield record
            elif line.strip(b"\0 \t\r\n"):
                self.skipped += 1


def _report(stream: BinaryIO) -> Summary:
    text = stream.read(_MAX_REPORT_NBYTES + 1)
    if len(text) > _MAX_REPORT_NBYTES:
        raise ConfigError(f"is a report of more than {_MAX_REPORT_NBYTES >> 20} MiB; give safeloader_incidents.jsonl")
    report = _parsed(text)
    if not isinstance(report, dict) or not isinstance(report.get("loaders"), dict):
        raise ConfigError("begins like a SafeLoader report, but is not a whole one; give safeloader_incidents.jsonl")
    records = [
        {"pool": name, **record}
        for name, loader in report["loaders"].items()
        if isinstance(loader, dict)
        for record in loader.get("incidents") or []
        if isinstance(record, dict)
    ]
    summary = sum_up(sorted(records, key=lambda record: text_of(record, "at")))
    return dataclasses.replace(summary, outcome=text_of(report, "outcome") or "unknown")


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _is_report(head: bytes) -> bool:
    """Indented or in one line, `"loaders"` comes before any record."""
    return head.lstrip().startswith(b"{") and b'"loaders"' in head.partition(b'"kind"')[0]


def _has_records(head: bytes) -> bool:
    """One of the first lines begins like a record; it may be longer than the head, or cut off."""
    lines = head.splitlines()[:_HEAD_LINES]
    return any(line.startswith(b"{") and (b'"kind"' in line or b'"message"' in line) for line in lines)
