"""The nursery: the process that forks workers, reaps them and says how they ended.

It is clean (spawned, so it has no thread, no CUDA context and no lock of the trainer's) and single-threaded, so
forking from it is safe at any time. It serves all pools of the trainer. It holds nothing that matters: when it dies,
its workers die with it and the trainer starts another.

    spawned: python -c "… main(…)", talks on an inherited socket, unpickles each pool's loader
    forked:  `serve` in a child forked from the trainer, for one pool whose loader can't be pickled
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import socket
import sys
import time
from typing import Final, NoReturn

import torch
from threadpoolctl import threadpool_limits

from safeloader import killpoints
from safeloader.faults.exits import ExitCode
from safeloader.pool import process, relay, wire, worker
from safeloader.pool.blur import always_convolve_directly
from safeloader.pool.failure import describe, format_remote
from safeloader.pool.seeding import seed_everything
from safeloader.pool.work import Work, unpack
from safeloader.ring.bookmark import Bookmark
from safeloader.ring.memfile import MemoryFile
from safeloader.ring.status_page import StatusPage

_STACKS_S: Final = 0.05
"""How long a condemned worker may take to write its stacks; then it is killed."""


def main(argv: list[str]) -> NoReturn:
    """Entry of the spawned nursery: `argv` is [socket fd, trainer's pid, generation]."""
    fd, trainer_pid, generation = (int(word) for word in argv)
    process.die_with(trainer_pid)
    process.leave_interrupts_to_trainer()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # a daemon may have none
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    serve(wire.Channel.from_fd(fd), {}, generation=generation, by_value=True)


def serve(channel: wire.Channel, works: dict[int, Work], *, generation: int, by_value: bool) -> NoReturn:
    """Run a nursery in this process, which must be tied to the trainer already and is not left again.

    Args:
        channel: to the trainer.
        works: loaders that are here already, by pool: those that came by fork.
        generation: how many nurseries the trainer had before.
        by_value: whether workers send classes of the trainer's `__main__` by value.
    """
    process.set_title("sl-nursery")
    process.raise_oom_score()
    process.keep_freed_memory()
    process.leave_stacks(2)
    killpoints.enter("nursery", first_life=generation == 0)
    killpoints.reach("nursery.step.started")
    torch.set_num_threads(1)
    seed_everything(0, 0, 0)  # imports what seeding needs once, here, and not in every worker
    for work in works.values():
        always_convolve_directly(work.loader, work.transform)
    with threadpool_limits(limits=1, user_api=None):
        try:
            _Nursery(channel, works, by_value=by_value).run()
        except wire.ChannelClosedError:
            os._exit(ExitCode.OK)  # the trainer is gone or has no use for us; the kernel ends the workers


class _Nursery:
    def __init__(self, channel: wire.Channel, works: dict[int, Work], *, by_value: bool) -> None:
        self._channel = channel
        self._works = works
        self._by_value = by_value
        self._orders: dict[int, wire.Fork] = {}  # by pid
        self._condemned: dict[int, float] = {}  # by pid: when they are killed, if they have not ended by then
        self._pid = os.getpid()
        self._child_ended, self._wake = socket.socketpair()
        for end in (self._child_ended, self._wake):
            end.setblocking(False)
        signal.set_wakeup_fd(self._wake.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def run(self) -> NoReturn:
        poll = select.poll()
        poll.register(self._channel, select.POLLIN)
        poll.register(self._child_ended, select.POLLIN)
        self._channel.send(wire.NurseryReady(os.getpid()))
        while True:
            for fd, _ in poll.poll(self._timeout_ms()):
                if fd == self._channel.fileno():
                    self._obey(*self._channel.receive())
                else:
                    self._child_ended.recv(4096)
            self._reap()
            self._kill_condemned()

    def _obey(self, message: wire.Message, fds: list[int]) -> None:
        match message:
            case wire.Load(pool, nbytes):
                self._load(pool, MemoryFile(fds[0]), nbytes)
            case wire.Unload(pool):
                self._works.pop(pool, None)
            case wire.Fork():
                self._fork(message, fds)
            case wire.Kill(pool, index, incarnation, stacks):
                for pid, order in self._orders.items():
                    if (order.pool, order.worker, order.incarnation) == (pool, index, incarnation):
                        self._kill(pid, stacks=stacks)
            case _:
                raise AssertionError(f"not for a nursery: {message}")

    def _load(self, pool: int, file: MemoryFile, nbytes: int) -> None:
        killpoints.reach("nursery.step.loading")
        try:
            work = self._works[pool] = unpack(file, nbytes)
        except BaseException as error:  # noqa: BLE001 - unpickling runs the user's code, which may raise anything
            kind, text = describe(error)
            self._channel.send(wire.LoadFailed(pool, f"{kind}: {wire.clip(text, 1000)}", format_remote(error)))
            return
        finally:
            file.close()
        always_convolve_directly(work.loader, work.transform)
        self._channel.send(wire.Loaded(pool))

    def _kill(self, pid: int, *, stacks: bool) -> None:
        if not stacks:
            os.kill(pid, signal.SIGKILL)
            return
        os.kill(pid, process.STACKS_SIGNAL)
        os.kill(pid, signal.SIGCONT)  # one that is stopped takes the other signal only then
        self._condemned[pid] = time.monotonic() + _STACKS_S

    def _kill_condemned(self) -> None:
        now = time.monotonic()
        for pid in [pid for pid, at in self._condemned.items() if at <= now]:
            del self._condemned[pid]
            os.kill(pid, signal.SIGKILL)

    def _timeout_ms(self) -> float | None:
        if not self._condemned:
            return None
        return max(0.0, min(self._condemned.values()) - time.monotonic()) * 1000

    def _fork(self, order: wire.Fork, fds: list[int]) -> None:
        channel_fd, page_fd, stderr_fd, *bookmark_fd = fds
        # Objects that are here now will live as long as the worker: a collection that visits them would only copy
        # their pages.
        gc.collect()
        gc.freeze()
        try:
            pid = os.fork()
        except OSError as error:
            self._channel.send(wire.ForkFailed(order.pool, order.worker, order.incarnation, str(error)))
        else:
            if pid == 0:
                relay.adopt(stderr_fd)
                self._become_worker(order, channel_fd, page_fd, *bookmark_fd)
            killpoints.reach("nursery.step.forked")
            self._orders[pid] = order
            self._channel.send(wire.Forked(order.pool, order.worker, order.incarnation, pid))
        finally:
            for fd in fds:
                os.close(fd)

    def _become_worker(
        self, order: wire.Fork, channel_fd: int, page_fd: int, bookmark_fd: int | None = None
    ) -> NoReturn:
        """In the child: let go of what is the nursery's, and never come back."""
        status = 1
        try:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for end in (self._child_ended, self._wake, self._channel):
                end.close()
            worker.main(
                order,
                self._works[order.pool],
                wire.Channel.from_fd(channel_fd),
                StatusPage(MemoryFile(page_fd)),
                None if bookmark_fd is None else Bookmark(MemoryFile(bookmark_fd)),
                nursery_pid=self._pid,
                by_value=self._by_value,
            )
        except BaseException:  # noqa: BLE001 - nothing may unwind into the nursery's frames
            sys.excepthook(*sys.exc_info())
        finally:
            with contextlib.suppress(AttributeError, OSError, ValueError):
                sys.stderr.flush()
            os._exit(status)

    def _reap(self) -> None:
        """Report every worker that has ended. Only our own: the loader may have children of its own here."""
        for pid in list(self._orders):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                killpoints.reach("nursery.step.reaped")
                order = self._orders.pop(pid)
                self._condemned.pop(pid, None)
                self._channel.send(wire.Reaped(order.pool, order.worker, order.incarnation, pid, status))
