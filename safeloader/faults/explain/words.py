"""A diagnosis as text: plain, readable without colours, nothing wrapped that a reader will copy."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterator
from typing import Final

from safeloader.faults.explain.incidents import Group, Summary
from safeloader.faults.explain.model import Answer, Diagnosis, Finding, Line, Place
from safeloader.words import counted

WIDTH: Final = 100
_MAX_QUOTE_CHARS: Final = 300
_MAX_FURTHER: Final = 4
_FEW: Final = 3


def in_words(diagnosis: Diagnosis, name: str) -> str:
    """The whole answer about the log called `name`."""
    return "\n".join(_diagnosis(diagnosis, name))


def summary_in_words(summary: Summary, name: str) -> str:
    """The whole answer about the file of incidents called `name`."""
    return "\n".join(_summary(summary, name))


def _diagnosis(diagnosis: Diagnosis, name: str) -> Iterator[str]:
    primary, cause = diagnosis.primary, diagnosis.primary.cause
    group = f", {cause.group}" if cause.group else ""
    yield from _wrapped(f"{cause.title}.")
    confidence = f"{diagnosis.confidence}  " if diagnosis.confidence else ""
    yield f"{confidence}[{cause.key}{group}; {name}, {counted(diagnosis.lines, 'line')}]"
    if cause.answer is not Answer.HEALTHY:
        yield from _evidence(primary, diagnosis.symptom)
    yield from _section("What happened", [cause.what])
    yield from _section("What to do", cause.remedy, numbered=True)
    yield from _section("With SafeLoader", [cause.safeloader] if cause.safeloader else [])
    if diagnosis.further:
        yield from _section("Also in this log, perhaps only a consequence", [_further(f) for f in _first(diagnosis)])
    yield from _section("Note", list(diagnosis.notes))
    if cause.sources:
        yield from _section("The same in public threads", [", ".join(cause.sources)])


def _first(diagnosis: Diagnosis) -> tuple[Finding, ...]:
    return diagnosis.further[:_MAX_FURTHER]


def _evidence(primary: Finding, symptom: Line | None) -> Iterator[str]:
    if primary.total:
        yield from ("", "Evidence")
    for line in primary.evidence:
        yield f"  line {line.number}: {_quote(line.text)}"
    if primary.place is not Place.ELSEWHERE:
        yield f"  raised {primary.place.value}" + (f", at {primary.code}" if primary.code else "")
    more = primary.total - len(primary.evidence)
    if more > 0:
        yield f"  and {counted(more, 'more line')} like {'it' if len(primary.evidence) == 1 else 'these'}"
    if symptom is not None and symptom not in primary.evidence:
        yield f'  line {symptom.number} ("background workers are no longer alive") is only the echo'


def _further(finding: Finding) -> str:
    line = finding.evidence[0]
    return f"{finding.cause.title} [{finding.cause.key}], line {line.number}: {_quote(line.text)}"


def _summary(summary: Summary, name: str) -> Iterator[str]:
    if not summary.groups:
        yield f"No incident is recorded: nothing went wrong with SafeLoader's workers.  [{name}]"
        yield from _section("Note", _summary_notes(summary))
        return
    top = summary.groups[0]
    yield from _wrapped(
        f"{counted(summary.total, 'incident')}, most often: {top.title} ({_times(top.count)})."  # the answer in a line
    )
    yield f"[{name}; {summary.first or 'time unknown'} to {summary.last or 'time unknown'}]"
    yield from ("", "By cause")
    for group in summary.groups[:_MAX_FURTHER]:
        yield from _group(group)
    if len(summary.groups) > _MAX_FURTHER:
        others = sum(group.count for group in summary.groups[_MAX_FURTHER:])
        yield f"  {others:>6} x others"
    yield from _section("The most frequent in full", [top.message])
    yield from (f"    {_quote(line)}" for line in top.tail)
    known = top.known_as
    if known is not None:
        yield from _section("What happened", [f"{known.title}. {known.what}"])
    yield from _section("What to do", top.todo, numbered=True)
    yield from _section("Note", _summary_notes(summary))


def _group(group: Group) -> Iterator[str]:
    yield f"  {group.count:>6} x {group.title}"
    details = [
        f"{what}: {_most(counts)}" for what, counts in (("stage", group.stages), ("case", group.cases)) if counts
    ]
    if details:
        yield f"           {'; '.join(details)}"


def _summary_notes(summary: Summary) -> list[str]:
    notes = []
    if summary.outcome:
        notes.append(f"The training's outcome, as its report says: {summary.outcome}.")
    if summary.reactions:
        did = ", ".join(f"{kind} ({_times(count)})" for kind, count in summary.reactions.most_common())
        notes.append(f"What SafeLoader did about it: {did}.")
    if summary.skipped:
        notes.append(f"{counted(summary.skipped, 'line')} left out: cut off by a crash, or not JSON.")
    return notes


def _most(counts: Counter[str]) -> str:
    named = ", ".join(f"{name} ({_times(count)})" for name, count in counts.most_common(_FEW))
    return named + (f" and {len(counts) - _FEW} others" if len(counts) > _FEW else "")


def _section(title: str, paragraphs: list[str] | tuple[str, ...], *, numbered: bool = False) -> Iterator[str]:
    if paragraphs:
        yield from ("", title)
    for number, paragraph in enumerate(paragraphs, 1):
        yield from _wrapped(paragraph, first=f"  {number}. " if numbered and len(paragraphs) > 1 else "  ")


def _wrapped(text: str, *, first: str = "") -> list[str]:
    """Wrapped at `WIDTH`, but never inside of a command."""
    pieces = text.split("`")
    kept = "`".join(piece.replace(" ", "\0") if number % 2 else piece for number, piece in enumerate(pieces))
    lines = textwrap.wrap(
        kept,
        WIDTH,
        initial_indent=first,
        subsequent_indent=" " * len(first),
        break_long_words=False,
        break_on_hyphens=False,
    )
    return [line.replace("\0", " ") for line in lines]


def _quote(text: str) -> str:
    text = text.strip()
    return text if len(text) <= _MAX_QUOTE_CHARS else f"{text[:_MAX_QUOTE_CHARS]} […]"


def _times(number: int) -> str:
    return "once" if number == 1 else f"{number:,} times"
