"""SafeLoaderMixin: gives any nnU-Net trainer class workers that may die.

    class MyTrainer(SafeLoaderMixin, nnUNetTrainerNoMirroring):
        pass

The mixin decides which augmenter class the trainer's own `get_dataloaders` builds, and reports what happened. It
leaves `__init__` alone, since nnU-Net reads its signature, and the network, loss and schedule are the base trainer's.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import distributed

from safeloader.config import resolve
from safeloader.faults.cpus import available_cpus
from safeloader.faults.incident import Incident
from safeloader.nnunet.cascade import CascadeFolders
from safeloader.nnunet.compile_guard import CompileGuard
from safeloader.nnunet.history import KeepsHistory, epochs_file
from safeloader.nnunet.loaders import LOADERS, LoaderFactory, pool_name, safe_loaders, unprotected
from safeloader.nnunet.preserve import PreserveMixin
from safeloader.nnunet.record import About, TrainingRecord, put_aside, report_path
from safeloader.nnunet.resume import NoStateError, StreamStates, recall
from safeloader.nnunet.validation import SurvivingValidation
from safeloader.nnunet.versions import VersionCheck
from safeloader.pool import blur
from safeloader.pool.book import INCIDENTS_FILE
from safeloader.pool.seeding import root_seed
from safeloader.report.audit import audit_file


class SafeLoaderMixin(VersionCheck, PreserveMixin, CompileGuard, SurvivingValidation, CascadeFolders, KeepsHistory):
    """Mixed in before an nnU-Net trainer class: dead workers are replaced instead of ending the training.

    Checkpoints carry the base trainer's name, because the network is the base trainer's: a model trained with
    SafeLoader is used for prediction on a machine that has only nnU-Net.
    """

    on_incident: Callable[[Incident], None] | None = None
    """For a subclass to define: called with each failure of a worker, in a thread of its own."""

    def get_dataloaders(self) -> tuple[Any, Any]:
        """Nnu-Net's own loaders, with our augmenter around them; a line in the log if that is not possible.

        `nnUNet_n_proc_DA` is obeyed, 0 stays single-threaded; more workers than there are CPUs for this process
        are lowered to that number, and the training log says so. It also says if a transform would choose what it
        computes by timing, which workers don't let it (see `pool/blur.py`).
        """
        world_size = distributed.get_world_size() if self.is_ddp else 1
        if self.current_epoch == 0:
            for file in _of_an_earlier_run(self.local_rank):
                put_aside(Path(self.output_folder) / file)
        states = self._states_to_go_on_with()
        seed = shared_seed(self._given_seed(), is_ddp=self.is_ddp) if states is None else states.seed
        factory = LoaderFactory(self.local_rank, world_size, self.output_folder, seed, states, self.on_incident)
        cpus = available_cpus()
        with safe_loaders(type(self), factory, cpus, self.print_to_log_file):
            loaders = super().get_dataloaders()
            factory.go_on()
        warning = unprotected(loaders)
        if warning is not None:
            self.print_to_log_file(warning)
        if factory.built:
            self.print_to_log_file(f"SafeLoader: {_stream_line(seed, states)}")
        about = About(type(self).__name__, self.local_rank, self.current_epoch, cpus.reason)
        path = report_path(Path(self.output_folder), self.local_rank)
        self._safeloader = TrainingRecord(factory.built, path, about)
        remembered = self._safeloader.remembered()
        if remembered is not None:
            self.print_to_log_file(remembered)
        if any(blur.chooses_by_timing(built.generator, built.transform) for built in factory.built.values()):
            self.print_to_log_file(f"SafeLoader: {blur.NOTICE}")
        return loaders

    def on_epoch_end(self) -> None:
        """Say in one line what happened to the workers in this epoch; nothing if nothing did."""
        if self._safeloader is not None:
            news = self._safeloader.news()
            if news is not None:
                self.print_to_log_file(news)
                self._write_report("running")
        super().on_epoch_end()

    def on_train_end(self) -> None:
        """Sum up, once nnU-Net has stopped the workers."""
        super().on_train_end()
        self._end_report("finished")

    def save_checkpoint(self, filename: str) -> None:
        """Save nnU-Net's checkpoint, under the name of the trainer class that prediction needs."""
        with _named(type(self), checkpoint_trainer_name(type(self))):
            super().save_checkpoint(filename)

    def _stream_states(self) -> StreamStates | None:
        return None if self._safeloader is None else self._safeloader.states()

    def _ended_early(self, error: BaseException) -> None:
        """Sum up what an exception has ended as well."""
        # A second failure, of the report, must not take the place of the first on the screen.
        with suppress(OSError):
            self._end_report(f"{type(error).__name__}: {error}".rstrip(": "))

    def _given_seed(self) -> int | None:
        """`SAFELOADER_SEED`, if it is set."""
        return resolve({"folder": self.output_folder}).seed

    def _states_to_go_on_with(self) -> StreamStates | None:
        """Where the streams stood in the checkpoint that this training continues; None if they begin anew."""
        if self._continued is None or self.current_epoch == 0:
            return None
        try:
            states = recall(self._continued, self.current_epoch)
            wanted = self._given_seed()
            if wanted not in (None, states.seed):
                raise NoStateError(f"SAFELOADER_SEED={wanted} asks for another stream than that of seed {states.seed}")
        except NoStateError as reason:
            self.print_to_log_file(
                f"SafeLoader: the training continues, but not with the batches after {self._continued.name}: {reason}. "
                "A new stream begins."
            )
            return None
        return states

    def _end_report(self, outcome: str) -> None:
        record = self._safeloader
        if record is None or record.ended:
            return
        record.ended = True
        record.close()
        for line in record.summary():
            self.print_to_log_file(line)
        self._write_report(outcome)
        # Where stdout is a pipe or a file, what is printed so far would else follow the traceback.
        sys.stdout.flush()

    def _write_report(self, outcome: str) -> None:
        assert self._safeloader is not None
        try:
            self._safeloader.write(outcome)
        except OSError as error:
            # A report is not worth a training.
            self.print_to_log_file(f"SafeLoader: the report could not be written: {error}")


def shared_seed(given: int | None, *, is_ddp: bool) -> int:
    """The root seed of a new training: the given one, or a number that is drawn; the same for all DDP ranks."""
    seed = root_seed(None) if given is None else given
    if is_ddp:
        shared = [seed]
        distributed.broadcast_object_list(shared, src=0)
        seed = shared[0]
    return seed


def _stream_line(seed: int, states: StreamStates | None) -> str:
    if states is None:
        return f"the root seed is {seed}: SAFELOADER_SEED={seed} gives the same batches again"
    tickets = ", ".join(f"{name}: ticket {ticket}" for name, ticket in states.next_tickets.items())
    return f"the batches go on where the checkpoint left them ({tickets}; root seed {seed})"


def _of_an_earlier_run(rank: int) -> list[str]:
    """The files that a rank would append to: audits and the history are its own, the incidents are all ranks'."""
    own = [epochs_file(rank), *(audit_file(pool_name(loader, rank)) for loader in LOADERS)]
    return [INCIDENTS_FILE, *own] if rank == 0 else own


def checkpoint_trainer_name(trainer_class: type) -> str:
    """The class name under which prediction finds the network that `trainer_class` trains.

    That is the first class behind the mixin. A subclass of the mixin that builds a network of its own keeps its own
    name, as it would without SafeLoader.
    """
    method = "build_network_architecture"
    base = next(cls for cls in trainer_class.__mro__ if not issubclass(cls, SafeLoaderMixin) and hasattr(cls, method))
    same_network = inspect.getattr_static(trainer_class, method) is inspect.getattr_static(base, method)
    return (base if same_network else trainer_class).__name__


@contextmanager
def _named(cls: type, name: str) -> Iterator[None]:
    """Let `cls.__name__`, which nnU-Net writes into checkpoints, be `name` for a moment."""
    before = cls.__name__
    cls.__name__ = name
    try:
        yield
    finally:
        cls.__name__ = before
