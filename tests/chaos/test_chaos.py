"""Everything at once: a real nnU-Net loader, two pools, faults of all kinds at random moments.

Every batch must be, bit for bit, the one that a process without faults makes, each once, in order, within a bound:
with few workers, and with so many that most of them rest. The seed is printed; `SAFELOADER_CHAOS_SEED` repeats it (as
far as chance can be repeated: the machine has its own). The long runs end after 20,000 batches or 30 minutes each:

    SAFELOADER_CHAOS_BATCHES=20000 SAFELOADER_CHAOS_MINUTES=30 pytest -m soak tests/chaos -s
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import hashlib
import os
import random
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import pytest

from safeloader import SafeAugmenter
from safeloader.pool.seeding import seed_everything
from safeloader.testing import Orders, wait_until
from tests.chaos.havoc import DEEDS, Havoc, make_loader, pack
from tests.processes import open_files
from tests.ring import in_use

ROOT_SEED = 11
BOUND_S = float(os.environ.get("SAFELOADER_CHAOS_BOUND_S", "60"))
"""No batch may take longer. The longest that is meant to happen: a stopped nursery (1 s until it is found), a new one
(2 to 8 s on a busy machine), a storage failure (up to 4 s of back-off)."""
SHORT: dict[str, Any] = {
    "hang_timeout_s": 1.0,
    "hang_timeout_first_s": 10.0,
    "grow_back_s": 1.0,
    "on_bad_case": "retry",
}


@dataclass(frozen=True)
class Staff:
    """How many workers train and validate, and when those without anything to do leave.

    Attributes:
        calm: the state of all of them once the rings are full.
    """

    train: int
    val: int
    rest_after_s: float
    calm: str


FEW = Staff(train=3, val=1, rest_after_s=20.0, calm="ready")
CROWD = Staff(train=8, val=4, rest_after_s=0.3, calm="resting")
"""More than two CPUs keep busy: most have nothing to do, leave, and come back when others are killed."""


class StuckError(Exception):
    """A batch did not come in time."""


class Reference:
    """The stream as one process makes it, of files that nobody touches; made as it is needed."""

    def __init__(self, folder: Path, stream: int) -> None:
        self._loader, self._stream = make_loader(folder, None), stream

    def digest(self, ticket: int) -> bytes:
        seed_everything(ROOT_SEED, self._stream, ticket)
        return _digest(next(self._loader))


def _digest(batch: dict[str, Any]) -> bytes:
    digest = hashlib.blake2b(batch["data"].numpy().tobytes(), digest_size=8)
    digest.update(batch["target"].numpy().tobytes())
    digest.update(repr(list(batch["keys"])).encode())
    return digest.digest()


@contextmanager
def _within(seconds: float) -> Iterator[None]:
    def on_alarm(number: int, frame: FrameType | None) -> None:
        raise StuckError(f"no batch for {seconds:g} s")

    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _settled(pools: list[SafeAugmenter], staff: Staff) -> dict[str, int]:
    """What the process holds once all workers have nothing to do."""

    def quiet() -> bool:
        workers = [worker for pool in pools for worker in pool.workers()]
        return all(worker.state == staff.calm and worker.stage == "idle" for worker in workers) and all(
            sum(in_use(pool).values()) >= pool.num_processes + 2 * pool.num_cached for pool in pools
        )

    gc.collect()
    wait_until(quiet, timeout_s=60, what=f"all workers {staff.calm} and idle")
    # The supervisor reads the kernel's counters now and then: a file that is open for a moment is in one count alone.
    wait_until(lambda: all(_held(pools) == _held(pools) for _ in range(3)), what="that no file is being read")
    return _held(pools)


def _held(pools: list[SafeAugmenter]) -> dict[str, int]:
    """Without the slots, of which a pool may have more or fewer: see `pool/slots.py`."""
    slots = sum(sum((pool.report().slots or {}).values()) for pool in pools)
    mapped = Counter(re.findall("memfd:safeloader-(slot)?", Path("/proc/self/maps").read_text()))
    opened = open_files()
    of_slots = sum("memfd:safeloader-slot" in each for each in opened)
    return {
        "descriptors": len(opened) - of_slots,
        "descriptors of slots that are gone": max(0, of_slots - 2 * slots),  # the mapping has one of its own
        "processes": len(psutil.Process().children(recursive=True)),
        "mappings": mapped[""],
        "mappings of slots that are gone": max(0, mapped["slot"] - slots),
    }


def _rage(tmp_path: Path, seed: int, staff: Staff, *, batches: float, seconds: float) -> None:
    print(f"\nchaos: SAFELOADER_CHAOS_SEED={seed}", flush=True)
    chance = random.Random(seed)
    folder, untouched = tmp_path / "preprocessed" / "fold", tmp_path / "untouched"
    references = [Reference(untouched, 0), Reference(untouched, 1)]
    orders = Orders(tmp_path / "orders", DEEDS)
    val_method = chance.choice(["auto", "auto", "forked"])
    pools = [
        SafeAugmenter(
            make_loader(folder, orders), functools.partial(pack, orders), workers, 2,
            seed=ROOT_SEED, stream=stream, name=name, start_method=method, rest_after_s=staff.rest_after_s, **SHORT,
        )
        for stream, (name, workers, method) in enumerate(
            (("train", staff.train, "auto"), ("val", staff.val, val_method))
        )
    ]  # fmt: skip
    tickets, waits, redone = [0, 0], [0.0], Counter[str]()
    havoc = Havoc(folder, orders, pools, random.Random(chance.getrandbits(32)))

    def check(which: int) -> None:
        begun = time.monotonic()
        with _within(BOUND_S):
            batch = next(pools[which])
        waits.append(time.monotonic() - begun)
        ticket = tickets[which]
        assert _digest(batch) == references[which].digest(ticket), f"ticket {ticket} of pool {which} is not the same"
        assert batch["parcel"] == 7
        tickets[which] += 1

    try:
        for which in (0, 1):
            check(which)
        before = _settled(pools, staff)
        until = time.monotonic() + seconds
        with havoc.raging():
            havoc.let_raise(True)
            while time.monotonic() < until and sum(tickets) < batches:
                assert havoc.error is None, repr(havoc.error)
                which = int(chance.random() < 0.25)
                check(which)
                if chance.random() < 1 / 150:
                    end = chance.choice([SafeAugmenter.restart, SafeAugmenter._finish])
                    havoc.note(f"{end.__name__} of {pools[which].options.name}")
                    redone[end.__name__] += 1
                    havoc.let_raise(False)
                    with _within(BOUND_S):
                        end(pools[which])
                    check(which)
                    havoc.let_raise(True)
        for which in (0, 1, 0, 1):
            for _ in range(10):
                check(which)
        with contextlib.suppress(TimeoutError):  # what stays is seen below
            wait_until(lambda: _settled(pools, staff) == before)
        after = _settled(pools, staff)
        reports = [pool.report() for pool in pools]
        assert [report.batches for report in reports] == tickets
        assert [report.quarantined for report in reports] == [(), ()]
        assert [report.start_method for report in reports] == ["clean", "forked" if val_method == "forked" else "clean"]
        assert after == before, "something grows"
        counts = reports[0].incident_counts, reports[1].incident_counts
        print(
            f"chaos: seed {seed}: {sum(tickets)} batches, {havoc.count} faults, {dict(redone)}, "
            f"{sum(r.restarts for r in reports)} restarts, longest wait {max(waits):.2f} s, {after}, {counts}",
            flush=True,
        )
    except BaseException:
        _tell(seed, havoc, pools, tickets)
        raise
    finally:
        for pool in pools:
            pool.close()


def _tell(seed: int, havoc: Havoc, pools: list[SafeAugmenter], tickets: list[int]) -> None:
    """What one needs to know when it went wrong."""
    said = [f"chaos failed: SAFELOADER_CHAOS_SEED={seed}, tickets {tickets}", "the last faults:", *havoc.log[-50:]]
    for pool in pools:
        report = pool.report()
        said += [f"{report.name}: {report.slots}, {report.incident_counts}, {report.start_method}"]
        said += [f"  {worker}" for worker in pool.workers()]
        said += [f"  {incident.at} {incident.message}" for incident in report.incidents[-25:]]
    print("\n".join(said), file=sys.stderr, flush=True)


@pytest.mark.parametrize("staff", [FEW, CROWD], ids=["few", "crowd"])
def test_everything_at_once(tmp_path: Path, staff: Staff) -> None:
    seed = int(os.environ.get("SAFELOADER_CHAOS_SEED", "3"))
    seconds = float(os.environ.get("SAFELOADER_CHAOS_SECONDS", "30"))
    _rage(tmp_path, seed, staff, batches=float("inf"), seconds=seconds)


@pytest.mark.soak
@pytest.mark.parametrize("staff", [FEW, CROWD], ids=["few", "crowd"])
def test_everything_at_once_for_long(tmp_path: Path, staff: Staff) -> None:
    faulthandler.cancel_dump_traceback_later()  # pytest's limit for a test; here each batch has one
    seed = int(os.environ.get("SAFELOADER_CHAOS_SEED", random.SystemRandom().getrandbits(31)))
    minutes = float(os.environ.get("SAFELOADER_CHAOS_MINUTES", "30"))
    batches = int(os.environ.get("SAFELOADER_CHAOS_BATCHES", "20000"))
    _rage(tmp_path, seed, staff, batches=batches, seconds=60 * minutes)
