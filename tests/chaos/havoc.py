"""A real nnU-Net loader that can be ordered to fail, and somebody who orders it, at moments that follow from a seed.

    Havoc (a thread of the test) ──► signals to workers and nurseries
                                 ──► an order: a file ──► the first worker that finds it obeys, in the stage it names
                                 ──► the files of a case, or of all: unreadable for a moment, then as before

Nothing that it does lasts: whatever is taken away comes back within seconds, and every order is obeyed once. So with
`on_bad_case="retry"` the stream must be the one that nobody has disturbed.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

from batchgeneratorsv2.transforms.intensity.brightness import MultiplicativeBrightnessTransform
from batchgeneratorsv2.transforms.intensity.gaussian_noise import GaussianNoiseTransform
from batchgeneratorsv2.transforms.spatial.mirroring import MirrorTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from safeloader import SafeAugmenter
from safeloader.testing import Orders
from tests import damage, loaders
from tests.processes import children

CASES: Final = 8
_PATCH: Final = (16, 16, 16)


class DisorderError(Exception):
    """What an ordered exception is."""


# ---- orders, in workers ----


def raise_disorder() -> None:
    raise DisorderError("as ordered")


def raise_eio() -> None:
    raise OSError(errno.EIO, "as ordered", "case.b2nd")


DEEDS: Final[dict[str, Callable[[], object]]] = {
    "null-read": loaders.read_null,
    "truncated-mmap": loaders.read_truncated_mmap,
    "double-free": loaders.free_twice,
    "abort": os.abort,
    "exit": functools.partial(os._exit, 3),
    "kill": functools.partial(loaders.send_self, int(signal.SIGKILL)),
    "stop": functools.partial(loaders.send_self, int(signal.SIGSTOP)),
    "sleep": loaders.sleep_for_ever,
    "spin": loaders.spin_for_ever,
    "hold-lock": loaders.hold_the_interpreter_lock_for_ever,
    "deadlock": loaders.lock_twice,
    "raise": raise_disorder,
    "eio": raise_eio,
}
RAISES: Final = ("raise", "eio")
STAGES: Final = ("loading", "transforming", "encoding")


class Dataset(nnUNetDatasetBlosc2):
    """nnU-Net's own, which obeys while it loads a case."""

    orders: Orders | None = None

    def load_case(self, identifier: str) -> Any:
        if self.orders is not None:
            self.orders.obey("loading")
        return super().load_case(identifier)


class Pipeline:
    """A part of nnU-Net's augmentation, which obeys before it augments a sample."""

    def __init__(self, orders: Orders | None) -> None:
        self.orders = orders
        self.transforms = ComposeTransforms(
            [
                RandomTransform(GaussianNoiseTransform((0, 0.1), p_per_channel=1, synchronize_channels=True), 0.5),
                RandomTransform(MultiplicativeBrightnessTransform((0.75, 1.25), True, p_per_channel=1), 0.5),
                MirrorTransform((0, 1, 2)),
            ]
        )

    def __call__(self, **sample: Any) -> Any:
        if self.orders is not None:
            self.orders.obey("transforming")
        return self.transforms(**sample)


class Parcel:
    """Obeys while it is pickled, and arrives as a number."""

    def __init__(self, orders: Orders) -> None:
        self.orders = orders

    def __reduce__(self) -> tuple[type, tuple[int]]:
        self.orders.obey("encoding")
        return int, (7,)


def pack(orders: Orders, **batch: Any) -> dict[str, Any]:
    """The augmenter's transform."""
    return {**batch, "parcel": Parcel(orders)}


def make_loader(folder: Path, orders: Orders | None) -> nnUNetDataLoader:
    """A real nnU-Net loader over eight tiny cases; without orders, one that nobody disturbs."""
    for number in range(CASES):
        if not (folder / f"case_{number:03d}.pkl").exists():
            damage.make_case(folder, f"case_{number:03d}", seed=number)
    dataset = Dataset(str(folder))
    dataset.orders = orders
    label_manager = SimpleNamespace(all_labels=[1, 2], has_ignore_label=False)
    return nnUNetDataLoader(
        dataset, 2, _PATCH, _PATCH, label_manager, oversample_foreground_percent=0.5, transforms=Pipeline(orders)
    )


# ---- who gives them ----


class Havoc:
    """Does something bad to two pools every now and then, from a thread of its own.

    A new fault comes only once every pool has delivered a batch since the last: pools that never deliver give up,
    and they should.

    Attributes:
        log: what was done, oldest first. count: how many faults.
        error: what ended the thread too early: a bug of this test.
    """

    def __init__(self, folder: Path, orders: Orders, pools: list[SafeAugmenter], chance: random.Random) -> None:
        self.log: list[str] = []
        self.count = 0
        self._folder, self._orders, self._pools, self._chance = folder, orders, pools, chance
        self._started = time.monotonic()
        self._delivered = [-1] * len(pools)
        self._ending = threading.Event()
        self._may_order = threading.Event()
        self._thread = threading.Thread(target=self._run, name="havoc")
        self.error: BaseException | None = None
        self._faults: list[tuple[float, Callable[[], str | None]]] = [
            (6, self._signal_worker),
            (6, self._order),
            (1, self._signal_all),
            (0.7, self._signal_nursery),
            (2, self._eio),
            (1, self._away),
        ]

    @contextlib.contextmanager
    def raging(self) -> Iterator[Havoc]:
        self._thread.start()
        try:
            yield self
        finally:
            self.stop()

    def stop(self) -> None:
        """No more of it; what was taken away is back when this returns."""
        self._ending.set()
        self._thread.join()
        self._orders.withdraw()

    def note(self, what: str) -> None:
        self.log.append(f"{time.monotonic() - self._started:8.3f} s: {what}")

    def _run(self) -> None:
        try:
            while not self._ending.wait(self._chance.expovariate(1 / 0.12)):
                if self._all_have_delivered():
                    weights, faults = zip(*self._faults, strict=True)
                    did = self._chance.choices(faults, weights)[0]()
                    if did is not None:
                        self.count += 1
                        self.note(did)
        except BaseException as error:  # noqa: BLE001 - the thread's outermost boundary: the test raises it
            self.error = error

    def _all_have_delivered(self) -> bool:
        delivered = [pool.report().batches for pool in self._pools]
        if any(now <= before for now, before in zip(delivered, self._delivered, strict=True)):
            return False
        self._delivered = delivered
        return True

    def _signal_worker(self) -> str | None:
        number = self._chance.choice([*_SIGNALS, signal.SIGSTOP])
        pool = self._chance.choice(self._pools)
        return self._signal(number, [w.pid for w in pool.workers() if w.pid is not None], some=1)

    def _signal_all(self) -> str | None:
        number = self._chance.choice([*_SIGNALS, signal.SIGSTOP])
        pids = [w.pid for pool in self._pools for w in pool.workers() if w.pid is not None]
        return self._signal(number, pids, some=self._chance.randint(2, 4))

    def _signal(self, number: signal.Signals, pids: list[int], *, some: int) -> str | None:
        victims = self._chance.sample(pids, min(some, len(pids)))
        for pid in victims:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        return f"{number.name} to worker {victims}" if victims else None

    def _signal_nursery(self) -> str | None:
        nurseries = [nursery.pid for nursery in children("sl-nurs")]
        if not nurseries:
            return None
        pid, number = self._chance.choice(nurseries), self._chance.choice([signal.SIGKILL, signal.SIGSTOP])
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
        return f"{number.name} to nursery {pid}"

    def _order(self) -> str | None:
        deed = self._chance.choice(list(DEEDS))
        # Where the case is not known, the second exception on one ticket is raised; where nothing has worked yet, too.
        stage = self._chance.choice(STAGES[:2] if deed in RAISES else STAGES)
        if deed in RAISES and not self._may_order.is_set():
            return None
        self._orders.give(deed, stage)
        return f"order: {deed} while {stage}"

    def let_raise(self, allowed: bool) -> None:
        """Whether exceptions may be ordered: those before a pool's first batch end it, by design."""
        if allowed:
            self._may_order.set()
        else:
            self._may_order.clear()
            for deed in RAISES:
                self._orders.withdraw(deed)

    def _eio(self) -> str | None:
        case = f"case_{self._chance.randrange(CASES):03d}"
        suffix = self._chance.choice([".b2nd", "_seg.b2nd", ".pkl"])
        return self._for_a_moment(f"EIO for {case}{suffix}", damage.replace_by_eio, self._folder / f"{case}{suffix}")

    def _away(self) -> str | None:
        return self._for_a_moment("the folder is away", damage.remove, self._folder)

    def _for_a_moment(self, what: str, damaging: Callable[[Path], damage.Restore], path: Path) -> str:
        seconds = self._chance.uniform(0.05, 1.0)
        restore = damaging(path)
        self.note(f"{what} for {seconds:.2f} s")
        try:
            self._ending.wait(seconds)
        finally:
            with contextlib.suppress(FileNotFoundError):
                if path.is_symlink():
                    path.unlink()
            restore()
        return f"{what}: over"


_SIGNALS: Final = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGTERM)
