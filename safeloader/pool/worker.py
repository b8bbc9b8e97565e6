"""A worker: makes the batch of one ticket after another, each in the slot that it was given.

    receive Produce(ticket, slot) → seed → next(loader) → transform(**batch) → encode into slot → send Done
                                      └──────────── any exception ───────────► encode record  → send Failed

It says on its status page what it is doing, and leaves its stacks there if it crashes. It is forked from the nursery,
is tied to its life, and never returns from `main`. It imports nothing and starts no thread of its own: whatever it
needs, the nursery has imported.
"""

from __future__ import annotations

import contextlib
import gc
import inspect
import os
import sys
from typing import Any, Final, NoReturn

from safeloader import killpoints
from safeloader.faults.exits import ExitCode
from safeloader.faults.storage import place, read_failure
from safeloader.pool import process, wire
from safeloader.pool.cases import Cases, PassOver
from safeloader.pool.course import Course
from safeloader.pool.failure import FailureRecord, describe, format_remote, pickle_exception
from safeloader.pool.owned import OwnedGenerators
from safeloader.pool.seeding import seed_everything
from safeloader.pool.shuffled import ShuffledLists
from safeloader.pool.stopwatch import Stopwatch, cpus_of_this_process
from safeloader.pool.work import EpochEnd, Work
from safeloader.ring import codec
from safeloader.ring.bookmark import Bookmark
from safeloader.ring.digest import digest
from safeloader.ring.memfile import MemoryFile
from safeloader.ring.status_page import Stage, StatusPage

_MAX_DRAWS: Final = 1000
"""Draws of one ticket that may all hold a quarantined case: at most 5 % of the cases are quarantined."""

_BUSY_S: Final = 1.0
"""A worker that has waited so long for a ticket has time to give memory back, and to get it again later."""


def main(
    order: wire.Fork,
    work: Work,
    channel: wire.Channel,
    page: StatusPage,
    bookmark: Bookmark | None,
    *,
    nursery_pid: int,
    by_value: bool,
) -> NoReturn:
    """Run a worker in a process that was just forked, until the trainer or the nursery is gone."""
    process.die_with(nursery_pid)
    process.leave_interrupts_to_trainer()
    process.set_title(order.title)
    process.raise_oom_score()
    process.leave_stacks(page.stacks_file())
    killpoints.enter("worker", first_life=order.worker == 0 and order.incarnation == 0)
    killpoints.reach("worker.step.started")
    try:
        _Worker(order, work, channel, page, bookmark, by_value=by_value).run()
    except wire.ChannelClosedError:
        os._exit(ExitCode.CHANNEL_LOST)


class _Worker:
    def __init__(
        self,
        order: wire.Fork,
        work: Work,
        channel: wire.Channel,
        page: StatusPage,
        bookmark: Bookmark | None,
        *,
        by_value: bool,
    ) -> None:
        self._order = order
        self._work = work
        self._channel = channel
        self._page = page
        self._by_value = by_value
        self._slots: dict[int, MemoryFile] = {}
        self._batches = 0
        self._stage = Stage.STARTING
        self._ticket: int | None = None
        self._in_hand: tuple[str, ...] = ()
        self._stopwatch = Stopwatch()
        self._cases = Cases(self._touch)
        self._owned = OwnedGenerators()
        self._shuffled = ShuffledLists()
        self._course: Course | None = None
        if bookmark is not None:
            self._course = Course(order, work, self._cases, bookmark, lambda: self._touch(Stage.LOADING))

    def run(self) -> NoReturn:
        draws_from = self._start()
        self._channel.send(wire.Ready(draws_from, cpus_of_this_process() if self._stopwatch.works else 0))
        while True:
            self._ticket = None
            self._touch(Stage.IDLE)
            if not self._channel.wait(_BUSY_S):
                process.give_back_freed_memory()
            message, fds = self._channel.receive()
            match message:
                case wire.Produce(ticket, slot, attempt):
                    if fds:
                        self._slots[slot] = MemoryFile(fds[0])
                    self._produce(ticket, slot, attempt)
                case wire.Avoid(cases):
                    self._cases.avoid(cases)
                case wire.Retire():
                    os._exit(ExitCode.RETIRED)
                case _:
                    raise AssertionError(f"not for a worker: {message}")

    def _start(self) -> int | None:
        """What the stock worker does first: its own folder and thread id, and a loader at its beginning.

        Returns:
            How many cases the loader draws from, or None if that is not known.
        """
        gc.enable()
        if self._order.cwd is not None:
            with contextlib.suppress(FileNotFoundError):
                os.chdir(self._order.cwd)
        try:
            if hasattr(self._work.loader, "set_thread_id"):
                self._work.loader.set_thread_id(self._order.worker)
            cases = self._cases.attach(self._work.loader)
            if self._course is not None:
                self._course.begin()
            else:
                self._owned = OwnedGenerators(self._work.loader, self._work.transform)
                self._shuffled = ShuffledLists(self._work.loader, self._work.transform)
            return cases
        except BaseException as error:  # noqa: BLE001 - the worker's outermost boundary: the trainer raises it
            kind, text = describe(error)
            self._channel.send(wire.StartFailed(f"{kind}: {text}", format_remote(error)))
            os._exit(ExitCode.START_FAILED)

    def _touch(self, stage: Stage, cases: tuple[str, ...] = ()) -> None:
        """Say on the status page what is done from now on."""
        self._stage, self._in_hand = stage, cases
        self._page.enter(stage, self._ticket, cases=cases, batches=self._batches)

    def _produce(self, ticket: int, slot: int, attempt: int) -> None:
        batch: Any = None
        self._ticket = ticket
        self._stopwatch.start()
        try:
            if self._course is not None:
                self._touch(Stage.LOADING)
                if not self._course.go_to(ticket, attempt):
                    os._exit(ExitCode.SPENT)
            batch = self._make(attempt)
            if self._course is None and not self._batches and self._owned.look_again():
                batch = self._make(attempt)  # generators that came into being with it were not seeded
            self._touch(Stage.ENCODING, self._cases.batch)
            codec.encode(batch, self._slots[slot], ticket, by_value=self._by_value)
            killpoints.reach("worker.step.encoded")
            if self._course is not None:
                self._course.made()
            done: wire.Message = self._done(batch, ticket, slot)
        except BaseException as error:  # noqa: BLE001 - the worker's outermost boundary: the trainer raises it
            record = self._record(error, batch)
            codec.encode(record, self._slots[slot], ticket, by_value=self._by_value)
            done = wire.Failed(ticket, slot)
        finally:
            # What the user's code printed must not wait in a buffer for a SIGKILL.
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(AttributeError, OSError, ValueError):  # a daemon may have closed them
                    stream.flush()
        self._batches += 1
        self._channel.send(done)
        if isinstance(done, wire.Failed) and inspect.isgenerator(self._work.loader):
            os._exit(ExitCode.SPENT)

    def _done(self, batch: Any, ticket: int, slot: int) -> wire.Done:
        """The batch is encoded: so what can't be pickled was found and said before it gets a checksum."""
        known = digest(batch) if self._order.audit else None
        took = self._stopwatch.stop()
        effort = None if took is None else (took.cpu_s, took.alone_s)
        if known is None:
            return wire.Done(ticket, slot, self._cases.batch, effort)
        return wire.Done(ticket, slot, self._cases.batch, effort, known.checksum, known.parts)

    def _make(self, attempt: int) -> Any:
        batch = self._load(attempt)
        killpoints.reach("worker.step.loaded")
        self._cases.made(batch)
        transform = self._work.transform if self._course is None else self._course.transform
        if transform is not None and not isinstance(batch, EpochEnd):
            self._touch(Stage.TRANSFORMING, self._cases.batch)
            batch = transform(**batch)
        killpoints.reach("worker.step.transformed")
        return batch

    def _load(self, attempt: int) -> Any:
        """The first draw from `attempt` on that holds no quarantined case."""
        assert self._ticket is not None
        if self._course is not None:
            return self._course.load()
        for draw in range(attempt, attempt + _MAX_DRAWS):
            self._cases.begin()
            self._touch(Stage.LOADING)
            seed_everything(self._order.seed, self._order.stream, self._ticket, draw)
            self._owned.seed(self._order.seed, self._order.stream, self._ticket, draw)
            self._shuffled.restore()
            killpoints.reach("worker.step.seeded")
            with contextlib.suppress(PassOver):
                return next(self._work.loader)
        raise RuntimeError(f"each of {_MAX_DRAWS} draws holds a case that is quarantined")

    def _record(self, error: BaseException, batch: Any) -> FailureRecord:
        kind, text = describe(error)
        path = None
        if self._stage is Stage.ENCODING:
            path = codec.unpicklable_path(batch, by_value=self._by_value)
        read = read_failure(error)
        return FailureRecord(
            kind=kind,
            text=text,
            traceback=format_remote(error),
            stage=self._stage,
            cases=self._in_hand,
            place=place(error),
            read=None if read is None else read.value,
            pid=os.getpid(),
            worker=self._order.worker,
            incarnation=self._order.incarnation,
            unpicklable_path=path,
            pickled=pickle_exception(error),
        )
