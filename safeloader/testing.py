"""Faults to order, and proofs to ask for: for our tests, the demo, and users who want to know about their pipeline.

with SafeAugmenter(loader, None, 4, on_bad_case="retry") as batches:  # chance is nobody's fault
    killer = Killer(batches, seed=1)
    for _ in range(1000):
        killer.maybe(every=50)      # about every 50th batch, one worker dies
        batch = next(batches)
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import os
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safeloader.augmenter import SafeAugmenter
from safeloader.pool.supervisor import Supervisor
from safeloader.ring.digest import Digest, digest
from safeloader.runner import PoolRunner

DEADLY: Final = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS)
"""What the OOM killer, a bug in native code and a truncated memory-mapped file send."""
_LOOK_EVERY_S: Final = 0.005


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 10.0, what: str = "the condition") -> None:
    """Return as soon as the condition holds.

    Raises:
        TimeoutError: it still does not hold after `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} did not come true within {timeout_s:g} s")
        time.sleep(_LOOK_EVERY_S)


@dataclass(frozen=True)
class Difference:
    """A ticket that two workers made differently.

    Attributes:
        ticket: which. cases: the two batches', where they name them.
        parts: the keys of the batch that are not the same.
    """

    ticket: int
    cases: tuple[tuple[str, ...], tuple[str, ...]]
    parts: tuple[str, ...]


def make_twice(
    loader: Any,
    transform: Callable[..., Any] | None = None,
    *,
    tickets: int = 20,
    seed: int = 1,
    **options: Any,
) -> list[Difference]:
    """Make the stream's first tickets twice, and compare them bit for bit.

    First one worker makes all of them, one after the other. Then each is made once more, the last one first, by a
    worker of its own that is told to be the next one (`thread_id` 1). Whatever a batch depends on beside its seed shows
    as a difference: a loader that counts its calls, reads the clock, asks for its `thread_id`, or makes itself a
    generator for each batch.

    Args:
        loader: an infinite iterator of batches.
        transform: what follows it, or None.
        tickets: how many.
        seed: the root seed.
        options: of `SafeAugmenter`.

    Returns:
        What differs, in order; nothing if the seed is all that these batches depend on.
    """
    with Supervisor.hold():
        with SafeAugmenter(loader, transform, 1, 1, seed=seed, **options) as augmenter:
            once = [_seen(batch) for batch in itertools.islice(augmenter, tickets)]
        with SafeAugmenter(_as_the_next_worker(loader), transform, 1, 1, seed=seed, **options) as augmenter:
            again = {}
            for ticket in reversed(range(tickets)):
                augmenter.load_state_dict({**augmenter.state_dict(), "next_ticket": ticket})
                again[ticket] = _seen(next(augmenter))
    return [
        Difference(ticket, (cases, again[ticket][0]), _unlike(made, again[ticket][1]))
        for ticket, (cases, made) in enumerate(once)
        if made != again[ticket][1]
    ]


def _seen(batch: Any) -> tuple[tuple[str, ...], Digest]:
    keys = batch.get("keys") if isinstance(batch, dict) else None
    return tuple(map(str, () if keys is None else keys)), digest(batch)


def _as_the_next_worker(loader: Any) -> Any:
    """A copy that takes itself for the next worker's, where it can be told which it is."""
    if not hasattr(loader, "set_thread_id"):
        return loader
    other = copy.copy(loader)
    with contextlib.suppress(AttributeError):  # one with __slots__ is told the truth
        other.set_thread_id = functools.partial(_tell_next, other.set_thread_id)
    return other


def _tell_next(set_thread_id: Callable[[int], None], thread_id: int) -> None:
    set_thread_id(thread_id + 1)


def _unlike(one: Digest, other: Digest) -> tuple[str, ...]:
    first, second = dict(one.parts), dict(other.parts)
    names = dict.fromkeys([*first, *second])
    return tuple(name for name in names if first.get(name) != second.get(name))


class Killer:
    """Kills workers of one augmenter (of either class), at moments and in ways that follow from a seed.

    Attributes:
        kills: what was done: (pid, signal), oldest first.
    """

    def __init__(
        self, augmenter: PoolRunner, *, seed: int, signals: Sequence[signal.Signals] = (signal.SIGKILL,)
    ) -> None:
        self.kills: list[tuple[int, signal.Signals]] = []
        self._augmenter = augmenter
        self._random = random.Random(seed)
        self._signals = tuple(signals)

    def maybe(self, *, every: float) -> bool:
        """Kill with probability 1 / `every`; whether it did."""
        return self._random.random() < 1 / every and self.strike()

    def strike(self) -> bool:
        """Kill one of the workers that run now; False if none does, or it died by itself in this moment."""
        pids = [worker.pid for worker in self._augmenter.workers() if worker.pid is not None]
        if not pids:
            return False
        pid, deadly = self._random.choice(pids), self._random.choice(self._signals)
        try:
            os.kill(pid, deadly)
        except ProcessLookupError:
            return False
        self.kills.append((pid, deadly))
        return True


class Orders:
    """Deeds that a test orders and a worker does, in a stage of its work: for what no signal can cause from outside.

    The loader (or transform) has a copy and calls `obey` where it may be struck. An order is a file in a folder, and
    who can remove it has to obey: so each is obeyed once, whoever dies of it. One call obeys one order: a process
    that stopped itself and is continued, so that it can write its stacks, runs on for a moment before it ends.

    Args:
        folder: where the orders lie; it is made.
        deeds: what can be ordered, by name.
    """

    def __init__(self, folder: str | Path, deeds: Mapping[str, Callable[[], object]]) -> None:
        self.folder = Path(folder)
        self.deeds = dict(deeds)
        self._given = 0
        self.folder.mkdir(parents=True, exist_ok=True)

    def give(self, deed: str, stage: str) -> None:
        """Whoever next calls `obey` with this stage does the deed; of several, each does one, in any order."""
        if deed not in self.deeds:
            raise KeyError(f"no deed {deed!r}: there are {', '.join(sorted(self.deeds))}")
        self._given += 1
        (self.folder / f"{stage}:{deed}:{self._given}").touch()

    def obey(self, stage: str) -> None:
        """Do one thing that is ordered for this stage and nobody has done, if there is one."""
        for name in os.listdir(self.folder):
            ordered, deed, _ = name.split(":")
            if ordered != stage:
                continue
            try:
                (self.folder / name).unlink()
            except FileNotFoundError:  # another worker was faster
                continue
            self.deeds[deed]()
            return

    def withdraw(self, deed: str = "*") -> None:
        """Take back what nobody has obeyed yet."""
        for order in list(self.folder.glob(f"*:{deed}:*")):
            order.unlink(missing_ok=True)
