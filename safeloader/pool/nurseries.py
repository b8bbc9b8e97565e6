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
import math
import selectors
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import psutil

from safeloader.config import StartMethod
from safeloader.faults.exits import ProcessExit
from safeloader.pool import wire
from safeloader.pool.events import Cause
from safeloader.pool.launch import ForkRequest, Nursery
from safeloader.pool.life import Life
from safeloader.pool.mailbox import Mailbox
from safeloader.pool.memory_watch import OomWatch
from safeloader.pool.pool import Pool
from safeloader.pool.relay import Relay
from safeloader.report import log

_ORPHANS_S: Final = 2.0
"""How long a dead nursery's workers may take to be gone; then their slots are written off."""
_PATIENCE_S: Final = 2.0
"""How long a nursery may take to leave when asked to; then it is killed."""
_REAP_EVERY_S: Final = 0.005
"""A leaving nursery's end is the one thing that nothing readable announces (pidfds need Linux 5.3)."""

_LOOK_EVERY_S: Final = 1.0
"""How often to see whether a nursery that has something to do was stopped by a signal."""

_Key = int | None
"""Whose nursery: a pool's number, or None for the clean one."""


@dataclass
class _Orphans:
    """Workers whose nursery died, or could not be started; all but one of the first are `spared` in the counting."""

    lives: list[Life]
    deadline: float
    cause: Cause
    words: str
    spared: tuple[Life, ...] = ()


class Nurseries:
    """Forks, kills and buries workers for the pools; implements `pool.Host`."""

    def __init__(
        self, selector: selectors.BaseSelector, pools: Mapping[int, Pool], oom_watch: OomWatch, mailbox: Mailbox
    ) -> None:
        self._selector = selector
        self._pools = pools
        self._oom = oom_watch
        self._mailbox = mailbox
        self._moving: list[ForkRequest] = []  # on their way to a nursery that is being started
        self._running: dict[_Key, Nursery] = {}
        self._leaving: list[tuple[Nursery, float]] = []
        self._orphans: list[_Orphans] = []
        self._generation = 0

    # ---- what pools ask for ----

    def request_worker(self, life: Life, request: ForkRequest) -> None:
        """Have a nursery fork this worker; if none can be started, the worker counts as gone."""
        self._moving.append(request)
        try:
            self._nursery_for(life).request(request)
        except OSError as error:
            request.close()
            words = f"could not be started: {error}"
            self._orphans.append(_Orphans([life], time.monotonic() + _ORPHANS_S, Cause.REFUSED, words))
        finally:
            self._moving = [moving for moving in self._moving if moving is not request]

    def cancel_worker(self, life: Life) -> bool:
        """Take a request back; False if it has gone to the nursery already."""
        nursery = self._running.get(life.nursery)
        cancelled = [] if nursery is None else nursery.cancel(life.pool.number, life.worker)
        for request in cancelled:
            request.close()
        return bool(cancelled)

    def kill_worker(self, life: Life, *, stacks: bool = False) -> None:
        """Have the worker's parent kill it; if the parent is dead, so is the worker."""
        nursery = self._running.get(life.nursery)
        if nursery is not None:
            life.killed = True
            with contextlib.suppress(wire.ChannelClosedError):
                nursery.channel.send(wire.Kill(life.pool.number, life.worker, life.incarnation, stacks))

    def suspect_nursery(self, life: Life) -> None:
        """Its nursery does not say how a worker has ended, or does not end it: if it was stopped, that is why."""
        nursery = self._running.get(life.nursery)
        if nursery is not None and nursery.kill_at is None and _is_stopped(nursery.pid):
            nursery.condemn(stopped=True)

    def watch(self, life: Life) -> None:
        """Listen to a worker."""
        self._selector.register(life.channel, selectors.EVENT_READ, functools.partial(self._on_worker, life))
        self._serve(life.relay)
        life.watched = True

    def unwatch(self, life: Life) -> None:
        """Listen no more."""
        if life.watched:
            self._selector.unregister(life.channel)
            self._forget(life.relay)
            life.watched = False

    def post(self, call: Callable[[], None]) -> None:
        """From any thread: have the supervisor's thread make this call."""
        self._mailbox.post(call)

    def _serve(self, relay: Relay) -> None:
        def on_readable() -> None:
            if relay.fileno() >= 0 and not relay.on_readable():  # closed: by what the same turn has heard before
                self._forget(relay)

        self._selector.register(relay, selectors.EVENT_READ, on_readable)

    def _forget(self, relay: Relay) -> None:
        with contextlib.suppress(KeyError, ValueError):  # it has ended before
            self._selector.unregister(relay)

    # ---- what the supervisor's loop calls ----

    def pump(self) -> None:
        """Send what can be sent, take note of who is gone, see off who was asked to leave."""
        self._count_orphans()
        for life in self._unburied():
            self.suspect_nursery(life)
        for key, nursery in list(self._running.items()):
            self._look_after(nursery)
            if nursery.kill_at is not None and time.monotonic() > nursery.kill_at + _PATIENCE_S:
                self._lost(key)  # not even SIGKILL ends it: state D, or a frozen cgroup
                continue
            with contextlib.suppress(wire.ChannelClosedError):  # its end is readable, and dealt with there
                nursery.pump(self._loader_of)
        for nursery, deadline in self._leaving:
            if time.monotonic() > deadline:
                nursery.kill()
        for nursery, _ in self._leaving:
            if nursery.poll() is not None:
                self._forget(nursery.relay)
                nursery.relay.drain()
                nursery.relay.close()
        self._leaving = [(nursery, deadline) for nursery, deadline in self._leaving if nursery.relay.fileno() >= 0]

    def wakes(self) -> list[float]:
        """When to look again although nothing has become readable."""
        wakes = [orphans.deadline for orphans in self._orphans]
        if self._leaving:
            soon = any(time.monotonic() < deadline + _PATIENCE_S for _, deadline in self._leaving)
            wakes.append(time.monotonic() + (_REAP_EVERY_S if soon else _LOOK_EVERY_S))
        for nursery in self._running.values():
            if nursery.kill_at is not None:
                late = time.monotonic() >= nursery.kill_at
                wakes.append(nursery.kill_at + _PATIENCE_S if late else nursery.kill_at)
            elif nursery.since is not None:
                wakes.append(time.monotonic() + _LOOK_EVERY_S)
        if any(self._unburied()):
            wakes.append(time.monotonic() + _LOOK_EVERY_S)
        return wakes

    def _unburied(self) -> Iterator[Life]:
        """Workers that have ended or were to be ended, and whose nursery has not said so yet."""
        return (life for pool in self._pools.values() for life in pool.lives.values() if life.silent or life.killed)

    def _look_after(self, nursery: Nursery) -> None:
        """End a nursery that does not answer: it was stopped by a signal, or unpickling the loader hangs."""
        if nursery.kill_at is not None:
            nursery.kill_if_late()
            return
        if nursery.since is None:
            return
        waited_s = time.monotonic() - nursery.since
        serving = nursery.serving
        patience_s = [
            pool.options.hang_timeout_first_s
            for pool in self._pools.values()
            if serving is None or pool.number == serving
        ]
        # One that starts although its pool has ended by now does not hang: it is kept for the next pool.
        enough_s = max(patience_s, default=0.0 if nursery.ready else math.inf)
        stopped = waited_s > _LOOK_EVERY_S and _is_stopped(nursery.pid)
        if stopped or waited_s > enough_s:
            nursery.condemn(stopped=stopped)

    def retire(self, pool: Pool) -> None:
        """The pool has ended: its nursery forgets it, or leaves."""
        self._dismiss(pool.number)
        if None in self._running:
            with contextlib.suppress(wire.ChannelClosedError):
                self._running[None].forget(pool.number)

    def dismiss_all(self) -> bool:
        """Ask all to leave; True once they have, or don't although they were killed."""
        for key in list(self._running):
            self._dismiss(key)
        if any(time.monotonic() < deadline + _PATIENCE_S for _, deadline in self._leaving):
            return False
        for nursery, _ in self._leaving:
            nursery.relay.close()
        return True

    def kill_all(self) -> None:
        """For an emergency: the kernel takes the workers with them."""
        for nursery in [*self._running.values(), *(nursery for nursery, _ in self._leaving)]:
            nursery.kill()
            nursery.wait(_PATIENCE_S)
            nursery.relay.close()

    def close_channels(self) -> None:
        """In a child forked from the trainer: let go of the trainer's sockets, and of those not sent to workers yet."""
        for nursery in [*self._running.values(), *(nursery for nursery, _ in self._leaving)]:
            nursery.close()
            nursery.relay.close()
        for request in self._moving:
            request.close()

    # ---- nurseries ----

    def _nursery_for(self, life: Life) -> Nursery:
        key = life.nursery
        if key not in self._running:
            generation, self._generation = self._generation, self._generation + 1
            nursery = Nursery.spawn(generation) if key is None else Nursery.fork(key, life.pool.work, generation)
            self._running[key] = nursery
            self._serve(nursery.relay)
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
            while (message := nursery.channel.hear()) is not None:
                self._hear(nursery, message)
        except wire.ChannelClosedError:
            self._lost(key)

    def _hear(self, nursery: Nursery, message: wire.Message) -> None:
        match message:
            case wire.NurseryReady():
                nursery.is_ready()
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
                words = f"could not be forked: {reason}"
                self._gone(number, worker, incarnation, ProcessExit(), Cause.REFUSED, words)
            case wire.Reaped(number, worker, incarnation, _, status):
                self._gone(number, worker, incarnation, ProcessExit.from_wait_status(status))
            case _:
                raise AssertionError(f"not from a nursery: {message}")

    def _gone(
        self,
        number: int,
        worker: int,
        incarnation: int,
        how: ProcessExit,
        cause: Cause | None = None,
        words: str | None = None,
    ) -> None:
        pool = self._pools.get(number)
        if pool is not None:
            pool.on_gone(worker, incarnation, how, proven=True, cause=cause, words=words)

    def _on_stuck(self, pool: Pool, what: str, stderr_tail: str | None) -> None:
        """Its imports, unpickling or a fork don't end. As if they failed, but stalled storage gets a second chance."""
        pool.stuck_nurseries += 1
        if pool.options.start_method is StartMethod.AUTO and not pool.use_fork:
            pool.use_fork = True
            log.say(logging.INFO, f"pool {pool.name!r}: from here on workers are forked from this process instead")
        elif pool.stuck_nurseries > 1:
            pool.on_start_failed(f"their nursery {what} (hang_timeout_first_s), twice", stderr_tail or "")

    def _on_load_failed(self, number: int, reason: str, traceback: str) -> None:
        """Something that only the trainer has: fork from it instead, if that is allowed."""
        pool = self._pools.get(number)
        if pool is None:
            return
        if pool.options.start_method is StartMethod.CLEAN:
            pool.on_start_failed(reason, traceback)  # and that takes its requests back
            return
        words = f"the loader can't be unpickled in a clean process ({reason}); forking from this one instead"
        log.say(logging.INFO, f"pool {pool.name!r}: {words}")
        pool.use_fork = True
        self._moving += (moved := self._running[None].cancel(number))
        for request in moved:
            life = pool.lives[request.order.worker]
            life.nursery = number
            self.request_worker(life, request)

    def _lost(self, key: _Key) -> None:
        """A nursery is gone, and its workers with it. The next request starts another."""
        nursery = self._running.pop(key)
        self._selector.unregister(nursery.channel)
        nursery.kill()
        how = nursery.wait(_PATIENCE_S)
        if nursery.stopped:
            what = "was stopped by a signal (SIGSTOP) and was killed"
        elif nursery.hung_s is not None:
            what = f"did not answer for {nursery.hung_s:.1f} s and was killed"
        else:
            what = "does not end" if how is None else how.what
            if how is not None and how.signal == "SIGKILL":
                oom, _ = self._oom.claim()
                what = what if oom is None else f"was killed by the kernel's OOM killer ({oom})"
        loading, asked = nursery.loading, nursery.asked
        nursery.relay.drain()
        tail = nursery.relay.tail() or None
        nursery.close()
        self._leaving.append((nursery, time.monotonic()))
        for pool in list(self._pools.values()):
            lives = [life for life in pool.lives.values() if life.nursery == key]
            during = " while it unpickled the loader" if loading == pool.number and not nursery.stopped else ""
            words = f"went down with its nursery (pid {nursery.pid}), which {what}{during}"
            if lives:
                pool.on_nursery_death(nursery.pid, how or ProcessExit(), f"{what}{during}", tail)
                stuck = nursery.hung_s is not None and not nursery.stopped
                if stuck and (asked == pool.number or not nursery.ready):
                    self._on_stuck(pool, what, tail)
                # A loader that kills whoever unpickles it will do so again: then all count, and it ends soon.
                spared = () if during else tuple(lives[1:])
                deadline = time.monotonic() + _ORPHANS_S
                self._orphans.append(_Orphans(lives, deadline, Cause.NURSERY, words, spared))

    # ---- workers ----

    def _on_worker(self, life: Life) -> None:
        life.pool.on_readable(life)
        if life.silent and life.pid is not None:
            # It has ended and the nursery will say how; or somebody closed its socket, and it is of no use.
            self.kill_worker(life)

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
                        words=orphans.words,
                    )
            if waiting:
                self._orphans.append(dataclasses.replace(orphans, lives=waiting))


def _is_stopped(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_STOPPED)
    except psutil.Error:
        return False
