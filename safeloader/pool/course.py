"""In the worker: a loader that goes on from batch to batch, and how another process takes it up where it was.

Batch n of such a loader depends on what it has made before: where it stands in the epoch, how it has shuffled, what its
generators have drawn. So after each batch the worker keeps the state that the next one begins with (`ring.bookmark`):

    loader and transform ── pickled, but for the dataset ──┐
    random, numpy.random, torch ───────────────────────────┴─► bookmark ─► the next incarnation, or a second try

The dataset is what batchgenerators' loaders call `_data`: it is taken to stay as it is. A loader that can't be pickled
(a generator) or has a state of more than 4 MiB is run again from its beginning instead, which takes as long as all its
batches took.
"""

from __future__ import annotations

import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from safeloader.pool import wire
from safeloader.pool.cases import Cases, PassOver
from safeloader.pool.seeding import draw_on, drawn_so_far, seed_everything
from safeloader.pool.work import Bounded, ByValuePickler, EpochEnd, Work
from safeloader.ring.bookmark import MAX_STATE_NBYTES, Bookmark

_DATASET: Final = "dataset"
_MAX_PASSED_OVER: Final = 1000
"""Draws in a row that may all hold a quarantined case."""


class Course:
    """The course of one worker.

    Args:
        order: the worker's.
        work: loader and transform.
        cases: what watches the loader.
        bookmark: where its state is kept.
        progress: called after each batch that is run again.
    """

    def __init__(
        self, order: wire.Fork, work: Work, cases: Cases, bookmark: Bookmark, progress: Callable[[], None]
    ) -> None:
        assert order.course is not None
        self._order, self._lane = order, order.course
        self.loader, self.transform = work.loader, work.transform
        self._cases, self._bookmark, self._progress = cases, bookmark, progress
        self._keeps = not inspect.isgenerator(work.loader)
        self._at = 0
        self._disturbed = False

    def begin(self) -> None:
        """Seed as the stock class does: once, with the seed of this worker."""
        seed_everything(self._order.seed, self._order.stream, self._order.worker)
        if self._lane.numpy_seed is not None:
            np.random.seed(self._lane.numpy_seed)
        if self._bookmark.empty:  # else it holds what this incarnation is to go on from
            self._keep()

    def go_to(self, ticket: int, attempt: int) -> bool:
        """Bring everything into the state before the ticket's batch; False if only a new process can.

        `attempt` counts the draws that were given up: the batch is the same, made of other random numbers.
        """
        number = (ticket - self._order.worker) // self._lane.lanes
        if self._at != number or self._disturbed:
            state = self._bookmark.read(number)
            if state is not None:
                self._restore(state)
            elif self._disturbed or self._at > number:
                return False
            else:
                self._run_again(number)
            self._at, self._disturbed = number, False
        if attempt:
            seed_everything(self._order.seed, self._order.stream, ticket, attempt)
        self._disturbed = True  # until the batch is made
        return True

    def load(self) -> Any:
        """The loader's next batch, or `EpochEnd`."""
        for _ in range(_MAX_PASSED_OVER):
            self._cases.begin()
            try:
                return next(self.loader)
            except StopIteration:
                return EpochEnd()
            except PassOver:
                self._progress()
        raise RuntimeError(f"each of {_MAX_PASSED_OVER} batches in a row holds a case that is quarantined")

    def made(self) -> None:
        """The batch is in its slot: from here on the next one is due."""
        self._at += 1
        self._disturbed = False
        self._keep()

    # ---- inside ----

    def _run_again(self, number: int) -> None:
        while self._at < number:
            batch = self.load()
            if self.transform is not None and not isinstance(batch, EpochEnd):
                self.transform(**batch)
            self._at += 1
            self._progress()

    def _keep(self) -> None:
        """Keep the present state; what can't be kept once is not tried again."""
        if not self._keeps:
            return
        out = Bounded(MAX_STATE_NBYTES)
        try:
            _Pickler(out, getattr(self.loader, "_data", None)).dump((drawn_so_far(), self._state(), self.transform))
        except Exception:  # noqa: BLE001 - a user's __reduce__ may raise anything; it means: not this one
            self._keeps = False
            return
        self._bookmark.write(self._at, out.getvalue())

    def _state(self) -> Any:
        """What changes of the loader: its attributes, or where it has none, itself."""
        if not hasattr(self.loader, "__dict__"):
            return self.loader
        own = {name: value for name, value in vars(self.loader).items() if name not in self._cases.watched}
        return own, self._cases.transforms

    def _restore(self, state: bytes) -> None:
        drawn, loader, self.transform = _Unpickler(io.BytesIO(state), getattr(self.loader, "_data", None)).load()
        if hasattr(self.loader, "__dict__"):
            own, self._cases.transforms = loader
            attributes = vars(self.loader)
            for name in attributes.keys() - own.keys() - self._cases.watched:
                del attributes[name]
            attributes.update(own)
        else:
            self.loader = loader
        draw_on(drawn)


class _Pickler(ByValuePickler):
    """Everything by value but the dataset."""

    def __init__(self, file: io.BytesIO, dataset: object) -> None:
        super().__init__(file, protocol=5)
        self._dataset = dataset

    def persistent_id(self, obj: object) -> str | None:
        return _DATASET if obj is self._dataset and obj is not None else None


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, dataset: object) -> None:
        super().__init__(file)
        self._dataset = dataset

    def persistent_load(self, pid: object) -> object:
        assert pid == _DATASET
        return self._dataset
