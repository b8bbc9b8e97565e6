"""Reads a log once and keeps what a verdict needs: which signs it has, which exceptions, how far each run came.

What is kept is bounded by the number of signs, not by the length of the log.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

from safeloader.faults.explain.causes import BY_KEY, CAUSES, ECHOES
from safeloader.faults.explain.match import Matcher
from safeloader.faults.explain.model import Cause, Finding, Line, Place, Raised, Sign
from safeloader.faults.explain.progress import MAX_RUNS, Progress
from safeloader.faults.explain.tracebacks import Tracebacks

MAX_EVIDENCE: Final = 3
"""Lines that are quoted for one cause; lines that differ only in their numbers count as one."""

_NUMBERS: Final = re.compile(r"\d+")
_FILE: Final = "'/"
"""Lines that name a file differ if the file does."""
_ANNOUNCED: Final = re.compile(r"Exception in background worker \d+:")
_REPLACED: Final = re.compile(r"SafeLoader: worker .*(?:replaced|made again)")


@dataclass
class _Tally:
    """The lines that show one sign."""

    sign: Sign
    evidence: list[Line] = field(default_factory=list)
    seen: set[str] = field(default_factory=set)
    total: int = 0
    last: int = 0
    places: set[Place] = field(default_factory=set)
    raised: Raised | None = None

    def add(self, line: Line, raised: Raised | None) -> None:
        self.total += 1
        self.last = line.number
        if raised is not None:
            self.places.add(raised.place)
            self.raised = self.raised or raised
        if len(self.evidence) < MAX_EVIDENCE:
            alike = line.text if _FILE in line.text else _NUMBERS.sub("0", line.text)
            if alike not in self.seen:
                self.seen.add(alike)
                self.evidence.append(line)


@dataclass
class Observed:
    """What one run of a log shows.

    Attributes:
        causes: Signs of causes, by the cause's key.
        echoes: Signs of echoes, by key.
        unknown: The first exception at each place that is a sign of nothing.
        last_unknown: The last such exception anywhere.
        announced: What workers said of their exceptions (`Exception in background worker 3:`), on stdout.
        replaced: How many workers SafeLoader says that it replaced.
    """

    causes: dict[str, dict[Sign, _Tally]] = field(default_factory=dict)
    echoes: dict[str, _Tally] = field(default_factory=dict)
    unknown: dict[Place, Raised] = field(default_factory=dict)
    last_unknown: Raised | None = None
    announced: list[Line] = field(default_factory=list)
    replaced: int = 0
    last_line: Line = field(default_factory=lambda: Line(0, ""))

    def finding(self, key: str) -> Finding:
        """The signs of one cause as one, the strongest first."""
        tallies = sorted(
            self.causes[key].values(), key=lambda t: (t.sign.weight.value, not t.sign.sure, t.evidence[0].number)
        )
        strongest = [t for t in tallies if t.sign.weight is tallies[0].sign.weight]
        raised = next((tally.raised for tally in tallies if tally.raised is not None), None)
        return Finding(
            cause=BY_KEY[key],
            evidence=_telling(line for tally in tallies for line in tally.evidence),
            total=sum(tally.total for tally in tallies),
            sure=any(tally.sign.sure for tally in strongest),
            weight=tallies[0].sign.weight,
            first=min(t.evidence[0].number for t in strongest),
            last=max(tally.last for tally in tallies),
            place=raised.place if raised is not None else Place.ELSEWHERE,
            code=raised.code if raised is not None else "",
        )


def _telling(lines: Iterable[Line]) -> tuple[Line, ...]:
    """A few lines, in order, of which none is only a part of another."""
    kept: list[Line] = []
    for line in lines:
        text = line.text.strip()
        if any(text in other.text for other in kept):
            continue
        kept = [other for other in kept if other.text.strip() not in text]
        kept.append(line)
    return tuple(sorted(kept[:MAX_EVIDENCE]))


class Observer:
    """Feed it every line; then read `progress` and `runs`, which has one entry per run of the log."""

    def __init__(self) -> None:
        self.progress = Progress()
        self.runs = [Observed()]
        self.lines = 0
        self._tracebacks = Tracebacks()
        self._matcher = Matcher(CAUSES, ECHOES)
        self._announcing = False
        self._starts = 0

    def feed_all(self, lines: Iterable[Line]) -> None:
        """Feed lines until there are no more."""
        for line in lines:
            self.feed(line)

    def feed(self, line: Line) -> None:
        """Look at the next line."""
        self.lines = line.number
        if not line.text:
            return
        ordinary = self.progress.feed(line)
        if self.progress.starts > max(1, self._starts):
            self.runs = [*self.runs[1 - MAX_RUNS :], Observed()]
        self._starts = self.progress.starts
        run = self.runs[-1]
        run.last_line = line
        if ordinary:
            return
        said = self._tracebacks.feed(line)
        if said is False:
            return
        raised = said if isinstance(said, Raised) else None
        known = self._match(run, line, raised)
        if raised is None:
            self._other(run, line)
        elif not known:
            run.unknown.setdefault(raised.place, raised)
            run.last_unknown = raised

    def _match(self, run: Observed, line: Line, raised: Raised | None) -> bool:
        """Count the line for all that it is a sign of; whether it is one of anything."""
        found = self._matcher.find(line.text, self._tracebacks)
        causes = [(sign, owner.key) for sign, owner in found if isinstance(owner, Cause)]
        for sign, key in causes:
            run.causes.setdefault(key, {}).setdefault(sign, _Tally(sign)).add(line, raised)
        if not causes:
            for sign, echo in found:
                run.echoes.setdefault(echo.key, _Tally(sign)).add(line, raised)
        return bool(found)

    def _other(self, run: Observed, line: Line) -> None:
        """What is neither an exception nor a sign of something, but worth keeping."""
        if self._announcing and line.text.startswith(" ") and len(run.announced) < MAX_EVIDENCE:
            run.announced.append(line)
        self._announcing = bool(_ANNOUNCED.search(line.text)) or (self._announcing and line.text.startswith(" "))
        if _REPLACED.search(line.text):
            run.replaced += 1
