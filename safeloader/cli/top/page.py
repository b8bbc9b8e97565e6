"""What `safeloader top` shows a person of one training: plain text, a line per pool, worker and incident."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any, Final

from safeloader.cli.top.sight import Sight
from safeloader.faults.memory import gib
from safeloader.words import counted

_STATES: Final = ("filling", "ready", "leased", "free")
_CASE_CHARS: Final = 32
_LONG_S: Final = 1.0
_HEAD: Final = (
    f"    {'worker':>6} {'pid':>8} {'state':<9}{'stage':<13}{'for':>7} {'ticket':>8} {'memory':>9} {'batches':>8}  case"
)


def page(sight: Sight, earlier: Sight | None) -> Iterator[str]:
    """The lines about one training."""
    up = "" if sight.uptime_s is None else f", up {_duration(sight.uptime_s)}"
    yield f"{sight.command or 'a training'}   [pid {sight.pid}{up}]"
    if sight.trouble:
        yield f"  {sight.trouble}"
    elif not sight.pools:
        yield "  no pool at the moment"
    for pool in sight.pools:
        yield from _pool(pool, sight, earlier)
    yield ""


def _pool(pool: Mapping[str, Any], sight: Sight, earlier: Sight | None) -> Iterator[str]:
    rates = sight.rates(pool, earlier)
    speed = "" if rates is None else f"{rates.batches_per_s:.1f} batches/s, waited {rates.waited:.0%} of the time; "
    slots = pool["slots"]
    ring = ", ".join(f"{slots[state]} {state}" for state in _STATES if slots[state]) or "empty"
    yield (
        f"  {pool['name']}: {speed}{pool['batches']} batches, waited {_duration(pool['wait_s'])} in all; "
        f"ring: {ring}; {counted(pool['restarts'], 'restart')}"
    )
    if pool["waits_for"] is not None and pool["waiting_s"] >= _LONG_S:
        yield f"    training has waited {_duration(pool['waiting_s'])} for its next batch: {pool['waits_for']}"
    if pool["quarantined"]:
        yield f"    {counted(len(pool['quarantined']), 'quarantined case')}: {', '.join(pool['quarantined'][:5])}"
    yield _HEAD
    for worker in pool["workers"]:
        yield _worker(worker)
    for incident in reversed(pool["incidents"]):
        yield f"    {datetime.fromisoformat(incident['at']).astimezone():%H:%M:%S} {incident['message']}"


def _worker(worker: Mapping[str, Any]) -> str:
    life = f"{worker['worker']}" + (f".{worker['incarnation']}" if worker["incarnation"] else "")
    if worker["pid"] is None:
        return f"    {life:>6} {'-':>8} {worker['state']}"
    ticket = "" if worker["ticket"] is None else worker["ticket"]
    memory = "" if worker["memory_nbytes"] is None else gib(worker["memory_nbytes"])
    doing = f"{worker['state']:<9}{worker['stage']:<13}{_duration(worker['since_s']):>7} {ticket:>8}"
    case = (worker["case"] or "")[:_CASE_CHARS]
    return f"    {life:>6} {worker['pid']:>8} {doing} {memory:>9} {worker['batches']:>8}  {case}".rstrip()


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
