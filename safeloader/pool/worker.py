"""A worker: makes the batch of one ticket after another, each in the slot that it was given.

    receive Produce(ticket, slot) → seed → next(loader) → transform(**batch) → encode into slot → send Done
                                      └──────────── any exception ───────────► encode record  → send Failed

It says on its status page what it is doing. It is forked from the nursery, is tied to its life, and never returns
from `main`. It imports nothing and starts no thread of its own: whatever it needs, the nursery has imported.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
from typing import Any, NoReturn

from safeloader import killpoints
from safeloader.faults.exits import ExitCode
from safeloader.pool import process, wire
from safeloader.pool.failure import FailureRecord, describe, format_remote, pickle_exception
from safeloader.pool.seeding import seed_everything
from safeloader.pool.work import Work
from safeloader.ring import codec
from safeloader.ring.memfile import MemoryFile
from safeloader.ring.status_page import Stage, StatusPage


def main(
    order: wire.Fork, work: Work, channel: wire.Channel, page: StatusPage, *, nursery_pid: int, by_value: bool
) -> NoReturn:
    """Run a worker in a process that was just forked, until the trainer or the nursery is gone."""
    process.die_with(nursery_pid)
    process.leave_interrupts_to_trainer()
    process.set_title(order.title)
    process.raise_oom_score()
    killpoints.enter("worker", first_life=order.worker == 0 and order.incarnation == 0)
    killpoints.reach("worker.step.started")
    try:
        _Worker(order, work, channel, page, by_value=by_value).run()
    except wire.ChannelClosedError:
        os._exit(ExitCode.CHANNEL_LOST)


class _Worker:
    def __init__(
        self, order: wire.Fork, work: Work, channel: wire.Channel, page: StatusPage, *, by_value: bool
    ) -> None:
        self._order = order
        self._work = work
        self._channel = channel
        self._page = page
        self._by_value = by_value
        self._slots: dict[int, MemoryFile] = {}
        self._batches = 0
        self._stage = Stage.STARTING
        self._case: str | None = None

    def run(self) -> NoReturn:
        self._start()
        self._channel.send(wire.Ready())
        while True:
            self._enter(Stage.IDLE)
            received = self._channel.receive()
            assert received is not None, "a waiting receive returns a message or raises"
            order, fds = received
            assert isinstance(order, wire.Produce), "workers are asked for nothing else"
            if fds:
                self._slots[order.slot] = MemoryFile(fds[0])
            self._produce(order.ticket, order.slot)

    def _start(self) -> None:
        """What the stock worker does first: its own folder and thread id, and a loader at its beginning."""
        gc.enable()
        if self._order.cwd is not None:
            with contextlib.suppress(FileNotFoundError):
                os.chdir(self._order.cwd)
        try:
            if hasattr(self._work.loader, "set_thread_id"):
                self._work.loader.set_thread_id(self._order.worker)
        except BaseException as error:  # noqa: BLE001 - the worker's outermost boundary: the trainer raises it
            kind, text = describe(error)
            self._channel.send(wire.StartFailed(f"{kind}: {text}", format_remote(error)))
            os._exit(ExitCode.START_FAILED)

    def _enter(self, stage: Stage, ticket: int | None = None) -> None:
        self._stage = stage
        self._page.enter(stage, ticket, case=self._case, batches=self._batches)

    def _produce(self, ticket: int, slot: int) -> None:
        batch: Any = None
        try:
            batch = self._make(ticket)
            self._enter(Stage.ENCODING, ticket)
            codec.encode(batch, self._slots[slot], ticket, by_value=self._by_value)
            killpoints.reach("worker.step.encoded")
            done: wire.Message = wire.Done(ticket, slot)
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
        self._case = None
        self._channel.send(done)

    def _make(self, ticket: int) -> Any:
        self._enter(Stage.LOADING, ticket)
        seed_everything(self._order.seed, self._order.stream, ticket)
        killpoints.reach("worker.step.seeded")
        batch = next(self._work.loader)
        killpoints.reach("worker.step.loaded")
        self._case = _case_of(batch)
        if self._work.transform is not None:
            self._enter(Stage.TRANSFORMING, ticket)
            batch = self._work.transform(**batch)
        killpoints.reach("worker.step.transformed")
        return batch

    def _record(self, error: BaseException, batch: Any) -> FailureRecord:
        kind, text = describe(error)
        path = None
        if self._stage is Stage.ENCODING:
            path = codec.unpicklable_path(batch, by_value=self._by_value)
        return FailureRecord(
            kind=kind,
            text=text,
            traceback=format_remote(error),
            stage=self._stage,
            case=self._case,
            pid=os.getpid(),
            worker=self._order.worker,
            incarnation=self._order.incarnation,
            unpicklable_path=path,
            pickled=pickle_exception(error),
        )


def _case_of(batch: Any) -> str | None:
    """The identifiers of a batch's samples, where it carries them as nnU-Net's and batchgenerators' do."""
    keys = batch.get("keys") if isinstance(batch, dict) else None
    try:
        return ", ".join(str(key) for key in keys) if keys is not None else None
    except TypeError:
        return None
