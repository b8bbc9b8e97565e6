"""The fault table, part three: memory that grows, that is too small for all workers, and that runs out."""

from __future__ import annotations

import re
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from safeloader import SafeAugmenter
from safeloader.pool import memory_watch
from safeloader.testing import wait_until
from tests import scripts
from tests.loaders import RandomLoader, fingerprint

BATCHES = 40


class Leaks(RandomLoader):
    """Keeps 16 MiB a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[np.ndarray] = []

    def __next__(self) -> dict[str, object]:
        self.kept.append(np.ones(16 << 20, dtype=np.uint8))
        return super().__next__()


class Large(RandomLoader):
    """Takes 300 MiB from its first batch on."""

    def __next__(self) -> dict[str, object]:
        if not hasattr(self, "kept"):
            self.kept = np.ones(300 << 20, dtype=np.uint8)
        return super().__next__()


class LargeBatches(RandomLoader):
    """Its batches take 32 MiB of their slots."""

    def __next__(self) -> dict[str, object]:
        return {**super().__next__(), "large": np.zeros(32 << 20, dtype=np.uint8)}


class TakesTooMuchWhenTold(RandomLoader):
    """The first to remove the file takes 4 GiB."""

    def __init__(self, flag: Path) -> None:
        super().__init__()
        self.flag = flag

    def __next__(self) -> dict[str, object]:
        if self.flag.exists():
            try:
                self.flag.unlink()
            except FileNotFoundError:
                pass
            else:
                np.ones(4 << 30, dtype=np.uint8)
        return super().__next__()


@pytest.fixture
def looks_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_watch, "_LOOK_EVERY_S", 0.0)


@pytest.mark.usefixtures("warm_nursery", "looks_always")
def test_a_worker_that_grows_without_end_is_recycled_between_two_batches() -> None:
    with SafeAugmenter(RandomLoader(), None, 1, 2, seed=7) as augmenter:
        undisturbed = [fingerprint(next(augmenter)) for _ in range(BATCHES)]
    with SafeAugmenter(Leaks(), None, 2, 2, seed=7, recycle_growth_mib=64) as augmenter:
        assert [fingerprint(next(augmenter)) for _ in range(BATCHES)] == undisturbed
        wait_until(lambda: augmenter.report().incident_counts.get("recycle", 0) >= 2)
        wait_until(lambda: all(worker.incarnation > 0 for worker in augmenter.workers()))
        report = augmenter.report()
    assert report.restarts == 0, "nobody died"
    assert set(report.incident_counts) == {"recycle"}
    incident = report.incidents[0]
    assert incident.pid is not None
    found = re.fullmatch(
        rf"worker loader-{incident.worker} \(pid {incident.pid}\) has grown by (\d+) MiB since its 8th batch "
        rf"\(allowed: "
        r"64 MiB\): replaced between two batches\. What to do: look for something in the loader or transforms that "
        r"keeps what it has read\.",
        incident.message,
    )
    assert found, incident.message
    assert 64 < int(found[1]) < 64 + 16 * 12
    assert incident.figures is not None and incident.figures["mem_available_nbytes"] > 0


@pytest.mark.usefixtures("warm_nursery", "looks_always")
def test_a_worker_that_sees_more_and_more_of_the_ring_has_not_grown() -> None:
    """It has each slot mapped that it ever filled: that is the ring's memory, and there once."""
    with SafeAugmenter(LargeBatches(), None, 1, 8, seed=7, recycle_growth_mib=64) as augmenter:
        kept = [next(augmenter) for _ in range(BATCHES)]
        assert augmenter.report().incidents == ()
        del kept


@pytest.mark.usefixtures("warm_nursery")
def test_with_plenty_all_start_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_watch, "CAREFREE_NBYTES", 1 << 20)
    with SafeAugmenter(RandomLoader(), None, 3, 2, seed=7) as augmenter:
        augmenter._start()
        assert augmenter._pool is not None
        assert augmenter._pool.machine.allowed == 3
        wait_until(lambda: all(worker.state == "ready" for worker in augmenter.workers()))
        assert augmenter.report().incidents == ()


# ---- in a cgroup of their own ----


IN_CGROUP = """
from pathlib import Path
from safeloader.testing import wait_until
from tests.faults.test_memory import Large, TakesTooMuchWhenTold
from tests.loaders import fingerprint

cgroup, folder = Path({cgroup!r}), Path({folder!r})
(cgroup / "cgroup.procs").write_text(str(os.getpid()))
with SafeAugmenter(RandomLoader(), None, 1, 2, seed=7) as augmenter:
    undisturbed = [fingerprint(next(augmenter)) for _ in range(40)]
"""

FEWER = (
    IN_CGROUP
    + """
with SafeAugmenter(Large(), None, 8, 2, seed=7) as augmenter:
    assert [fingerprint(next(augmenter)) for _ in range(40)] == undisturbed
    wait_until(lambda: augmenter.report().incident_counts.get("degrade") == 1)
    (incident,) = augmenter.report().incidents
    machine = augmenter._pool.machine
    wait_until(lambda: sum(worker.state == "ready" for worker in augmenter.workers()) == machine.allowed)
    print(augmenter._pool.machine.allowed)
    print(int((cgroup / "memory.usage_in_bytes").read_text()))
    print(augmenter.report().restarts)
    print(incident.message)
"""
)


def test_fewer_workers_start_where_memory_is_too_little(tmp_path: Path, small_memory: Path) -> None:
    ended = scripts.run(tmp_path, FEWER.format(cgroup=str(small_memory), folder=str(tmp_path)), timeout_s=120)
    assert ended.code == 0, ended.err
    allowed, usage_nbytes, restarts, message = ended.out.splitlines()
    found = re.fullmatch(
        r"pool 'loader': (\d) workers? from here on, instead of 8: a worker takes (0\.\d\d) GiB and the ring "
        r"(0\.\d\d) GiB, "
        r"and the cgroup allows 2\.0+ GiB, of which (\d+) MiB are used, file cache not counted "
        rf"\({small_memory}/memory\.limit_in_bytes\)\. What to do: give the job more memory.*",
        message,
    )
    assert found, message
    workers, each, ring, used = int(found[1]), float(found[2]), float(found[3]), int(found[4]) / 1024
    assert int(allowed) == workers
    assert 0.29 < each < 0.5, "300 MiB and what a worker takes anyway"
    assert ring == pytest.approx((8 + 2 * 2) / 1024, abs=0.02), "12 slots of 1 MiB"
    # What the one worker and its slots took already is counted once.
    assert abs(workers - ((2 - used + each) * 0.9 - ring) / each) < 1.2, "rounded down, of rounded figures"
    assert 2 <= workers < 8
    assert int(usage_nbytes) < 2 << 30
    assert restarts == "0", "nobody was killed for it"
    assert message in ended.err, "a line says why"


KILLED_TWICE = (
    IN_CGROUP
    + """
flag = folder / "now"
with SafeAugmenter(TakesTooMuchWhenTold(flag), None, 3, 2, seed=7, grow_back_s=4.0) as augmenter:
    seen = []

    def until(kind, count):
        while augmenter.report().incident_counts.get(kind, 0) < count:
            seen.append(fingerprint(next(augmenter)))
            time.sleep(0.01)

    while sum(worker.state == "ready" for worker in augmenter.workers()) < 3:
        seen.append(fingerprint(next(augmenter)))
    for kill in (1, 2):
        flag.touch()
        until("oom-kill", kill)
        until("degrade", kill)
    until("recovery", 1)
    flag.touch()
    until("oom-kill", 3)
    until("recovery", 2)
    until("recovery", 3)
    for incident in augmenter.report().incidents:
        print(incident.at, incident.kind, incident.action, sep="|")
    with SafeAugmenter(RandomLoader(), None, 2, 2, seed=7) as other:
        assert seen == [fingerprint(next(other)) for _ in seen]
"""
)


def test_killed_again_and_again(tmp_path: Path, small_memory: Path) -> None:
    """Down to one worker; back after a quiet time, which doubles once that was a mistake."""
    ended = scripts.run(tmp_path, KILLED_TWICE.format(cgroup=str(small_memory), folder=str(tmp_path)), timeout_s=120)
    assert ended.code == 0, ended.err
    told = [line.split("|") for line in ended.out.splitlines()]
    workers = {"degrade": "from here on", "recovery": "from here on"}
    steps = [(kind, action.split()[0]) for _, kind, action in told if kind in workers]
    assert steps[:3] == [("degrade", "2"), ("degrade", "1"), ("recovery", "2")]
    assert "degrade" in {kind for kind, _ in steps[3:]}, "that was a mistake"
    assert steps[-1] == ("recovery", "3")
    assert [kind for _, kind, _ in told].count("oom-kill") == 3
    at = [datetime.fromisoformat(when).timestamp() for when, kind, _ in told if kind in workers]
    last = max(number for number, (kind, _) in enumerate(steps) if kind == "degrade")
    assert 3.9 < at[2] - at[1] < 7.5
    assert 7.9 < at[last + 1] - at[last] < 15
