"""What stands for `multiprocessing` in nnU-Net's modules while a validation runs.

    with multiprocessing.get_context("spawn").Pool(8) as pool:      what nnU-Net writes
        results.append(pool.starmap_async(function, (arguments,)))
        check_workers_alive_and_busy(pool, pool._pool, results)
        results[0].get()

All pools that it gives are one and the same: what exports evaluates afterwards, and is not started again.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any

from safeloader.faults.cpus import CpuBudget
from safeloader.nnunet.export.job import Job
from safeloader.nnunet.export.pool import ExportPool, Told


class Multiprocessing:
    """The module and its contexts in one; whatever else is asked for is the real module's.

    Args:
        cpus: what this process may use: there are never more processes.
        told: whom the pool tells.
        timeout_s: see `ExportPool`.
    """

    def __init__(self, cpus: CpuBudget, told: Told, timeout_s: float | None) -> None:
        self._cpus = cpus
        self._told = told
        self._timeout_s = timeout_s
        self.export_pool: ExportPool | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(multiprocessing, name)

    def get_context(self, method: str | None = None) -> Multiprocessing:  # noqa: ARG002 - ours are always spawned
        """Nnu-Net asks for "spawn"."""
        return self

    def Pool(self, processes: int | None = None) -> SafePool:  # noqa: N802 - the name that nnU-Net uses
        """The pool, with at most so many processes."""
        if self.export_pool is None:
            asked = processes or self._cpus.cpus
            allowed = max(1, min(asked, self._cpus.cpus))
            if allowed < asked:
                self._told.say(f"SafeLoader: {allowed} export processes instead of {asked}: {self._cpus.reason}")
            self.export_pool = ExportPool(allowed, self._told, self._timeout_s)
        return SafePool(self.export_pool)

    def close(self) -> None:
        """End all processes."""
        if self.export_pool is not None:
            self.export_pool.close()


class Seat:
    """What `pool._pool` lists: a place for a process. Whoever dies there is replaced, so it counts as alive."""

    def is_alive(self) -> bool:
        """Always."""
        return True


class Result:
    """What `starmap_async` returns."""

    def __init__(self, pool: ExportPool, jobs: Sequence[Job]) -> None:
        self._pool = pool
        self._jobs = jobs

    def ready(self) -> bool:
        """Whether `get` would return, or raise, at once."""
        if not all(job.settled for job in self._jobs):
            self._pool.turn()
        return all(job.settled for job in self._jobs)

    def get(self) -> list[Any]:
        """What the calls returned, in order.

        Raises:
            ExportError: one of them can't be done. All that was submitted has ended then.
        """
        self._pool.finish(self._jobs)
        return [job.value for job in self._jobs]


class SafePool:
    """The part of `multiprocessing.Pool` that nnU-Net's validation and evaluation use."""

    def __init__(self, pool: ExportPool) -> None:
        self._export_pool = pool

    @property
    def _pool(self) -> list[Seat]:
        """Nnu-Net asks how many there are: with so many and two more in hand, it waits before it predicts."""
        return [Seat() for _ in range(self._export_pool.processes)]

    def __enter__(self) -> SafePool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """The processes go on to the next pool; `Multiprocessing.close` ends them."""

    def starmap_async(self, function: Callable[..., Any], calls: Iterable[Sequence[Any]]) -> Result:
        """Have the function called once per tuple of arguments."""
        return Result(self._export_pool, [self._export_pool.submit(function, arguments) for arguments in calls])

    def starmap(self, function: Callable[..., Any], calls: Iterable[Sequence[Any]]) -> list[Any]:
        """The same, and wait."""
        return self.starmap_async(function, calls).get()

    def map(self, function: Callable[..., Any], items: Iterable[Any]) -> list[Any]:
        """The same with one argument each."""
        return self.starmap(function, [(item,) for item in items])
