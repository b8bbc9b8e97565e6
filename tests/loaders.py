"""Loaders that the tests share. They live in a module of their own, so that they are pickled by name."""

from __future__ import annotations

import ctypes
import mmap
import os
import random
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batchgenerators.dataloading.data_loader import DataLoader


class RandomLoader:
    """An endless loader whose batch shows all three random streams. `data` is `(b, c, z, y, x)` float32."""

    def __init__(self, shape: tuple[int, ...] = (2, 1, 8, 8, 8)) -> None:
        self.shape = shape
        self.thread_id = 0

    def set_thread_id(self, thread_id: int) -> None:
        self.thread_id = thread_id

    def __iter__(self) -> RandomLoader:
        return self

    def __next__(self) -> dict[str, Any]:
        return {
            "data": torch.randn(self.shape),
            "seg": np.random.randint(0, 3, self.shape).astype(np.int16),
            "draw": random.random(),
            "keys": [f"case_{np.random.randint(100):03d}" for _ in range(2)],
        }


class Shuffled(DataLoader):  # type: ignore[misc]  # upstream has no types
    """A finite loader of batchgenerators' kind: `size` cases in batches of two, shuffled anew in every epoch.

    A batch shows its cases, what NumPy draws, and how often this copy of the loader was asked.
    """

    def __init__(self, size: int, workers: int, *, seed: int | None = 1, infinite: bool = False) -> None:
        super().__init__(list(range(size)), 2, workers, seed, return_incomplete=True, infinite=infinite)
        self.indices = [f"case_{number:03d}" for number in range(size)]
        self.asked = 0

    def generate_train_batch(self) -> dict[str, Any]:
        cases = self.get_indices()
        self.asked += 1
        return {"cases": [str(case) for case in cases], "noise": np.random.rand(3).tolist(), "asked": self.asked}


def compute(cpu_s: float) -> None:
    """Take so much CPU time, however long that takes."""
    until = time.process_time() + cpu_s
    while time.process_time() < until:
        pass


def fingerprint(batch: dict[str, Any]) -> tuple[bytes, bytes, float, tuple[str, ...]]:
    """Everything in a `RandomLoader`'s batch, bit for bit."""
    return batch["data"].numpy().tobytes(), batch["seg"].tobytes(), batch["draw"], tuple(batch["keys"])


class Saboteur(RandomLoader):
    """A `RandomLoader` during which one process, once, does its `deed`: in the given stage, on its second batch.

    `marker` is a file that the first to strike creates, so that its replacement survives. `transform` is the
    transform that belongs to it.
    """

    def __init__(self, deed: Callable[[], object], stage: str, marker: Path) -> None:
        super().__init__()
        self.deed, self.stage, self.marker = deed, stage, marker
        self.made = 0

    def strike(self, stage: str) -> None:
        if stage == self.stage and (stage == "starting" or self.made > 1):
            try:
                self.marker.touch(exist_ok=False)
            except FileExistsError:
                return
            self.deed()

    def set_thread_id(self, thread_id: int) -> None:
        super().set_thread_id(thread_id)
        self.strike("starting")

    def __next__(self) -> dict[str, Any]:
        self.made += 1
        self.strike("loading")
        return {**super().__next__(), "saboteur": self}

    @staticmethod
    def transform(saboteur: Saboteur, **batch: Any) -> dict[str, Any]:
        saboteur.strike("transforming")
        return {**batch, "meta": ["nested", {"bomb": Bomb(saboteur)}]}


class Bomb:
    """Strikes while it is pickled, and arrives as its loader's number of batches."""

    def __init__(self, saboteur: Saboteur) -> None:
        self.saboteur = saboteur

    def __reduce__(self) -> tuple[type, tuple[int]]:
        self.saboteur.strike("encoding")
        return int, (self.saboteur.made,)


class Deadly(RandomLoader):
    """Does its `deed` every time in the given stage, "starting" or "loading"."""

    def __init__(self, deed: Callable[[], object], stage: str) -> None:
        super().__init__()
        self.deed, self.stage = deed, stage

    def set_thread_id(self, thread_id: int) -> None:
        super().set_thread_id(thread_id)
        if self.stage == "starting":
            self.deed()

    def __next__(self) -> dict[str, Any]:
        if self.stage == "loading":
            self.deed()
        return super().__next__()


class DeadlyOncePerBatch(RandomLoader):
    """Whoever makes a batch first dies of it; about every second batch is one of those."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __next__(self) -> dict[str, Any]:
        state = np.random.get_state(legacy=False)["state"]["key"][
            1:3
        ]  # follows from the ticket; drawing would change it
        if state[0] % 2:
            try:
                (self.folder / f"{state[0]}-{state[1]}").touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__next__()


class DeadlyOnceTold(RandomLoader):
    """From the moment on in which the file `flag` is there, nobody makes a batch any more."""

    def __init__(self, flag: Path) -> None:
        super().__init__()
        self.flag = flag

    def __next__(self) -> dict[str, Any]:
        if self.flag.exists():
            os._exit(5)
        return super().__next__()


# ---- deeds ----


def send_self(number: int) -> None:
    os.kill(os.getpid(), number)


def read_null() -> None:
    ctypes.string_at(0)


def read_truncated_mmap() -> None:
    with tempfile.TemporaryFile() as file:
        file.truncate(8192)
        with mmap.mmap(file.fileno(), 8192) as memory:
            file.truncate(0)
            memory[4096]


def free_twice() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    address = ctypes.c_void_p(libc.malloc(64))
    libc.free(address)
    libc.free(address)


def use_4_gib() -> None:
    np.ones(4 << 30, dtype=np.uint8)


# ---- ways to make no progress ----


def sleep_for_ever() -> None:
    time.sleep(3600)


def spin_for_ever() -> None:
    while True:
        pass


def hold_the_interpreter_lock_for_ever() -> None:
    ctypes.PyDLL(None).sleep(3600)  # PyDLL calls C without letting go of the lock


def lock_twice() -> None:
    """Deadlock in native code, on a lock whose holder is itself."""
    libc = ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(64)
    libc.pthread_mutex_init(mutex, None)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)


def read_from_stalled_storage() -> None:
    """A FIFO that nobody writes to: `open` blocks in the kernel, as on an NFS server that does not answer."""
    with tempfile.TemporaryDirectory() as folder:
        os.mkfifo(Path(folder) / "case.b2nd")
        os.open(Path(folder) / "case.b2nd", os.O_RDONLY)


_PR_SET_PDEATHSIG = 1


def sleep_uninterruptibly() -> None:
    """State D: a parent in vfork waits for its child, and only SIGKILL ends that."""
    libc = ctypes.CDLL(None)
    if libc.vfork() == 0:
        libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
        libc.pause()


def be_frozen(cgroup: Path) -> None:
    """A frozen cgroup: not even SIGKILL ends what is in there."""
    (cgroup / "cgroup.procs").write_text(str(os.getpid()))
    (cgroup / "freezer.state").write_text("FROZEN")
    time.sleep(3600)
