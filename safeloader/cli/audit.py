"""`safeloader audit`: did two trainings get the same batches, and if not, which is the first that differs, and how."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from safeloader.cli.command import Command, show
from safeloader.errors import ConfigError
from safeloader.report.audit import FILE_PATTERN, VERSIONS
from safeloader.report.comparison import Comparison, Difference, Recording, compare, read

_FEW: Final = 12
"""Names that are shown of a list."""
_NAME_IT: Final = "name a safeloader_audit_<pool>.jsonl, or the folder that holds it"
_OTHER_CASES: Final = (
    "Look at what the loader draws from: another dataset, fold or version of it, or a case that is quarantined in one "
    "of them (its safeloader_incidents.jsonl says so)."
)
_OTHER_CONTENT: Final = (
    "Look at what the loader or a transform takes from elsewhere than the generators that are seeded for each batch: "
    "the worker's number (thread_id), the time, what it keeps from batch to batch, a generator that is made anew for "
    "each batch (`safeloader check` finds such things); and at files that have changed, other versions, or another "
    "kind of CPU."
)
_OTHER_SEEDS: Final = "Their batches have to differ: to compare trainings, give both the same SAFELOADER_SEED."
_OTHER_LOADERS: Final = "Each loader of a seed has its own: compare training with training, and a rank with itself."


class Audit(Command):
    """Compare the batches of two trainings, by the audits that they wrote.

    A training writes one with SAFELOADER_AUDIT=1: a line per delivered batch with its ticket, its cases and a checksum,
    in safeloader_audit_<pool>.jsonl in its output folder. A and B are two such files, or two folders that hold them:
    then the audits of the same name are compared. Says how many tickets are the same, or which is the first that
    differs, and whether it has other cases or the same cases with other content, and in which keys.

    Exit codes: 0 the same, 1 they differ (or lines are left out), 2 they can't be read.
    """

    name = "audit"

    @classmethod
    def add_arguments(cls, parser: argparse.ArgumentParser) -> None:
        """Declare both sides."""
        parser.add_argument("a", metavar="A", help="an audit, or a folder with audits")
        parser.add_argument("b", metavar="B", help="the other one")

    def run(self, arguments: argparse.Namespace) -> int:
        """Compare pool by pool."""
        agree = True
        for pool, a, b in _pairs(Path(arguments.a), Path(arguments.b)):
            if a is None or b is None:
                agree = False
                show(f"{pool}: there is no such audit in {'A' if a is None else 'B'}.")
                continue
            comparison = _compared(a, b)
            agree = agree and comparison.agree
            names = [recording.of("pool") for recording in (comparison.a, comparison.b)]
            title = names[0] if names[0] and names[0] == names[1] else pool
            show("\n".join(_in_words(str(title), comparison)))
        return 0 if agree else 1


def _pairs(a: Path, b: Path) -> list[tuple[str, Path | None, Path | None]]:
    """What is compared with what, by the pool's name as files have it."""
    if a.is_dir() != b.is_dir() and a.exists() and b.exists():
        folder, file = (a, b) if a.is_dir() else (b, a)
        raise ConfigError(f"{folder} is a folder and {file} is not: name two files, or two folders")
    if not a.is_dir():
        found = FILE_PATTERN.fullmatch(a.name)
        return [(found[1] if found else a.name, a, b)]
    ours, theirs = _audits(a), _audits(b)
    return [(pool, ours.get(pool), theirs.get(pool)) for pool in sorted(ours.keys() | theirs.keys())]


def _audits(folder: Path) -> dict[str, Path]:
    try:
        found = {match[1]: path for path in folder.iterdir() if (match := FILE_PATTERN.fullmatch(path.name))}
    except OSError as error:
        raise ConfigError(f"{folder} can't be read: {error.strerror or error}") from error
    if not found:
        raise ConfigError(
            f"{folder} holds no safeloader_audit_<pool>.jsonl: SAFELOADER_AUDIT=1 makes a training write it"
        )
    return found


def _compared(a: Path, b: Path) -> Comparison:
    recordings = []
    for path in (a, b):
        try:
            recordings.append(read(path))
        except OSError as error:
            raise ConfigError(f"{path} can't be read: {error.strerror or error}; {_NAME_IT}") from error
    try:
        return compare(*recordings)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{a} or {b} was changed while it was read: {error}; try again") from error


def _in_words(pool: str, comparison: Comparison) -> Iterator[str]:
    a, b, first = comparison.a, comparison.b, comparison.first
    if not comparison.one_stream:
        advice = _OTHER_LOADERS if a.of("seed") == b.of("seed") else _OTHER_SEEDS
        yield f"{pool}: these are different streams: A has {_stream(a)}, B has {_stream(b)}. {advice}"
    if first is not None:
        yield from _difference(pool, comparison, first)
    elif comparison.unrecorded:
        yield (
            f"{pool}: {_tickets(comparison.same)} that both have are the same, and {comparison.unrecorded} can't be "
            f"compared: lines are left out ({_stream(a)})."
        )
    elif comparison.same:
        span = f"{min(a.tickets)} to {max(a.tickets)}" if comparison.same > 1 else str(min(a.tickets))
        yield f"{pool}: the same: {_tickets(comparison.same)}, {span} ({_stream(a)})."
    else:
        yield f"{pool}: no batch was delivered in either ({_stream(a)})."
    yield from _remarks(comparison)


def _difference(pool: str, comparison: Comparison, first: Difference) -> Iterator[str]:
    before = {0: "none before it is the same in both", 1: "the one before it is the same"}.get(
        first.before, f"the {first.before} before it are the same"
    )
    yield f"{pool}: ticket {first.ticket} is the first that differs; {before}."
    if first.a is None or first.b is None:
        yield from _missing(comparison, first)
    elif not first.same_cases:
        yield "  not the same cases:"
        yield f"    A: {_few(first.a.get('cases'))}"
        yield f"    B: {_few(first.b.get('cases'))}"
        if comparison.one_stream:
            yield f"  {_OTHER_CASES}"
    else:
        cases = f"the same cases ({_few(first.a['cases'])})" if first.a.get("cases") else "cases that are not known"
        yield f"  {cases}, other content: {_content(first)}"
        if comparison.one_stream:
            yield f"  {_OTHER_CONTENT}"
    if first.all_in_all:
        yield f"  All in all, {first.all_in_all} of the {comparison.same + first.all_in_all} tickets in both differ."
    for name, recording in (("A", comparison.a), ("B", comparison.b)):
        yield f"  {name}: {recording.path} ({_stream(recording)}, {_tickets(len(recording.tickets))})"


def _missing(comparison: Comparison, first: Difference) -> Iterator[str]:
    name, recording = ("A", comparison.a) if first.a is None else ("B", comparison.b)
    if not recording.tickets:
        where = "which has none"
    elif first.ticket > max(recording.tickets):
        where = (
            f"which ends at ticket {max(recording.tickets)}: that training was ended or killed sooner, or is running"
        )
    elif first.ticket < min(recording.tickets):
        where = f"which begins at ticket {min(recording.tickets)}: an earlier part of it lies elsewhere"
    else:
        where = "which goes on after it: lines were removed, or lost when a process was killed"
    yield f"  missing in {name}, {where}"


def _content(first: Difference) -> str:
    differ, same = first.parts()
    if differ:
        unlike = f"{_few(differ)} {'differs' if len(differ) == 1 else 'differ'}"
        return unlike + (f", {_few(same)} {'is' if len(same) == 1 else 'are'} the same" if same else "")
    if same:
        return "each key has the same, but they come in another order"
    return "the batch has no keys that could be told apart"


def _remarks(comparison: Comparison) -> Iterator[str]:
    """What a person should know of the files themselves."""
    for name, recording in (("A", comparison.a), ("B", comparison.b)):
        if recording.disagreeing:
            yield f"  {name}: {_repeats(recording)}"
        if recording.left_out:
            yield (
                f"  {name}: {_lines(recording.left_out)} left out, because the storage did not take them in time; the "
                "tickets that are missing for it are not compared."
            )
        if recording.cut:
            yield f"  {name}: {_lines(recording.cut)} passed over: not whole, as a crash leaves them."
        if not recording.headers:
            yield f"  {name}: no header is left, so it is not known which stream this is."
    for package in VERSIONS:
        versions = [recording.of(package) for recording in (comparison.a, comparison.b)]
        if all(versions) and versions[0] != versions[1]:
            yield f"  {package}: A was made with {versions[0]}, B with {versions[1]}."


def _repeats(recording: Recording) -> str:
    streams = [f"seed {seed}, stream {stream}" for seed, stream in recording.streams]
    if len(streams) > 1:
        why = (
            f"it holds several streams ({_few(streams, '; ')}), as a training does that goes on without SAFELOADER_SEED"
        )
    else:
        why = "a later run of the same stream made other batches, or two pools of one name write there"
    number = len(recording.disagreeing)
    stand = f"{_tickets(number)} {'stands' if number == 1 else 'stand'} there more than once, with other content"
    return f"{stand}, the first is ticket {min(recording.disagreeing)}: {why}. The last line counts."


def _stream(recording: Recording) -> str:
    if not recording.headers:
        return "an unknown stream"
    return f"seed {recording.of('seed')}, stream {recording.of('stream')}"


def _tickets(number: int) -> str:
    return "1 ticket" if number == 1 else f"{number} tickets"


def _lines(number: int) -> str:
    return "1 line is" if number == 1 else f"{number} lines are"


def _few(names: Any, between: str = ", ") -> str:
    if not isinstance(names, list) or not names:
        return "none that is known"
    more = f" and {len(names) - _FEW} more" if len(names) > _FEW else ""
    return between.join(str(name) for name in names[:_FEW]) + more
