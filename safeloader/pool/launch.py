"""The trainer's side of a nursery: how it is started, what was asked of it, how it ends.

One request (Load or Fork) is under way at a time, so the socket never fills up, whatever the nursery is busy with.
Used by the supervisor's thread only; the kernel ties the nursery to that thread's life (`process.die_with`).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from safeloader import killpoints
from safeloader.faults.exits import ExitCode, ProcessExit
from safeloader.pool import process, wire
from safeloader.pool.relay import Relay, adopt
from safeloader.pool.work import Work

_BOOTSTRAP: Final = f"""\
import ctypes, faulthandler, os, sys
ctypes.CDLL(None).prctl(1, {int(signal.SIGKILL)}, 0, 0, 0)
os.getppid() == int(sys.argv[2]) or os._exit({int(ExitCode.ORPHANED)})
faulthandler.enable()
faulthandler.register({int(process.STACKS_SIGNAL)}, chain=True)
sys.path[:] = sys.argv[4:]
from safeloader.pool.nursery import main
main(sys.argv[1:4])
"""
"""`process.die_with` comes before everything else: the imports take seconds, and the trainer may die in them."""

_ENVIRONMENT: Final = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
    "NUMEXPR_MAX_THREADS": "1",
    "BLOSC_NTHREADS": "1",
    "BLOSC_NUM_THREADS": "1",
}
"""One thread a worker: they are many, and a nursery with threads could not be forked safely."""

_ENVIRONMENT_UNLESS_SET: Final = {
    # Copies of more than 4 MiB go past the cache. glibc's own threshold is three quarters of the cache that it takes to
    # be a thread's own, and in a virtual machine that is all of it: a batch on its way into a slot then takes 4.6 ms
    # instead of 2.7, since memory that will be overwritten is read first. (Ignored where it is not known.)
    "GLIBC_TUNABLES": f"glibc.cpu.x86_non_temporal_threshold={4 << 20:#x}",
    # glibc's last words ("free(): invalid pointer") go to stderr, not to a terminal that nobody reads.
    "LIBC_FATAL_STDERR_": "1",
    # Sets iterate in the same order in every nursery. (Not a number that follows from the root seed: pools with
    # different ones share a nursery.)
    "PYTHONHASHSEED": "0",
}

_STACKS_S: Final = 0.5
"""How long a nursery that hangs may take to write its stacks."""


class _Process(Protocol):
    """What both kinds of nursery process can do."""

    pid: int

    def poll(self) -> ProcessExit | None:
        """How it ended, or None while it runs."""


class _Spawned:
    def __init__(self, popen: subprocess.Popen[bytes]) -> None:
        self._popen = popen
        self.pid = popen.pid

    def poll(self) -> ProcessExit | None:
        code = self._popen.poll()
        if code is None:
            return None
        return ProcessExit.from_returncode(code)


class _Forked:
    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._exit: ProcessExit | None = None

    def poll(self) -> ProcessExit | None:
        if self._exit is None:
            try:
                ended, status = os.waitpid(self.pid, os.WNOHANG)
                self._exit = ProcessExit.from_wait_status(status) if ended else None
            except ChildProcessError:  # other code in the trainer waits for any child, and was first
                self._exit = ProcessExit()
        return self._exit


@dataclass
class ForkRequest:
    """A worker to be forked; the descriptors are closed once they are sent or given up."""

    order: wire.Fork
    channel: wire.Channel
    page_fd: int
    stderr_fd: int
    bookmark_fd: int | None = None

    @property
    def fds(self) -> list[int]:
        """What goes with the order."""
        bookmark = [] if self.bookmark_fd is None else [self.bookmark_fd]
        return [self.channel.fileno(), self.page_fd, self.stderr_fd, *bookmark]

    def close(self) -> None:
        """Let go of what is the worker's."""
        self.channel.close()
        os.close(self.stderr_fd)


class Nursery:
    """One nursery process as the trainer sees it.

    Attributes:
        channel: to the nursery. relay: what it writes to stderr. ready: whether it has said so. pid: its process id.
        loading: the pool whose loader it is unpickling now, or None. asked: the pool that the request under way is for.
        since: when its start or the request under way began, on `time.monotonic`'s clock; None if it has nothing to do.
        hung_s: how long it had not answered when it was killed for that, or None.
        stopped: it was killed because a signal from outside had stopped it: what it was doing is not to blame.
    """

    def __init__(self, channel: wire.Channel, process_: _Process, relay: Relay, loaded: Sequence[int] = ()) -> None:
        self.channel = channel
        self.relay = relay
        self.ready = False
        self.pid = process_.pid
        self.loading: int | None = None
        self.asked: int | None = None
        self.since: float | None = time.monotonic()
        self.hung_s: float | None = None
        self.stopped = False
        self._kill_at: float | None = None
        self._process = process_
        self._loaded = set(loaded)
        self._queue: deque[ForkRequest] = deque()
        self._busy = False

    @classmethod
    def spawn(cls, generation: int) -> Nursery:
        """Start a clean one. It does not import the user's script, so that needs no `__main__` guard."""
        ours, theirs = wire.Channel.pair()
        relay, stderr_fd = Relay.create()
        environment = {**_ENVIRONMENT_UNLESS_SET, **os.environ, **_ENVIRONMENT}
        if environment["PYTHONHASHSEED"] == "random":
            environment["PYTHONHASHSEED"] = _ENVIRONMENT_UNLESS_SET["PYTHONHASHSEED"]
        with contextlib.ExitStack() as theirs_only:
            theirs_only.callback(os.close, stderr_fd)
            theirs_only.callback(theirs.close)
            try:
                # Above the standard streams, even if the trainer has closed those.
                fd = fcntl.fcntl(theirs.fileno(), fcntl.F_DUPFD_CLOEXEC, 3)
                theirs_only.callback(os.close, fd)
                popen = subprocess.Popen(
                    [sys.executable, "-c", _BOOTSTRAP, str(fd), str(os.getpid()), str(generation), *sys.path],
                    stdin=subprocess.DEVNULL,
                    stderr=stderr_fd,
                    env=environment,
                    pass_fds=[fd],
                )
            except OSError:
                relay.close()
                ours.close()
                raise
        killpoints.reach("trainer.step.spawned")
        return cls(ours, _Spawned(popen), relay)

    @classmethod
    def fork(cls, pool: int, work: Work, generation: int) -> Nursery:
        """Start one that has the pool's loader by being a copy of this process."""
        ours, theirs = wire.Channel.pair()
        relay, stderr_fd = Relay.create()
        trainer = os.getpid()
        with warnings.catch_warnings():
            # Python 3.12 warns that forking a process with threads may deadlock the child. It may; so does the
            # stock augmenter's fork. The child takes no lock of the trainer's.
            warnings.simplefilter("ignore", DeprecationWarning)
            try:
                pid = os.fork()
            except OSError:
                relay.close()
                os.close(stderr_fd)
                raise
        if pid == 0:
            adopt(stderr_fd)
            relay.close()
            _become_nursery(theirs, ours, {pool: work}, trainer, generation)
        theirs.close()
        os.close(stderr_fd)
        killpoints.reach("trainer.step.forked")
        return cls(ours, _Forked(pid), relay, loaded=[pool])

    def request(self, request: ForkRequest) -> None:
        """Queue a worker; `pump` sends it when its turn has come."""
        self._queue.append(request)

    def cancel(self, pool: int, worker: int | None = None) -> list[ForkRequest]:
        """Take back what was requested for a pool (and worker), if it was not sent yet."""

        def meant(request: ForkRequest) -> bool:
            return request.order.pool == pool and worker in (None, request.order.worker)

        cancelled = [request for request in self._queue if meant(request)]
        self._queue = deque(request for request in self._queue if not meant(request))
        return cancelled

    def pump(self, loader_of: Callable[[int], tuple[int, int]]) -> None:
        """Send the next request, if none is under way. `loader_of(pool)` gives the loader's (fd, nbytes)."""
        if not self.ready or self._busy or not self._queue:
            return
        self._busy = True
        self.since = time.monotonic()
        pool = self.asked = self._queue[0].order.pool
        if pool not in self._loaded:
            fd, nbytes = loader_of(pool)
            self.loading = pool
            self.channel.send(wire.Load(pool, nbytes), [fd])
            return
        request = self._queue.popleft()
        try:
            self.channel.send(request.order, request.fds)
        finally:
            request.close()

    def answered(self, loaded: int | None = None) -> None:
        """The request under way was answered."""
        self._busy = False
        self.loading = self.asked = None
        self.since = None
        if loaded is not None:
            self._loaded.add(loaded)

    def forget(self, pool: int) -> None:
        """The pool is closed."""
        if pool in self._loaded:
            self._loaded.discard(pool)
            self.channel.send(wire.Unload(pool))

    @property
    def serving(self) -> int | None:
        """The pool whose request is under way or comes next, or None."""
        if self.asked is not None:
            return self.asked
        return self._queue[0].order.pool if self._queue else None

    def is_ready(self) -> None:
        """It has said so."""
        self.ready = True
        self.since = None

    def condemn(self, *, stopped: bool) -> None:
        """It does not answer: have it write its stacks to stderr and end; `kill_if_late` sees that it does."""
        if self._kill_at is None and self.poll() is None:
            self.hung_s = time.monotonic() - self.since if self.since is not None else 0.0
            self.stopped = stopped
            self._kill_at = time.monotonic() + _STACKS_S
            os.kill(self.pid, process.STACKS_SIGNAL)
            os.kill(self.pid, signal.SIGCONT)  # one that is stopped takes the other signal only then

    def kill_if_late(self) -> None:
        """Kill one that was condemned and has not ended."""
        if self._kill_at is not None and time.monotonic() >= self._kill_at:
            self.kill()

    @property
    def kill_at(self) -> float | None:
        """When `kill_if_late` has something to do, or None."""
        return self._kill_at

    def poll(self) -> ProcessExit | None:
        """How it ended, or None while it runs."""
        return self._process.poll()

    def wait(self, timeout_s: float) -> ProcessExit | None:
        """How it ended; None if it has not by then. For a process that is known to be ending."""
        deadline = time.monotonic() + timeout_s
        while (how := self.poll()) is None and time.monotonic() < deadline:
            time.sleep(0.001)  # without pidfds (Linux 5.3) a child's end can only be polled with a time limit
        return how

    def kill(self) -> None:
        """SIGKILL; the kernel ends its workers with it. Safe: it is our child, so the pid is its own."""
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def close(self) -> None:
        """Close our end of the socket: the nursery leaves. What it still writes to stderr is read by its relay."""
        self.channel.close()
        for request in self._queue:
            request.close()
        self._queue.clear()


def _become_nursery(
    channel: wire.Channel,
    trainers_end: wire.Channel,
    works: dict[int, Work],
    trainer: int,
    generation: int,
) -> None:
    """In the child: let go of what is the trainer's, and never come back."""
    try:
        process.die_with(trainer)
        process.leave_interrupts_to_trainer()
        trainers_end.close()  # the other sockets of the trainer's are closed at every fork
        from safeloader.pool import nursery  # the trainer itself never needs it

        nursery.serve(channel, works, generation=generation, by_value=False)
    except BaseException:  # noqa: BLE001 - nothing may unwind into the trainer's frames
        sys.excepthook(*sys.exc_info())
    finally:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            sys.stderr.flush()
        os._exit(1)
