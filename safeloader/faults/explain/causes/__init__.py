"""What is known to end nnU-Net trainings, as data: one module per theme.

    compiling.py, gpu.py      R1           the training process itself
    device.py                 R1, R9       a GPU that failed, or that can't be used
    data.py                   R2           files and storage
    memory.py                 R3, R4       memory, /dev/shm
    limits.py                 R5, R8       threads, descriptors, full disks
    native.py                 R5           crashes in native code
    loading.py                R6, R7       loader and transforms, hangs
    installation.py           R10          platforms and packages
    scheduler.py                           ended from outside
    own.py                                 SafeLoader's own errors
    echoes.py, unknown.py                  what is no cause: echoes, and the answers of those who don't know

Signs are what programs print, learnt from the threads that each cause names and from failures made to order (see
`tests/unit/logs`). To add a cause: one entry in its module, one log, one row in `tests/unit/test_explain.py`.
"""

from __future__ import annotations

from typing import Final

from safeloader.faults.explain.causes import (
    compiling,
    data,
    device,
    gpu,
    installation,
    limits,
    loading,
    memory,
    native,
    own,
    scheduler,
)
from safeloader.faults.explain.causes.echoes import ECHOES
from safeloader.faults.explain.model import Cause

__all__ = ["BY_KEY", "CAUSES", "ECHOES"]

CAUSES: Final[tuple[Cause, ...]] = (
    *compiling.CAUSES,
    *gpu.CAUSES,
    *device.CAUSES,
    *data.CAUSES,
    *memory.CAUSES,
    *limits.CAUSES,
    *native.CAUSES,
    *loading.CAUSES,
    *installation.CAUSES,
    *scheduler.CAUSES,
    *own.CAUSES,
)
BY_KEY: Final = {cause.key: cause for cause in CAUSES}
