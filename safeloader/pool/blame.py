"""Who is to blame for what goes wrong with a ticket: nobody, a case, the storage, or the code. Pure.

                     ┌─ before any success, at the same place on two cases or tickets ──► a bug: raise it
    an exception ────┼─ of reading ──► the same again, later and later; if that does not help, a strike
                     └─ any other ───► the same again; if that does not help, a strike, and the ticket is drawn anew
    a death, a hang ────────────────► a strike, and the same again

    two strikes on one case ──► quarantined: no longer drawn; the ticket is drawn anew
    many cases unreadable at once ──► an outage: wait, take all strikes back

A strike counts if something else has worked since the one before; else nobody knows whether it is the case, and the
ticket is drawn anew to find out. A success of a case takes its strikes back, and one that has been fine before has
twice as many with exceptions that are not about reading. So what strikes all cases alike quarantines nothing, and
neither does an exception that hangs on the random numbers.

Where each worker has a lane of its own, nothing else can be tried while a ticket fails, so that others have worked
before is enough for a strike to count; but while storage does not answer, that is waited for, and strikes nobody.

A subject is a case, or a ticket of which nobody knows the case. A ticket can't be quarantined: it is drawn anew after
two deaths, and an exception that comes again is raised.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from safeloader.config import OnBadCase
from safeloader.pool.events import Cause, Failure, Why

STRIKES: Final = 2
"""Strikes after which a case is quarantined."""
READ_TRIES: Final = 4
"""Tries to read that make a strike: with the back-off below, 3.5 s of them. What fails on one case before its back-off
is over, because other tickets have it in hand as well, is the same try."""
_READ_STRIKE_S: Final = 3.0
"""Deaths of reading that come closer together are one strike: what is being written is whole a moment later."""
_RAISE_TRIES: Final = 10
"""Exceptions that are not about reading, after which even `on_bad_case="retry"` raises."""
_MAX_DRAWS: Final = 5
"""Draws of one ticket that may fail; then it is the code or the storage, not the cases."""
_BACKOFF_FIRST_S: Final = 0.5
_BACKOFF_MAX_S: Final = 30.0
_OUTAGE_CASES: Final = 3
"""Different cases that can't be read at the same time: more than chance, so it is the storage."""
_WINDOW_S: Final = 60.0
"""What "at the same time" means."""
_STALE_S: Final = 600.0
"""What was not tried again for so long does not hold up an outage's end."""


class Fate(Enum):
    """What becomes of a ticket."""

    AGAIN = "again"
    """The same draw is made again."""
    DRAW_ANEW = "draw-anew"
    RAISE = "raise"
    """The exception is delivered in the batch's place."""
    END = "end"
    """The pool is given up."""


@dataclass(frozen=True)
class Verdict:
    """What is done about one failure.

    Attributes:
        fate: of the ticket.
        in_s: when it is made again.
        quarantined: a case that is no longer drawn from here on.
        outage: the cases that can't be read, if an outage begins here.
        why: of an `END`.
        case: that an `END` or a new draw is about, where it is known.
    """

    fate: Fate
    in_s: float = 0.0
    quarantined: str | None = None
    outage: tuple[str, ...] = ()
    why: Why | None = None
    case: str | None = None


@dataclass(frozen=True)
class Policy:
    """What the user may set.

    Attributes:
        on_bad_case: what two strikes lead to.
        max_share: of the cases that may be quarantined; one always may.
        outage_s: how long an outage may last before the pool is given up.
    """

    on_bad_case: OnBadCase = OnBadCase.QUARANTINE
    max_share: float = 0.05
    outage_s: float = 3600.0


@dataclass
class _Trouble:
    """What has gone wrong with one subject since its last success."""

    case: str | None
    since: float
    ticket: int = -1  # the last one that it was met in, and the draw
    attempt: int = 0
    last: float = 0.0
    tries: int = 0
    again_at: float = -math.inf  # when the next try to read begins
    again: bool = False  # the last failure was none of its own
    strikes: int = 0
    struck: float = -math.inf  # what is begun from here on is evidence against the case: see `_strike`
    reading: bool = False
    broken: bool = False  # the file is damaged; the storage did answer
    chance: bool = True  # nothing but exceptions that are not about reading, so it may be the random numbers

    def forgive(self) -> None:
        self.tries = self.strikes = 0


class Blame:
    """The book of one pool.

    Attributes:
        quarantined: cases that are no longer drawn, in the order in which they were struck.
        outage_since: when the present outage began, or None.
    """

    def __init__(self, policy: Policy, quarantined: Iterable[str] = (), *, ordered: bool = False) -> None:
        self._policy = policy
        self._ordered = ordered  # a ticket waits for the one before it
        self.quarantined: dict[str, None] = dict.fromkeys(quarantined)
        self.outage_since: float | None = None
        self._outage_known = 0.0  # when it was seen to be one
        self._cases: int | None = None
        self._fine: set[str] = set()  # cases that were in a batch
        self._successes = 0
        self._last_success = -math.inf
        self._latest_begun = -math.inf  # of all batches that were made, when the last one to begin did
        self._troubles: dict[str | int, _Trouble] = {}  # by case, or by ticket
        self._attempts: dict[int, int] = {}
        self._places: dict[str, set[str | int]] = {}  # where exceptions came from before any success, on what

    # ---- what the machine asks ----

    def attempt(self, ticket: int) -> int:
        """How many draws of the ticket were given up."""
        return self._attempts.get(ticket, 0)

    @property
    def limit(self) -> int:
        """How many cases may be quarantined: one always may, but where their number is known one stays to be drawn."""
        if self._cases is not None:
            return min(max(1, int(self._policy.max_share * self._cases)), max(0, self._cases - 1))
        in_trouble = {trouble.case for trouble in self._troubles.values() if trouble.case is not None}
        known = len(self._fine | in_trouble | self.quarantined.keys())
        return max(1, int(self._policy.max_share * known))

    # ---- what it tells ----

    def draws_from(self, cases: int) -> None:
        """The loader draws from so many cases."""
        self._cases = cases

    def slept(self, seconds: float) -> None:
        """Nobody was here for so long: that does not count as an outage."""
        if self.outage_since is not None:
            self.outage_since += seconds

    def succeeded(self, ticket: int, cases: Collection[str], now: float, *, begun: float) -> float | None:
        """A batch was made, from `begun` on. Returns how long the outage lasted that ends with this, or None."""
        self._successes += 1
        self._last_success = now
        self._latest_begun = max(self._latest_begun, begun)
        self._places.clear()
        recovered = self._settle(ticket, cases)
        if self.outage_since is None or not (recovered or self._was_none(now)):
            return None
        lasted_s, self.outage_since = now - self.outage_since, None
        for trouble in self._troubles.values():
            if trouble.reading and recovered:
                trouble.forgive()
            trouble.broken = trouble.broken or not recovered  # others can be read, so it is this one
            trouble.struck = min(trouble.struck, self._outage_known)
        return lasted_s

    def failed(self, ticket: int, failure: Failure, now: float) -> Verdict:
        """A ticket has ended in an exception."""
        if failure.final:
            return Verdict(Fate.RAISE)
        if failure.case in self.quarantined:  # a loader that can't pass over it
            return self._draw_anew(ticket) if self.attempt(ticket) < _MAX_DRAWS else Verdict(Fate.RAISE)
        trouble = self._note(ticket, failure.case, now, reading=failure.reading)
        trouble.broken = failure.broken
        if self.outage_since is not None:
            return self._wait(ticket, trouble, now - self.outage_since, _WINDOW_S if trouble.broken else _STALE_S)
        if not self._successes and self._is_everywhere(ticket, failure, trouble):
            return Verdict(Fate.RAISE)
        if failure.reading:
            return self._unreadable(ticket, trouble, now)
        return Verdict(Fate.AGAIN) if trouble.tries < STRIKES else self._persistent(ticket, trouble, now)

    def died(self, ticket: int, case: str | None, now: float, cause: Cause, *, idle_s: float = 0.0) -> Verdict:
        """A worker was lost with this ticket in hand, after `idle_s` seconds without progress."""
        if case in self.quarantined:
            return self._draw_anew(ticket)
        reading = cause in (Cause.READING, Cause.HUNG)
        trouble = self._note(ticket, case, now, reading=reading)
        trouble.chance = False
        trouble.broken = True  # the file, unless nothing else can be read either
        if self.outage_since is not None:
            return self._wait(ticket, trouble, now - self.outage_since, _STALE_S)
        if reading and (self._successes or cause is Cause.HUNG):
            outage = self._outage(now)
            if outage is not None:
                return outage
        if cause is Cause.READING and now - trouble.struck < _READ_STRIKE_S:  # two workers at once, or too soon again
            return Verdict(Fate.AGAIN, _backoff_s(trouble.tries))
        if not self._strike(trouble, now, since=now - idle_s):
            return self._undecided(ticket, trouble, now, dead=True)
        if trouble.strikes < STRIKES:
            return Verdict(Fate.AGAIN, _backoff_s(trouble.tries) if reading else 0.0)
        return self._sentence(ticket, trouble, dead=True)

    # ---- judgement ----

    def _note(self, ticket: int, case: str | None, now: float, *, reading: bool) -> _Trouble:
        trouble = self._troubles.setdefault(ticket if case is None else case, _Trouble(case, now))
        trouble.ticket, trouble.attempt = ticket, self.attempt(ticket)
        trouble.last = now
        trouble.again = reading and now < trouble.again_at
        trouble.tries += not trouble.again
        trouble.reading = reading
        trouble.chance = trouble.chance and not reading
        return trouble

    def _settle(self, ticket: int, cases: Collection[str]) -> bool:
        """Strike out what went wrong with these; returns whether some of it could not be read."""
        self._fine.update(cases)
        draw = (ticket, self._attempts.pop(ticket, 0))
        if not self._troubles:
            return False
        fine: set[str | int] = {ticket, *cases}
        solved = {s: t for s, t in self._troubles.items() if s in fine or (t.ticket, t.attempt) == draw}
        for subject in solved:
            del self._troubles[subject]
        return any(trouble.reading for trouble in solved.values())

    def _is_everywhere(self, ticket: int, failure: Failure, trouble: _Trouble) -> bool:
        """Nothing has worked yet: if more than one subject fails, most likely nothing will, and the user waits."""
        if failure.reading:
            return trouble.tries >= READ_TRIES and sum(t.reading for t in self._troubles.values()) > 1
        subjects = self._places.setdefault(failure.place, set())
        subjects.add(ticket if failure.case is None else failure.case)
        return len(subjects) > 1

    def _unreadable(self, ticket: int, trouble: _Trouble, now: float) -> Verdict:
        outage = self._outage(now) if self._successes else None
        if outage is not None:
            return outage
        if trouble.again:
            return Verdict(Fate.AGAIN, trouble.again_at - now)
        if self._ordered and self._successes and not trouble.broken and trouble.tries % READ_TRIES == 0:
            outage = self._outage(now, least=1)
            if outage is not None:
                return outage
        counts = trouble.tries % READ_TRIES != 0 or self._strike(trouble, now, since=trouble.since)
        if not counts:
            return self._undecided(ticket, trouble, now, dead=False)
        if trouble.strikes < STRIKES:
            wait_s = _backoff_s(1 + (trouble.tries - 1) % READ_TRIES)
            trouble.again_at = now + wait_s
            return Verdict(Fate.AGAIN, wait_s)
        return self._sentence(ticket, trouble, dead=False)

    def _persistent(self, ticket: int, trouble: _Trouble, now: float) -> Verdict:
        """The second exception of the same draw, and not of reading."""
        if trouble.case is None:
            return Verdict(Fate.RAISE)
        if self._policy.on_bad_case is not OnBadCase.QUARANTINE:
            return self._sentence(ticket, trouble, dead=False)
        if self.attempt(ticket) >= _MAX_DRAWS:
            return Verdict(Fate.RAISE)
        trouble.tries = 0
        # One that has been fine may have drawn bad random numbers only.
        needed = 2 * STRIKES if trouble.chance and trouble.case in self._fine else STRIKES
        if self._strike(trouble, now, since=now) and trouble.strikes >= needed:
            return self._sentence(ticket, trouble, dead=False)
        return self._draw_anew(ticket, trouble.case)

    def _strike(self, trouble: _Trouble, now: float, *, since: float) -> bool:
        """One strike more for what goes wrong `since`, if it counts; returns whether it does."""
        # What was read before the storage failed may be made afterwards.
        worked = self._latest_begun if trouble.reading else self._last_success
        first = trouble.strikes == 0
        decided = self._policy.on_bad_case is not OnBadCase.QUARANTINE or (self._ordered and self._successes > 0)
        counts = first or worked >= trouble.struck or decided
        trouble.strikes += counts
        trouble.struck = since if first else now
        return counts

    def _undecided(self, ticket: int, trouble: _Trouble, now: float, *, dead: bool) -> Verdict:
        """A strike that does not count: nothing else has worked since the last one, so something else is tried."""
        draws = self.attempt(ticket)
        hopeless = not dead and draws >= _MAX_DRAWS
        if trouble.reading and self._successes:
            outage = self._outage(now, least=1 if hopeless else _OUTAGE_CASES, nothing_works=True)
            if outage is not None:
                return outage
        if hopeless:
            return Verdict(Fate.RAISE)
        if trouble.case is None:
            trouble.forgive()  # the next draw is another one
        return self._draw_anew(ticket, trouble.case, _backoff_s(draws) if trouble.reading and draws else 0.0)

    def _sentence(self, ticket: int, trouble: _Trouble, *, dead: bool) -> Verdict:
        """It has its strikes. `dead`: there is no exception to raise."""
        case = trouble.case
        match self._policy.on_bad_case:
            case OnBadCase.RAISE:
                return Verdict(Fate.END, why=Why.BAD_CASE, case=case) if dead else Verdict(Fate.RAISE)
            case OnBadCase.RETRY:
                endless = trouble.chance and trouble.tries >= _RAISE_TRIES
                return Verdict(Fate.RAISE) if endless else Verdict(Fate.AGAIN, _backoff_s(trouble.tries))
            case OnBadCase.QUARANTINE:
                pass
        if case is None:
            trouble.forgive()  # the next draw is another one
            return self._draw_anew(ticket) if dead else Verdict(Fate.RAISE)
        if len(self.quarantined) >= self.limit:
            return Verdict(Fate.END, why=Why.QUARANTINE, case=case)
        self.quarantined[case] = None
        del self._troubles[case]
        return self._draw_anew(ticket, quarantined=case)

    def _draw_anew(
        self, ticket: int, case: str | None = None, in_s: float = 0.0, *, quarantined: str | None = None
    ) -> Verdict:
        self._attempts[ticket] = self.attempt(ticket) + 1
        return Verdict(Fate.DRAW_ANEW, in_s, quarantined, case=case)

    # ---- outages ----

    def _wait(self, ticket: int, trouble: _Trouble, lasts_s: float, patience_s: float) -> Verdict:
        """What goes wrong in an outage says nothing. After `patience_s` something else is tried: it may be none."""
        if lasts_s > self._policy.outage_s:
            return Verdict(Fate.END, why=Why.OUTAGE)
        wait_s = min(_BACKOFF_MAX_S, max(1.0, lasts_s / 4))
        if lasts_s > patience_s and self._policy.on_bad_case is OnBadCase.QUARANTINE:
            return self._draw_anew(ticket, trouble.case, wait_s)
        return Verdict(Fate.AGAIN, wait_s)

    def _outage(self, now: float, *, least: int = _OUTAGE_CASES, nothing_works: bool = False) -> Verdict | None:
        """Whether an outage begins here: it is the storage's fault, not the cases'. `least` of them have to fail."""
        recent = [t for t in self._troubles.values() if t.reading and self._is_recent(t, now)]
        if not nothing_works and any(self._last_success >= t.since for t in recent):
            recent = [t for t in recent if not t.broken]  # others can be read, so the damaged ones are bad cases
        if len(recent) < least:
            return None
        self.outage_since, self._outage_known = min(t.since for t in recent), now
        return Verdict(Fate.AGAIN, 1.0, outage=tuple(t.case if t.case is not None else "?" for t in recent))

    def _is_recent(self, trouble: _Trouble, now: float) -> bool:
        return now - trouble.last <= _WINDOW_S or trouble.since > self._last_success

    def _was_none(self, now: float) -> bool:
        """Batches begun since the outage was declared are made, and what still can't be read is damaged."""
        waiting = [t for t in self._troubles.values() if t.reading and now - t.last <= _STALE_S]
        late = now - self._outage_known > _STALE_S
        return self._latest_begun >= self._outage_known and all(t.broken or late for t in waiting)


def _backoff_s(tries: int) -> float:
    return min(_BACKOFF_MAX_S, _BACKOFF_FIRST_S * 2.0 ** min(tries - 1, 10))
