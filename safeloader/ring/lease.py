"""The consumer's hold on a slot: it ends when the last tensor, view or array on the slot's storage is gone.

Not when a Python tensor object is: `batch["data"][0]`, `.numpy()` and reshaped views keep the storage, and the
storage keeps the object whose end is watched here.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable

import numpy as np


def lease(memory: mmap.mmap, on_release: Callable[[], None]) -> memoryview:
    """A writable view on a slot's memory; `on_release` runs once when nothing refers to it any more.

    Every buffer sliced from the view holds it, and with it the mapping. `on_release` may run in any thread, at any
    moment at which Python collects garbage: it must take no lock.
    """
    root = np.frombuffer(memory, dtype=np.uint8)
    weakref.finalize(root, on_release).atexit = False
    return root.data
