"""Whatever ends a training early, `--c` goes on after the last finished epoch.

    epoch ends ──► snapshot: the bytes that save_checkpoint would write, in host memory
                     │ the file on disk is older than 15 min        │ an exception, Ctrl-C, SIGTERM …
                     ▼                                              ▼
                   checkpoint_latest.pth                          checkpoint_latest.pth, and how to go on

When a training fails, its weights are already in the middle of an epoch and its GPU may be lost, so the state has to
be kept beforehand. An epoch has ended when `on_epoch_end` is through: only then are the best Dice and the log
complete, and so a training that goes on is bit for bit the one that was not disturbed.

Why in memory, and what it costs: 30 million weights with their momentum are 243 MB. On 2 busy cores it took 0.3 to
0.5 s to serialise them into memory and 0.4 to 0.6 s into a file with fsync, on a local disk; at 100 MB/s over a network
2.4 s. nnU-Net's epochs take 30 s and more, and a training has 1000: a file for each would be 240 GB written to storage
that others use, too. In memory it is about 1 % of the time, and 243 MB (two of them while the new one replaces the
old). torch's own serialisation is used because it is exact by construction: what is shared stays shared, and what
a subclass adds is in it. A plain copy of the tensors took as long.

What kills without asking (SIGKILL, the OOM killer, a node's failure) finds the file that is 15 min and an epoch old at
most, not up to 49 epochs as in nnU-Net. nnU-Net's own checkpoints are replaced in one step, too (`checkpoints.py`).

Not covered: changes that a subclass makes after its `super().on_epoch_end()`. Under DDP the process that started the
ranks is torch's and takes SIGTERM as ever; where its end takes the ranks with it (Slurm's batch step), they may be
killed before they have written, and the file of the last 15 min is what there is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from safeloader.nnunet import go_on
from safeloader.nnunet.checkpoints import (
    EARLIER_FINAL,
    FINAL,
    LATEST,
    Snapshot,
    save_atomically,
    saving_with,
    undamaged,
)
from safeloader.nnunet.interrupts import EndedBySignal, Interrupts
from safeloader.nnunet.resume import StreamStates, remember
from safeloader.nnunet.upstream import Trainer


class PreserveMixin(Trainer):
    """Mixed in before a trainer class: keeps the state of the last finished epoch, and writes it when training ends.

    Under DDP rank 0 does so, as it alone writes checkpoints; the others just end.
    """

    checkpoint_every_s: float = 900.0
    """At an epoch's end, `checkpoint_latest.pth` is written if the last one is older than this."""

    _continued: Path | None = None  # the checkpoint that this training goes on from
    _snapshot: Snapshot | None = None
    _being_taken: Snapshot | None = None
    _written_at_s: float = 0.0
    _complaint: str | None = None
    _doing: str = "training"

    @cached_property
    def _interrupts(self) -> Interrupts:
        return Interrupts(self._stuck)

    @cached_property
    def _written(self) -> dict[str, int]:
        """The checkpoints that this run has written or was loaded from: which epoch's state is in them."""
        return {}

    def run_training(self) -> None:
        """Train; whatever ends it early, the last finished epoch's state is on disk and the last line says so."""
        self._written_at_s = time.monotonic()
        with self._preserving("training"):
            super().run_training()

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Validate; if it ends early, the last line says how to do it again."""
        with self._preserving("validation"):
            super().perform_actual_validation(save_probabilities)

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Train on one batch, unless a signal has come since the last."""
        self._interrupts.step()
        return super().train_step(batch)

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Validate on one batch, unless a signal has come since the last."""
        self._interrupts.step()
        return super().validation_step(batch)

    def on_epoch_end(self) -> None:
        """End the epoch, and keep its state; a signal waits for that."""
        epoch = self.current_epoch
        with self._interrupts.held():
            super().on_epoch_end()
            if self.local_rank == 0 and not self.disable_checkpointing:
                self._keep(epoch)
                self._write_if_due()

    def on_train_end(self) -> None:
        """End the training; what was kept for its failure is not needed any more."""
        super().on_train_end()
        self._snapshot = None

    def save_checkpoint(self, filename: str) -> None:
        """Save nnU-Net's checkpoint in one step, and beside it where the streams stand; a signal waits for that."""
        if self._being_taken is not None:
            super().save_checkpoint(filename)
            return
        with self._interrupts.held():
            with saving_with(type(self), save_atomically):
                super().save_checkpoint(filename)
            if self.local_rank == 0 and not self.disable_checkpointing:
                self._note_written(Path(filename), self.current_epoch, self._stream_states())

    def load_checkpoint(self, filename_or_checkpoint: Any) -> None:
        """Load it, and remember which; the next best one if `checkpoint_latest.pth` is damaged.

        Raises:
            CheckpointError: It is damaged, and there is none that training may go on from instead.
        """
        if not isinstance(filename_or_checkpoint, str | os.PathLike):
            super().load_checkpoint(filename_or_checkpoint)
            self._continued = None
            return
        asked = Path(filename_or_checkpoint)
        self._continued = undamaged(asked, self.print_to_log_file)
        super().load_checkpoint(filename_or_checkpoint if self._continued == asked else str(self._continued))
        self._written[self._continued.name] = self.current_epoch - 1

    def _stream_states(self) -> StreamStates | None:
        """For who knows: where the loaders' streams stand."""
        return None

    def _ended_early(self, error: BaseException) -> None:
        """For who has something to do once the state is on disk."""

    # ---- at the end of an epoch ----

    def _keep(self, epoch: int) -> None:
        """Take the snapshot of the epoch that has just ended; the old one is kept until it is complete."""
        fresh = Snapshot(epoch, Path(self.output_folder) / LATEST)
        following, self.current_epoch = self.current_epoch, epoch  # `save_checkpoint` writes the next one's number
        self._being_taken = fresh
        try:
            with saving_with(type(self), fresh.save):
                self.save_checkpoint(str(fresh.main))
        except (MemoryError, OSError, RuntimeError) as error:  # torch's "can't allocate memory" is a RuntimeError
            self._complain(f"the state after epoch {epoch} could not be kept in memory: {type(error).__name__} {error}")
            return
        finally:
            self._being_taken = None
            self.current_epoch = following
        if fresh.main in fresh.files:  # else this trainer writes no checkpoints
            fresh.states = self._stream_states()
            self._snapshot = fresh

    def _write_if_due(self) -> None:
        last = self.current_epoch >= self.num_epochs  # then nnU-Net writes the final one
        if last or time.monotonic() - self._written_at_s < self.checkpoint_every_s:
            return
        try:
            self._write_snapshot()
        except OSError as error:
            self._complain(f"{LATEST} could not be written, and is as it was: {error}")

    def _write_snapshot(self) -> None:
        """Bring the snapshot to the disk, if that epoch's state is not there already, as the latest or the final one.

        Raises:
            OSError: It can't be written; what was there before still is.
        """
        kept = self._snapshot
        if kept is not None and kept.epoch not in (self._written.get(LATEST), self._written.get(FINAL)):
            kept.write()
            self._note_written(kept.main, kept.epoch, kept.states)

    def _note_written(self, checkpoint: Path, epoch: int, states: StreamStates | None) -> None:
        self._written[checkpoint.name] = epoch
        try:
            if states is not None:
                remember(checkpoint, epoch + 1, states)
        except OSError as error:
            # Without it a continued training has other batches; that is not worth this training.
            self.print_to_log_file(f"SafeLoader: where the streams stand could not be written: {error}")
        if checkpoint.name == LATEST:
            self._written_at_s = time.monotonic()
            self._put_aside_final(checkpoint.with_name(FINAL))

    def _put_aside_final(self, final: Path) -> None:
        """`--c` would take an earlier training's end for this one's."""
        if final.exists() and self._written.get(FINAL, -1) < self._written[LATEST]:
            with suppress(OSError):
                final.replace(final.with_name(EARLIER_FINAL))
                self.print_to_log_file(
                    f"SafeLoader: {final} is an earlier training's: renamed to {EARLIER_FINAL}, since --c would take it"
                )

    def _complain(self, what: str) -> None:
        """Once for each new complaint: it may come after every epoch."""
        if what.partition(":")[2] != self._complaint:
            self._complaint = what.partition(":")[2]
            self.print_to_log_file(f"SafeLoader: {what}. Training goes on.")

    # ---- when something ends the training ----

    @contextmanager
    def _preserving(self, what: str) -> Iterator[None]:
        self._doing = what
        with self._interrupts.installed():
            try:
                yield
                self._interrupts.check()
            except BaseException as error:
                with self._interrupts.ending():
                    failure = self._preserve()
                self._ended_early(error)
                if self.local_rank == 0:
                    cause = error.name if isinstance(error, EndedBySignal) else type(error).__name__
                    self._say_last(error, self._last_line(cause, failure))
                raise

    def _stuck(self, signal_name: str) -> None:
        """The training thread does not come back from native code (called in another one): end without it."""
        failure = self._preserve()
        if self.local_rank == 0:
            line = self._last_line(f"{signal_name}, while native code did not return", failure)
            self.print_to_log_file(line, also_print_to_console=False)
            with suppress(OSError):
                os.write(2, f"{line}\n".encode())  # not print: the other thread may be in one

    def _preserve(self) -> OSError | None:
        """Write the snapshot at once: SIGKILL may follow (Slurm's `KillWait` is 30 s)."""
        try:
            self._write_snapshot()
        except OSError as error:
            return error
        return None

    def _last_line(self, cause: str, failure: OSError | None) -> str:
        unfinished = self._doing == "training" and self.current_epoch < self.num_epochs
        where = f"in epoch {self.current_epoch} by" if unfinished else "by"
        lost = None if self._snapshot is None else self._snapshot.epoch
        what_now = go_on.what_now(self, self._written, lost, failure)
        return f"SafeLoader: the {self._doing} was ended {where} {cause}: {what_now}"

    def _say_last(self, error: BaseException, line: str) -> None:
        """Below the traceback where Python can do that (3.11); where it prints none, as for a signal, just so."""
        below = hasattr(error, "add_note") and not isinstance(error, SystemExit)
        with suppress(OSError):  # the terminal may be what was lost
            self.print_to_log_file(line, also_print_to_console=not below)
        if below:
            error.add_note(line)
