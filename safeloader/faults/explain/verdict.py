"""Which of several matches is the cause.

The rules, in this order:

1. The last run that failed counts (a log may hold several: see `progress.py`).
2. An echo is never a cause.
3. A cause gives way to those it names in `unless`, if they are there: it is their consequence, or a vaguer name.
4. What the training went on after for two epochs did not end it.
5. Decisive signs before weak ones, weak ones before hints (see `Weight`); among equals the earliest.
6. An exception without a known cause, in a worker or in the training process, stands in that order too, as decisive:
   a later error that is known may be its consequence. Elsewhere it counts only if nothing else is there.
7. If nothing is left, the answer is that it is not known, with what is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from safeloader.faults.explain.causes import BY_KEY, unknown
from safeloader.faults.explain.causes.loading import LOADER_BUG
from safeloader.faults.explain.model import Cause, Diagnosis, Finding, Line, Place, Raised, Weight
from safeloader.faults.explain.observe import Observed, Observer
from safeloader.faults.explain.progress import Run, time_in

_SYMPTOM = "workers-no-longer-alive"
_UNKNOWN_AT = {
    Place.TRAINER: unknown.TRAINER_EXCEPTION,
    Place.RECEIVER: unknown.TRAINER_EXCEPTION,
    Place.POOL: unknown.POOL_EXCEPTION,
}
_MUCH_LONGER = 10
"""Times the slowest epoch: a silence that long before the end is no epoch."""
_AT_LEAST = timedelta(minutes=30)


@dataclass(frozen=True)
class _Judged:
    """One run's verdict."""

    primary: Finding
    further: tuple[Finding, ...] = ()
    survived: tuple[Finding, ...] = ()

    @property
    def failed(self) -> bool:
        return self.primary.cause not in (unknown.HEALTHY, unknown.CUT_OFF, unknown.NOTHING_KNOWN)


def judge(observer: Observer) -> Diagnosis:
    """The verdict on a log that was read to its end."""
    runs = list(zip(observer.runs, observer.progress.runs, strict=True))
    judged = [_judge(observed, run, of_nnunet=observer.progress.of_nnunet) for observed, run in runs]
    chosen = next((number for number in reversed(range(len(runs))) if judged[number].failed), len(runs) - 1)
    observed, run = runs[chosen]
    verdict = judged[chosen]
    return Diagnosis(
        primary=verdict.primary,
        further=verdict.further,
        symptom=_symptom(observed),
        notes=tuple(_notes(verdict, observed, run, later=judged[chosen + 1 :], starts=observer.progress.starts)),
        lines=observer.lines,
    )


def _judge(observed: Observed, run: Run, *, of_nnunet: bool) -> _Judged:
    findings = _without_consequences([observed.finding(key) for key in observed.causes])
    findings += _unknown_exceptions(observed)
    symptom = _symptom(observed) is not None
    survived = [f for f in findings if run.survived(f.last)]
    # A training that ends with the echo has not survived: what Python kept back was printed after what ended it.
    alive = [f for f in findings if f not in survived] or (findings if symptom and not run.trained else [])
    alive.sort(key=lambda finding: (finding.weight.value, finding.first))
    gone = tuple(f for f in survived if f not in alive)
    if alive:
        return _Judged(alive[0], tuple(alive[1:]), gone)
    if observed.last_unknown is not None and not run.survived(observed.last_unknown.line.number):
        return _Judged(_as_finding(unknown.OTHER_EXCEPTION, observed.last_unknown, sure=False), (), gone)
    return _Judged(_no_error(observed, run, of_nnunet=of_nnunet), (), gone)


def _without_consequences(findings: list[Finding]) -> list[Finding]:
    keys = {finding.cause.key for finding in findings}
    return [finding for finding in findings if not keys & set(finding.cause.unless)]


def _unknown_exceptions(observed: Observed) -> list[Finding]:
    """Exceptions that are no sign of a known cause, where it is certain that they end something."""
    found = []
    in_worker = observed.unknown.get(Place.WORKER)
    if in_worker is not None:
        found.append(_as_finding(LOADER_BUG, in_worker, sure=True))
    elif observed.announced and not observed.causes:
        # On stdout alone: the traceback went to stderr, which is not in this file.
        lines = tuple(observed.announced)
        found.append(Finding(LOADER_BUG, lines, len(lines), True, Weight.DECISIVE, lines[0].number, lines[-1].number))
    for place, cause in _UNKNOWN_AT.items():
        raised = observed.unknown.get(place)
        if raised is not None:
            found.append(_as_finding(cause, raised, sure=True))
    return found


def _as_finding(cause: Cause, raised: Raised, *, sure: bool) -> Finding:
    root = raised.root or raised
    lines = [root.line] if root is raised else [root.line, raised.line]
    return Finding(
        cause=cause,
        evidence=tuple(lines),
        total=len(lines),
        sure=sure,
        weight=Weight.DECISIVE,
        first=root.line.number,
        last=raised.line.number,
        place=raised.place,
        code=root.code or raised.code,
    )


def _no_error(observed: Observed, run: Run, *, of_nnunet: bool) -> Finding:
    """The answer for a run that shows no cause: healthy, cut off, or echoes only."""
    symptom = observed.echoes.get(_SYMPTOM)
    if symptom is not None and not run.trained:
        silent = Place.TRAINER in symptom.places
        cause = unknown.SILENT_DEATH if silent else unknown.SYMPTOM_ONLY
        return _at(cause, symptom.evidence[0], symptom.total)
    if run.validated or (run.trained and not run.validating):
        return _at(unknown.HEALTHY, observed.last_line, 1)
    if of_nnunet:
        return _at(unknown.CUT_OFF, observed.last_line, 1)
    return _at(unknown.NOTHING_KNOWN, observed.last_line, 0)


def _at(cause: Cause, line: Line, total: int) -> Finding:
    return Finding(cause, (line,) if total else (), total, False, Weight.HINT, line.number, line.number)


def _symptom(observed: Observed) -> Line | None:
    tally = observed.echoes.get(_SYMPTOM)
    return tally.evidence[0] if tally is not None else None


def _notes(verdict: _Judged, observed: Observed, run: Run, *, later: list[_Judged], starts: int) -> list[str]:
    notes = []
    if starts > 1:
        came = ""
        if later and later[-1].primary.cause is unknown.HEALTHY:
            came = "; a later one finished"
        elif later:
            came = "; no later one shows an error"
        which = f"start {starts - len(later)}" if later else "the last of them"
        notes.append(f"The log holds {starts} starts of nnU-Net; this is about {which}{came}.")
    for finding in verdict.survived:
        line = finding.evidence[0]
        notes.append(f"Line {line.number} is a sign of {finding.cause.key}, but the training went on after it.")
    if run.uncompiled_line:
        notes.append(f"torch.compile failed (line {run.uncompiled_line}), and SafeLoader trained on without it.")
    if observed.replaced:
        workers = "1 worker" if observed.replaced == 1 else f"{observed.replaced} workers"
        notes.append(
            f"SafeLoader replaced {workers} meanwhile: `safeloader explain` on safeloader_incidents.jsonl in the "
            "training's folder tells why."
        )
    if run.epoch is not None and verdict.primary.cause is unknown.CUT_OFF:
        where = f"in validation, at case {run.validating}" if run.validating else f"in epoch {run.epoch}"
        notes.append(f"The last that nnU-Net said was {where}.")
    silence = _silence(verdict.primary, run)
    if silence is not None:
        notes.append(
            f"Before that nothing was logged for {silence} (an epoch took {run.slowest_epoch_s:.0f} s): it may have "
            "hung "
            "until then, unless Python kept its last lines back."
        )
    return notes


def _silence(primary: Finding, run: Run) -> timedelta | None:
    """For how long nothing had been logged when a scheduler ended the job, if that is suspicious."""
    if primary.cause not in (BY_KEY["scheduler-time-limit"], BY_KEY["scheduler-cancelled"]) or not run.slowest_epoch_s:
        return None
    moment = time_in(primary.evidence[0].text)
    if moment is None:
        return None
    silence = run.silence_before(moment)
    return silence if silence > max(_AT_LEAST, timedelta(seconds=_MUCH_LONGER * run.slowest_epoch_s)) else None
