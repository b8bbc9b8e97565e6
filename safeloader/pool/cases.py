"""Which case a worker has in hand, and which cases it passes over.

For batchgenerators' `DataLoader` and nnU-Net's this needs nothing from the user: in the worker, the loader's own
methods are wrapped (`get_indices` draws the cases, `load_case` reads one, `transforms` works on it). The case is on
the status page before its data is touched. Other loaders call `safeloader.note_case(case)`.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
from collections.abc import Callable, Iterable
from typing import Any, Final

from safeloader.pool.kept import keeping_files_open
from safeloader.ring.status_page import Stage

_MAX_CASE_CHARS: Final = 200
_MAX_CASES: Final = 256
_MAX_CASES_NBYTES: Final = 32 << 10
"""Cases of one batch that the trainer is told of, and how long their names may be together: a message must stay
small."""


class PassOver(BaseException):
    """The draw holds a case that is quarantined: it is given up before any data is read."""


class Cases:
    """The cases of one worker.

    Args:
        enter: called with the stage and the cases in hand whenever that changes.

    Attributes:
        watched: names of the loader's attributes that were wrapped.
        transforms: the loader's own `transforms`, if they were.
    """

    _current: Cases | None = None  # of this process: what `note_case` speaks to

    def __init__(self, enter: Callable[[Stage, tuple[str, ...]], None]) -> None:
        self._enter = enter
        self._avoided: set[str] = set()
        self._batch: list[str] = []
        self._in_hand: str | None = None
        self._can_pass_over = True
        self.watched: set[str] = set()
        self.transforms: Callable[..., Any] | None = None

    def attach(self, loader: Any) -> int | None:
        """Watch a loader from here on; returns how many cases it draws from, or None if that is not known."""
        Cases._current = self
        # A generator is finished once an exception has gone through it.
        self._can_pass_over = not inspect.isgenerator(loader)
        indices = getattr(loader, "indices", None)
        get_indices = getattr(loader, "get_indices", None)
        if indices is None or not callable(get_indices):
            return None
        with contextlib.suppress(AttributeError):  # a loader with __slots__ is not watched
            loader.get_indices = functools.partial(self._get_indices, get_indices)
            self.watched.add("get_indices")
            transforms = getattr(loader, "transforms", None)
            if callable(transforms):
                self.transforms = transforms
                loader.transforms = self._transform
                self.watched.add("transforms")
            dataset = getattr(loader, "_data", None)
            if dataset is not None and callable(getattr(dataset, "load_case", None)):
                dataset.load_case = functools.partial(self._load_case, keeping_files_open(dataset))
        return len(indices)

    def avoid(self, cases: Iterable[str]) -> None:
        """Pass over draws that hold these, too."""
        self._avoided.update(cases)

    def begin(self) -> None:
        """A new draw."""
        self._batch.clear()
        self._in_hand = None

    @property
    def batch(self) -> tuple[str, ...]:
        """The cases of the present draw, each once, as far as they are known."""
        named = list(dict.fromkeys(self._batch))[:_MAX_CASES]
        ends = itertools.accumulate(len(name.encode(errors="replace")) for name in named)
        return tuple(name for name, end in zip(named, ends, strict=True) if end <= _MAX_CASES_NBYTES)

    def made(self, batch: Any) -> None:
        """The loader has returned this: it names its cases itself, where it is one of nnU-Net's kind."""
        keys = batch.get("keys") if isinstance(batch, dict) else None
        if not self._batch and keys is not None:
            with contextlib.suppress(TypeError):
                self._batch.extend(_clip(key) for key in keys)

    def note(self, case: object) -> None:
        """This case is in hand now."""
        name = _clip(case)
        self._batch.append(name)
        self._enter(Stage.LOADING, (name,))
        self._check((name,))

    def _check(self, cases: Iterable[str]) -> None:
        if self._can_pass_over and not self._avoided.isdisjoint(cases):
            raise PassOver

    # ---- what the loader's own methods become ----

    def _get_indices(self, original: Callable[[], Any]) -> Any:
        drawn = original()
        names = [_clip(index) for index in drawn]
        self._batch.extend(names)
        self._check(names)
        self._enter(Stage.LOADING, self.batch)
        return drawn

    def _load_case(self, original: Callable[..., Any], identifier: Any, *args: Any, **kwargs: Any) -> Any:
        self._in_hand = _clip(identifier)
        self._enter(Stage.LOADING, (self._in_hand,))
        return original(identifier, *args, **kwargs)

    def _transform(self, *args: Any, **kwargs: Any) -> Any:
        assert self.transforms is not None
        in_hand = self.batch if self._in_hand is None else (self._in_hand,)
        self._enter(Stage.TRANSFORMING, in_hand)
        transformed = self.transforms(*args, **kwargs)
        self._enter(Stage.LOADING, in_hand)
        return transformed


def note_case(case: object) -> None:
    """Tell SafeLoader which case your loader is about to read: call it in `__next__`, before its data is touched.

    What goes wrong from here on (a crash, a hang, an exception) is put down to this case. A case that has cost two
    workers is not drawn again: this call then ends the present `next()` by an exception of its own, which your code
    must let pass, and SafeLoader calls `next()` again with other random numbers. (Loaders that are generators can't
    go on after an exception; for them it only tells.) Outside a worker it does nothing.

    Args:
        case: the sample's identifier; its `str` is what messages say.
    """
    if Cases._current is not None:
        Cases._current.note(case)


def _clip(case: object) -> str:
    return str(case).replace("\n", " ")[:_MAX_CASE_CHARS]
