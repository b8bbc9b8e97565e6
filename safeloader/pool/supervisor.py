"""The supervisor: one thread in the trainer that keeps all pools of the process alive.

    wait ─► something readable ─┬─ a worker has spoken ───► its pool
      ▲                         ├─ a nursery has spoken ──► requests, exits, its own end
      │                         ├─ somebody looks ────────► the window: `safeloader top`
      │                         └─ woken ────────────────► the mailbox: what the training thread did
      └──── restart what is due ◄── ticks of the machines

It decides nothing (the machines do) and is the only thread that touches sockets and processes. It runs while there
is a pool, and takes the nursery with it when it ends: the kernel ties the nursery to this very thread.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import logging
import math
import os
import selectors
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from safeloader.config import Options, StartMethod
from safeloader.errors import ConfigError, InternalError
from safeloader.faults.cpus import cgroup_quota
from safeloader.faults.incident import Incident
from safeloader.pool import machine, relay
from safeloader.pool.blame import Policy
from safeloader.pool.consumer import Consumer
from safeloader.pool.mailbox import Mailbox, Wakeup
from safeloader.pool.memory_watch import MemoryWatch, OomWatch
from safeloader.pool.nurseries import Nurseries
from safeloader.pool.patience import HangLimits
from safeloader.pool.pool import Pool
from safeloader.pool.view import view
from safeloader.pool.work import TooLargeError, Work, WorkNotPicklableError, pack
from safeloader.report import log
from safeloader.report.window import Window
from safeloader.ring.pinning import Pinning

logger = logging.getLogger("safeloader")

_AT_EXIT_S: Final = 5.0
"""How long a trainer that ends waits for its pools; whatever is left then, the kernel ends with the trainer."""
_LAST_WORDS_S: Final = 1.0
"""How long it waits until what its workers wrote to stderr is on the screen."""


class Supervisor:
    """See the module. Made with the first pool, gone with the last; `current` is the process's."""

    current: Supervisor | None = None
    _registry = threading.Lock()  # of `current` and `_users`; no process shares it
    _numbers: Final = itertools.count()

    def __init__(self) -> None:
        self.mailbox = Mailbox()
        self._pid = os.getpid()
        self._users = 0  # open pools, and holds
        self._ending = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.mailbox.wakeup.fd, selectors.EVENT_READ, self.mailbox.wakeup.clear)
        self._listened: set[Wakeup] = set()  # consumers' `freed`; the selector tells by an exception, which costs more
        self._window: Window | None = None
        with contextlib.suppress(OSError):  # nobody can look, and that is all
            self._window = Window(lambda: view(self._pools.values()))
            self._selector.register(self._window.fd, selectors.EVENT_READ, self._window.answer)
        self._pools: dict[int, Pool] = {}
        self.oom_watch = OomWatch()
        self._nurseries = Nurseries(self._selector, self._pools, self.oom_watch, self.mailbox)
        self._thread = threading.Thread(target=self._run, name="safeloader-supervisor", daemon=True)

    # ---- any thread ----

    @classmethod
    @contextlib.contextmanager
    def hold(cls) -> Iterator[Supervisor]:
        """Use the process's supervisor, and keep it (and its nursery) alive meanwhile."""
        with cls._registry:
            if cls.current is None:
                _at_process_events()
                started = cls()
                started._thread.start()  # it may fail, or Ctrl-C may come: then there is none
                cls.current = started
            held = cls.current
            held._users += 1
        try:
            yield held
        finally:
            held._let_go()

    def open(self, pool: Pool) -> None:
        """Take charge of a pool."""
        with self._registry:
            self._users += 1
        self.mailbox.post(functools.partial(self._admit, pool))

    def close(self, pool: Pool, timeout_s: float) -> bool:
        """End a pool and wait until nothing of it is left; False if that takes longer than the timeout."""
        self.mailbox.post(pool.close)
        finished = pool.finished.wait(timeout_s)
        if finished and self._ending:
            self._thread.join(timeout_s)
        return finished

    def _let_go(self) -> None:
        with self._registry:
            self._users -= 1
            self._ending = self._ending or self._users == 0
            if self._ending and Supervisor.current is self:
                Supervisor.current = None
        if self._ending:
            self.mailbox.wakeup.set()

    def _let_go_in_child(self) -> None:
        """In a child forked from the trainer: close the trainer's sockets, so that their other ends see its end."""
        for pool in self._pools.values():
            pool.consumer.leave_in_child()
            for life in pool.lives.values():
                life.channel.close()
                life.relay.close()
        self._nurseries.close_channels()
        self._close_window()
        self._selector.close()

    # ---- the thread ----

    def _run(self) -> None:
        # What is spawned from here starts with Ctrl-C blocked, until it has said that it ignores it.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            while not self._ending or self._pools:
                self._turn(self._timeout_s())
            while not self._nurseries.dismiss_all():
                self._turn(self._timeout_s())
        except BaseException as error:  # noqa: BLE001 - whatever it was, next() must not wait for ever
            self._collapse(error)
        relay.flush(_LAST_WORDS_S)
        self._close_window()
        self._selector.close()

    def _close_window(self) -> None:
        if self._window is not None:
            self._window.close()

    def _turn(self, timeout_s: float | None) -> None:
        for key, _ in self._selector.select(timeout_s):
            key.data()
        for call in self.mailbox.drain():
            call()
        pools = list(self._pools.values())
        for pool in pools:
            pool.tick()
        self._nurseries.pump()
        for pool in pools:
            self._listen(pool.consumer.freed, wanted=pool.consumer.wants_slots)
            pool.consumer.announce()
            if pool.machine.stopped and not pool.lives:
                self._dismiss(pool)

    def _timeout_s(self) -> float | None:
        """Until when nothing happens by itself."""
        wakes = self._nurseries.wakes()
        wakes += [pool.due for pool in self._pools.values() if pool.due is not None]
        return max(0.0, min(wakes) - time.monotonic()) if wakes else None

    def _admit(self, pool: Pool) -> None:
        self._pools[pool.number] = pool
        pool.open(self._nurseries)

    def _listen(self, freed: Wakeup, *, wanted: bool) -> None:
        """What has ended meanwhile keeps the descriptor readable."""
        if wanted == (freed in self._listened):
            return
        if wanted:
            self._listened.add(freed)
            self._selector.register(freed.fd, selectors.EVENT_READ, freed.clear)
        else:
            self._listened.remove(freed)
            self._selector.unregister(freed.fd)

    def _dismiss(self, pool: Pool) -> None:
        del self._pools[pool.number]
        self._listen(pool.consumer.freed, wanted=False)
        self._nurseries.retire(pool)
        self._let_go()
        pool.dispose()

    def _collapse(self, error: BaseException) -> None:
        """Something that must not happen has: end every pool with it, and leave no process behind."""
        with self._registry:
            self._ending = True
            if Supervisor.current is self:
                Supervisor.current = None
        for call in self.mailbox.drain():
            with contextlib.suppress(Exception):
                call()
        failure = InternalError(
            f"SafeLoader's supervisor failed: {type(error).__name__}: {error}. This is a bug in SafeLoader: please "
            "report it with the traceback above."
        )
        failure.__cause__ = error
        self._nurseries.kill_all()
        for pool in self._pools.values():
            pool.consumer.fail(failure)
            pool.dispose()


def open_pool(
    work: Work,
    options: Options,
    *,
    seed: int,
    workers: int,
    num_cached: int,
    first_ticket: int,
    quarantined: Iterable[str] = (),
    numpy_seeds: Sequence[int | None] | None = None,
    pinning: Pinning | None = None,
    on_incident: Callable[[Incident], None] | None = None,
) -> tuple[Supervisor, Pool]:
    """Start a pool.

    Args:
        work: loader and transform.
        options: see `config.OPTIONS`.
        seed: the root seed.
        workers: how many.
        num_cached: batches kept ready beyond those in work.
        first_ticket: where in the stream to begin.
        quarantined: cases that are not drawn, beyond those that `options.folder` remembers.
        numpy_seeds: given for a loader that goes on from batch to batch: each worker's, in a lane of its own.
        pinning: given if the slots are to be pinned memory.
        on_incident: is told of each failure, in a thread of its own.

    Raises:
        ConfigError: `start_method="clean"`, and the loader can't be pickled.
    """
    packed = None
    if options.start_method is not StartMethod.FORKED:
        try:
            packed = pack(work, options.loader_max_mib << 20)
        except (WorkNotPicklableError, TooLargeError) as error:
            reason = str(error) or f"the loader's pickle is larger than loader_max_mib={options.loader_max_mib}"
            if options.start_method is StartMethod.CLEAN:
                raise ConfigError(
                    f"start_method='clean': the loader can't be sent to a clean process, because {reason}. "
                    "Use start_method='auto'."
                ) from error
            logger.info(
                "pool %r: workers are forked from this process, because of the loader: %s", options.name, reason
            )
    quota = cgroup_quota(Path("/"))
    memory_watch = MemoryWatch(workers, options.recycle_growth_mib << 20)
    limits = machine.Limits(
        workers=workers,
        num_cached=num_cached,
        max_restarts=5 + 2 * workers if options.max_restarts is None else options.max_restarts,
        window_s=options.restart_window_s,
        backoff_first_s=options.backoff_first_s,
        backoff_max_s=options.backoff_max_s,
        begin_with=memory_watch.begin_with() if numpy_seeds is None else None,
        grow_back_s=options.grow_back_s,
        rest_after_s=options.rest_after_s,
        own_lanes=numpy_seeds is not None,
        cpu_quota=math.inf if quota is None else quota.cpus,
        other_method=packed is not None and options.start_method is StartMethod.AUTO,
        hang=HangLimits(
            options.hang_timeout_s,
            options.hang_timeout_first_s,
            math.inf if options.hang_timeout_max_s is None else options.hang_timeout_max_s,
        ),
        policy=Policy(options.on_bad_case, outage_s=options.outage_timeout_s),
    )
    with Supervisor.hold() as supervisor:
        consumer = Consumer(
            options.name,
            first_ticket,
            limits.max_leases,
            slow_s=options.slow_warning_s,
            lanes=limits.lanes,
            pinning=pinning,
        )
        pool = Pool(
            next(Supervisor._numbers),
            options,
            limits,
            seed=seed,
            work=work,
            packed=packed,
            consumer=consumer,
            memory_watch=memory_watch,
            oom_watch=supervisor.oom_watch,
            quarantined=quarantined,
            numpy_seeds=numpy_seeds or (),
            on_incident=on_incident,
        )
        consumer.describe = pool.waiting_for
        consumer.post = lambda event: supervisor.mailbox.post(lambda: pool.step(event))
        consumer.wake = supervisor.mailbox.wakeup.set
        supervisor.open(pool)
    return supervisor, pool


@functools.cache
def _at_process_events() -> None:
    """Once per process: end with it, and don't act for it in its forked children."""
    atexit.register(_at_exit)
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _at_exit() -> None:
    supervisor = Supervisor.current
    if supervisor is not None and supervisor._pid == os.getpid():
        for pool in list(supervisor._pools.values()):
            supervisor.close(pool, _AT_EXIT_S)
    log.flush(_LAST_WORDS_S)


def _after_fork_in_child() -> None:
    supervisor, Supervisor.current = Supervisor.current, None
    Supervisor._registry = threading.Lock()  # another thread may have held it
    if supervisor is not None:
        supervisor._let_go_in_child()
