"""The trainer's nurseries: one clean one for all pools, and a forked one for each pool whose loader needs it.

They are started when a worker is requested, and again when they die. A nursery's death takes its workers along (the
kernel sees to it); each of them counts as gone when its socket closes, because only then it certainly writes no
more. Used by the supervisor's thread only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import selectors
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from safeloader.config import StartMethod
from safeloader.faults.exits import ProcessExit
from safeloader.pool import wire
from safeloader.pool.launch import ForkRequest, Nursery
from safeloader.pool.pool import Life, Pool

logger = logging.getLogger("safeloader")

_ORPHANS_S: Final = 2.0
"""How long a dead nursery's workers may take to be gone; then their slots are written off."""
_PATIENCE_S: Final = 2.0
"""How long a nursery may take to leave when asked to; then it is killed."""
_REAP_EVERY_S: Final = 0.005
"""A leaving nursery's end is the one thing that nothing readable announces (pidfds need Linux 5.3)."""

_Key = int | None
"""Whose nursery: a pool's number, or None for the clean one."""


@dataclass
class _Orphans:
    """Workers whose nursery died, or could not be started; all but one of the first are `spared` in the counting."""

    lives: list[Life]
    deadline: float
    cause: str
    spared: tuple[Life, ...] = ()


class Nurseries:
    """Forks, kills and buries workers for the pools; implements `pool.Host`."""

    def __init__(self, selector: selectors.BaseSelector, pools: Mapping[int, Pool]) -> None:
        self._selector = selector
        self._pools = pools
        self._running: dict[_Key, Nursery] = {}
        self._leaving: list[tuple[Nursery, float]] = []
        self._orphans: list[_Orphans] = []
        self._generation = 0

    # ---- what pools ask for ----

    def request_worker(self, pool: Pool, request: ForkRequest) -> None:
        """Have a nursery fork this worker; if none can be started, the worker counts as gone."""
        try:
            self._nursery_for(pool).request(request)
        except OSError as error:
            request.channel.close()
            life = pool.lives[request.order.worker]
            self._orphans.append(_Orphans([life], time.monotonic() + _ORPHANS_S, f"could not be started: {error}"))

    def cancel_worker(self, pool: Pool, worker: int) -> bool:
        """Take a request back; False if it has gone to the nursery already."""
        nursery = self._running.get(self._key(pool))
        cancelled = [] if nursery is None else nursery.cancel(pool.number, worker)
        for request in cancelled:
            request.channel.close()
        return bool(cancelled)

    def kill_worker(self, pool: Pool, worker: int, incarnation: int) -> None:
        """Have the worker's parent kill it; if the parent is dead, so is the worker."""
        nursery = self._running.get(self._key(pool))
        if nursery is not None:
            with contextlib.suppress(wire.ChannelClosedError):
                nursery.channel.send(wire.Kill(pool.number, worker, incarnation))

    def watch(self, life: Life) -> None:
        """Listen to a worker."""
        self._selector.register(life.channel, selectors.EVENT_READ, functools.partial(self._on_worker, life))
        life.watched = True

    def unwatch(self, life: Life) -> None:
        """Listen no more."""
        if life.watched:
            self._selector.unregister(life.channel)
            life.watched = False

    # ---- what the supervisor's loop calls ----

    def pump(self) -> None:
        """Send what can be sent, take note of who is gone, see off who was asked to leave."""
        self._count_orphans()
        for nursery in list(self._running.values()):
            with contextlib.suppress(wire.ChannelClosedError):  # its end is readable, and dealt with there
                nursery.pump(self._loader_of)
        for nursery, deadline in self._leaving:
            if time.monotonic() > deadline:
                nursery.kill()
        self._leaving = [(nursery, deadline) for nursery, deadline in self._leaving if nursery.poll() is None]

    def wakes(self) -> list[float]:
        """When to look again although nothing has become readable."""
        wakes = [orphans.deadline for orphans in self._orphans]
        if self._leaving:
            wakes.append(time.monotonic() + _REAP_EVERY_S)
        return wakes

    def retire(self, pool: Pool) -> None:
        """The pool has ended: its nursery forgets it, or leaves."""
        if pool.use_fork:
            self._dismiss(pool.number)
        elif None in self._running:
            with contextlib.suppress(wire.ChannelClosedError):
                self._running[None].forget(pool.number)

    def dismiss_all(self) -> bool:
        """Ask all to leave; True once they have."""
        for key in list(self._running):
            self._dismiss(key)
        return not self._leaving

    def kill_all(self) -> None:
        """For an emergency: the kernel takes the workers with them."""
        for nursery in [*self._running.values(), *(nursery for nursery, _ in self._leaving)]:
            nursery.kill()
            nursery.wait(_PATIENCE_S)

    def close_channels(self) -> None:
        """In a child forked from the trainer: let go of the trainer's sockets, and of those not sent to workers yet."""
        for nursery in [*self._running.values(), *(nursery for nursery, _ in self._leaving)]:
            nursery.close()

    # ---- nurseries ----

    @staticmethod
    def _key(pool: Pool) -> _Key:
        return pool.number if pool.use_fork else None

    def _nursery_for(self, pool: Pool) -> Nursery:
        key = self._key(pool)
        if key not in self._running:
            generation, self._generation = self._generation, self._generation + 1
            nursery = Nursery.spawn(generation) if key is None else Nursery.fork(key, pool.work, generation)
            self._running[key] = nursery
            self._selector.register(nursery.channel, selectors.EVENT_READ, functools.partial(self._on_nursery, key))
        return self._running[key]

    def _loader_of(self, number: int) -> tuple[int, int]:
        packed = self._pools[number].packed
        assert packed is not None, "only packed loaders are requested of a clean nursery"
        file, nbytes = packed
        return file.fd, nbytes

    def _dismiss(self, key: _Key) -> None:
        nursery = self._running.pop(key, None)
        if nursery is not None:
            self._selector.unregister(nursery.channel)
            nursery.close()
            # One that is not ready yet would see it only after its imports, seconds later.
            self._leaving.append((nursery, time.monotonic() + (_PATIENCE_S if nursery.ready else 0.0)))

    def _on_nursery(self, key: _Key) -> None:
        nursery = self._running[key]
        try:
            while (received := nursery.channel.receive(wait=False)) is not None:
                self._hear(nursery, received[0])
        except wire.ChannelClosedError:
            self._lost(key)

    def _hear(self, nursery: Nursery, message: wire.Message) -> None:
        match message:
            case wire.NurseryReady():
                nursery.ready = True
            case wire.Loaded(number):
                nursery.answered(loaded=number)
            case wire.LoadFailed(number, reason, traceback):
                nursery.answered()
                self._on_load_failed(number, reason, traceback)
            case wire.Forked(number):
                nursery.answered()
                if (pool := self._pools.get(number)) is not None:
                    pool.on_forked(message)
            case wire.ForkFailed(number, worker, incarnation, reason):
                nursery.answered()
                self._gone(number, worker, incarnation, ProcessExit(), f"could not be forked: {reason}")
            case wire.Reaped(number, worker, incarnation, _, status):
                self._gone(number, worker, incarnation, ProcessExit.from_wait_status(status))
            case _:
                raise AssertionError(f"not from a nursery: {message}")

    def _gone(self, number: int, worker: int, incarnation: int, how: ProcessExit, cause: str | None = None) -> None:
        pool = self._pools.get(number)
        if pool is not None:
            pool.on_gone(worker, incarnation, how, proven=True, cause=cause)

    def _on_load_failed(self, number: int, reason: str, traceback: str) -> None:
        """Something that only the trainer has: fork from it instead, if that is allowed."""
        pool = self._pools.get(number)
        if pool is None:
            return
        if pool.options.start_method is StartMethod.CLEAN:
            pool.on_start_failed(reason, traceback)  # and that takes its requests back
            return
        logger.info(
            "pool %r: the loader can't be unpickled in a clean process (%s); forking from this one instead",
            pool.name,
            reason,
        )
        pool.use_fork = True
        for request in self._running[None].cancel(number):
            self.request_worker(pool, request)

    def _lost(self, key: _Key) -> None:
        """A nursery is gone, and its workers with it. The next request starts another."""
        nursery = self._running.pop(key)
        self._selector.unregister(nursery.channel)
        nursery.kill()
        how = nursery.wait(_PATIENCE_S)
        what = "does not end" if how is None else how.what
        loading = nursery.loading
        nursery.close()
        if how is None:
            self._leaving.append((nursery, time.monotonic()))
        for pool in [pool for pool in self._pools.values() if self._key(pool) == key]:
            lives = list(pool.lives.values())
            during = " while it unpickled the loader" if loading == pool.number else ""
            cause = f"went down with its nursery (pid {nursery.pid}), which {what}{during}"
            if lives:
                pool.on_nursery_death(nursery.pid, how or ProcessExit(), f"{what}{during}")
                # A loader that kills whoever unpickles it will do so again: then all count, and it ends soon.
                spared = () if during else tuple(lives[1:])
                self._orphans.append(_Orphans(lives, time.monotonic() + _ORPHANS_S, cause, spared))

    # ---- workers ----

    def _on_worker(self, life: Life) -> None:
        life.pool.on_readable(life)
        if life.silent and life.pid is not None:
            # It has ended and the nursery will say how; or somebody closed its socket, and it is of no use.
            self.kill_worker(life.pool, life.worker, life.incarnation)

    def _count_orphans(self) -> None:
        """Take note of workers without a nursery that are gone, or that nobody can prove to be."""
        now = time.monotonic()
        orphaned, self._orphans = self._orphans, []  # what follows from an exit may orphan others
        for orphans in orphaned:
            late = now > orphans.deadline
            waiting = [life for life in orphans.lives if not (life.silent or late)]
            for life in orphans.lives:
                if life not in waiting:
                    life.pool.on_gone(
                        life.worker,
                        life.incarnation,
                        ProcessExit(),
                        proven=life.silent,
                        counts=not any(life is spared for spared in orphans.spared),
                        cause=orphans.cause,
                    )
            if waiting:
                self._orphans.append(dataclasses.replace(orphans, lives=waiting))
