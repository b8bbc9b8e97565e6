"""The consumer's hold on a slot: it ends when the last tensor, view or array on the slot's storage is gone.

Not when a Python tensor object is: `batch["data"][0]`, `.numpy()` and reshaped views keep the storage, and the
storage keeps the object whose end is watched here.
"""

from __future__ import annotations

import mmap
import operator
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any, Final

import numpy as np

_SOUND: Final = operator.methodcaller("alarm")


class Lease(weakref.ref[Any]):
    """A weak reference to the memory of `slot`: dead when nothing refers to that any more.

    Attributes:
        user: what the training loop holds, where a copy to the GPU may hold the memory for longer; see `pinning`.
    """

    __slots__ = ("_heard", "slot", "user")

    slot: int
    user: weakref.ref[Any] | None
    _heard: _Heard

    @property
    def in_use(self) -> bool:
        """Whether the memory is alive, and not for the sake of a copy alone."""
        return self() is not None and (self.user is None or self.user() is not None)


class _Heard(weakref.ref[Any]):
    """A second reference to that memory, whose end calls `alarm`."""

    __slots__ = ("alarm",)

    alarm: Callable[[], None]


def lease(memory: mmap.mmap, slot: int, ended: deque[Lease], alarm: Callable[[], None]) -> tuple[memoryview, Lease]:
    """A writable view on a slot's memory, and the lease on it, which adds itself to `ended` when it ends.

    Every buffer sliced from the view holds it, and with it the mapping. It may end in any thread, at any moment at
    which Python collects garbage; `alarm` is called then, too. Neither takes a line of Python, and `alarm` must not: a
    signal's handler could run there, and Python drops what is raised in a callback of a weak reference. So Ctrl-C
    is never lost in here, nor is the slot.
    """
    root = np.frombuffer(memory, dtype=np.uint8)
    heard = _Heard(root, _SOUND)
    heard.alarm = alarm
    held = Lease(root, ended.append)  # the newest reference is told first
    held.slot, held.user, held._heard = slot, None, heard
    return root.data, held
