"""The consumer's hold on a slot: it ends when the last tensor, view or array on the slot's storage is gone.

Not when a Python tensor object is: `batch["data"][0]`, `.numpy()` and reshaped views keep the storage, and the
storage keeps the object whose end is watched here.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np


class Lease(weakref.ref[Any]):
    """A weak reference to the memory of `slot`: dead when nothing refers to that any more.

    Attributes:
        user: what the training loop holds, where a copy to the GPU may hold the memory for longer; see `pinning`.
    """

    __slots__ = ("_alarm", "slot", "user")

    slot: int
    user: weakref.ref[Any] | None
    _alarm: weakref.ref[Any]

    @property
    def in_use(self) -> bool:
        """Whether the memory is alive, and not for the sake of a copy alone."""
        return self() is not None and (self.user is None or self.user() is not None)


def lease(memory: mmap.mmap, slot: int, ended: deque[Lease], alarm: Callable[[], None]) -> tuple[memoryview, Lease]:
    """A writable view on a slot's memory, and the lease on it, which adds itself to `ended` when it ends.

    Every buffer sliced from the view holds it, and with it the mapping. It may end in any thread, at any moment at
    which Python collects garbage. Adding it takes no line of Python, so no signal (Ctrl-C in a notebook) can
    interrupt it half-way and lose the slot. `alarm` is called then, too; it must take no lock, and may get lost.
    """
    root = np.frombuffer(memory, dtype=np.uint8)
    heard = weakref.ref(root, lambda _: alarm())
    held = Lease(root, ended.append)  # the newest reference is told first
    held.slot, held.user, held._alarm = slot, None, heard
    return root.data, held
