"""What `test_kill_points` runs, in its own process or (`python -m tests.process.kill_scenarios NAME`) as a trainer.

Each scenario passes certain kill points for certain, and returns everything that the consumer saw.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from safeloader import SafeAugmenter, SafeMultiThreadedAugmenter
from safeloader.errors import SafeLoaderError
from safeloader.pool import memory_watch
from safeloader.pool.book import INCIDENTS_FILE
from safeloader.testing import wait_until
from tests.loaders import RandomLoader, Shuffled, fingerprint


class RaisesAtFive(RandomLoader):
    """Raises where the stream's sixth batch would be: the same ticket in every worker and every life."""

    def __next__(self) -> dict[str, Any]:
        batch = super().__next__()
        if batch["draw"] == SIXTH_DRAW:
            raise ValueError("the sixth batch is bad")
        return batch


class RaisesAtStart(RandomLoader):
    def set_thread_id(self, thread_id: int) -> None:
        raise ValueError("no start")


class LoadableOnlyHere(RandomLoader):
    """Unpickles only in the process that pickled it."""

    def __init__(self) -> None:
        super().__init__()
        self.home = os.getpid()

    def __setstate__(self, state: dict[str, Any]) -> None:
        if state["home"] != os.getpid():
            raise RuntimeError("not at home")
        self.__dict__.update(state)


class Leaks(RandomLoader):
    """Keeps 4 MiB a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[np.ndarray] = []

    def __next__(self) -> dict[str, Any]:
        self.kept.append(np.ones(4 << 20, dtype=np.uint8))
        return super().__next__()


PIDS_CGROUPS = Path("/sys/fs/cgroup/pids")
"""Where `fork_fails` makes a cgroup (v1), if it may."""

SIXTH_DRAW = 0.6315519125970612
"""`draw` of ticket 5 in the stream of seed 7; `test_kill_points` checks that it is."""


def stream(start_method: str) -> list[object]:
    """20 batches, with a worker killed from outside on the way."""
    with SafeAugmenter(RandomLoader(), None, 2, 2, seed=7, start_method=start_method) as augmenter:
        seen: list[object] = [fingerprint(next(augmenter)) for _ in range(5)]
        _kill_one(augmenter)
        seen += [fingerprint(next(augmenter)) for _ in range(15)]
        return seen


def two_pools() -> list[object]:
    """One pool ends while another that shares its nursery goes on."""
    with SafeAugmenter(RandomLoader(), None, 1, 1, seed=8) as other:
        with SafeAugmenter(RandomLoader(), None, 2, 2, seed=7) as augmenter:
            seen = [fingerprint(next(augmenter)) for _ in range(5)] + [fingerprint(next(other)) for _ in range(5)]
        seen += [fingerprint(next(other)) for _ in range(15)]
        return seen


def raises(loader: RandomLoader) -> list[object]:
    """A loader that raises: the batches before that, and the error."""
    seen: list[object] = []
    with SafeAugmenter(loader, None, 1, 2, seed=7, start_method="forked") as augmenter:
        try:
            for batch in itertools.islice(augmenter, 10):
                seen.append(fingerprint(batch))  # noqa: PERF401 - what was seen before the error counts
        except SafeLoaderError as error:
            seen.append(type(error).__name__)
        return seen


def falls_back_to_fork() -> list[object]:
    """A loader that the clean nursery can't unpickle."""
    with SafeAugmenter(LoadableOnlyHere(), None, 2, 2, seed=7) as augmenter:
        return [fingerprint(next(augmenter)) for _ in range(20)]


def fork_fails() -> list[object]:
    """The kernel refuses to fork once, because of a pids cgroup around the nursery; later it doesn't."""
    group = Path(tempfile.mkdtemp(prefix=f"safeloader-test-{os.getpid()}-", dir=PIDS_CGROUPS))
    try:
        (group / "pids.max").write_text("max")
        with SafeAugmenter(RandomLoader(), None, 1, 2, seed=7, start_method="forked", backoff_max_s=0.1) as augmenter:
            seen = [fingerprint(next(augmenter)) for _ in range(5)]
            worker = augmenter.workers()[0].pid
            assert worker is not None
            nursery = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
            (group / "cgroup.procs").write_text(str(nursery))
            (group / "pids.max").write_text("1")
            _kill_one(augmenter)
            wait_until(
                lambda: any(
                    "could not be forked" in i.message or i.worker is None for i in augmenter.report().incidents
                )
            )
            (group / "pids.max").write_text("max")
            seen += [fingerprint(next(augmenter)) for _ in range(15)]
            return seen
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


def quarantined() -> list[object]:
    """A case that an earlier run has quarantined, of which each worker is told."""
    with tempfile.TemporaryDirectory() as folder:
        known = {"kind": "quarantine", "pool": "loader", "case": "case_of_old"}
        (Path(folder) / INCIDENTS_FILE).write_text(json.dumps(known) + "\n")
        with SafeAugmenter(RandomLoader(), None, 2, 2, seed=7, start_method="forked", folder=folder) as augmenter:
            return [fingerprint(next(augmenter)) for _ in range(20)]


def recycled() -> list[object]:
    """A worker that keeps what it has read is asked to leave."""
    options = {"recycle_growth_mib": 1, "start_method": "forked"}
    with (
        mock.patch.object(memory_watch, "_LOOK_EVERY_S", 0.0),
        SafeAugmenter(Leaks(), None, 1, 2, seed=7, **options) as augmenter,
    ):
        seen: list[object] = []
        while not augmenter.report().incident_counts.get("recycle") or len(seen) < 20:
            seen.append(fingerprint(next(augmenter)))
        wait_until(lambda: augmenter.workers()[0].incarnation > 0, what="the next life")
        return seen[:20]


def finite() -> list[object]:
    """A finite loader over four epochs, of which each worker makes its part."""
    with SafeMultiThreadedAugmenter(Shuffled(11, 2), None, 2, 1, [1, 2], seed=7, start_method="forked") as augmenter:
        return [repr(batch) for _ in range(4) for batch in augmenter]


SCENARIOS: dict[str, Callable[[], list[object]]] = {
    "stream": lambda: stream("forked"),
    "clean": lambda: stream("clean"),
    "two_pools": two_pools,
    "raises": lambda: raises(RaisesAtFive()),
    "raises_at_start": lambda: raises(RaisesAtStart()),
    "falls_back": falls_back_to_fork,
    "fork_fails": fork_fails,
    "quarantined": quarantined,
    "recycled": recycled,
    "finite": finite,
}


def _kill_one(augmenter: SafeAugmenter) -> None:
    """SIGKILL to the worker that is most advanced in life, so that a kill point's victim is not counted twice."""
    wait_until(lambda: all(worker.pid is not None for worker in augmenter.workers()))
    victim = augmenter.workers()[-1].pid
    assert victim is not None
    os.kill(victim, signal.SIGKILL)
    wait_until(lambda: any(incident.pid == victim for incident in augmenter.report().incidents))


if __name__ == "__main__":
    print(hashlib.sha256(repr(SCENARIOS[sys.argv[1]]()).encode()).hexdigest())
