"""Validation that survives: nnU-Net's own `perform_actual_validation`, with an export pool whose processes may die.

While the method runs, the name `multiprocessing` stands for ours in its module, and in that of the function that
computes the metrics. What is exported is kept in a ledger, and cases that are done already are left out of the split,
so that a validation that is run again (`--val`, or `--c` after a crash) makes only what is missing.

Under DDP the first rank says which cases are left, and nnU-Net shares those out among the ranks anew. Left out of each
rank's own share they would leave some ranks with fewer cases than others, and nnU-Net counts its barriers by them.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import distributed

from safeloader.errors import ConfigError
from safeloader.faults.cpus import available_cpus
from safeloader.nnunet.export.call import Brief
from safeloader.nnunet.export.ledger import Ledger, inputs_of, weights_identity
from safeloader.nnunet.export.pool import Told
from safeloader.nnunet.export.standin import Multiprocessing
from safeloader.nnunet.loaders import namespaces, replaced
from safeloader.nnunet.upstream import Trainer
from safeloader.pool.book import INCIDENTS_FILE
from safeloader.report.journal import Journal

TIMEOUT_ENV: Final = "SAFELOADER_EXPORT_TIMEOUT_S"
"""How long the export of one case may take, in seconds. Unset, it follows from what other cases took (`pool.py`)."""

_METRICS: Final = "compute_metrics_on_folder"
_FLUSH_S: Final = 1.0


def export_timeout_s() -> float | None:
    """What `SAFELOADER_EXPORT_TIMEOUT_S` says; None if it is not set.

    Raises:
        ConfigError: it is not a positive number.
    """
    text = os.environ.get(TIMEOUT_ENV)
    if not text:
        return None
    try:
        timeout_s = float(text)
    except ValueError:
        timeout_s = float("nan")
    if not timeout_s > 0:
        raise ConfigError(f"{TIMEOUT_ENV}={text}: must be a number of seconds above 0, or not set")
    return timeout_s


@dataclass(frozen=True)
class _Validation:
    """One run of the validation.

    Attributes:
        ledger: what is exported. probabilities: whether they are to be written.
        targets: the outputs that belong to a case: whether each has probabilities is the validation's alone.
        inputs: the folders with preprocessed data that a prediction is made of.
    """

    ledger: Ledger
    probabilities: bool
    validation: Path
    next_stages: tuple[Path, ...]
    inputs: tuple[str | None, ...]

    def done(self, case: str) -> bool:
        """Whether all outputs of a case are there."""
        inputs = inputs_of(case, self.inputs)
        return self.ledger.done(self.validation / case, probabilities=self.probabilities, inputs=inputs) and all(
            self.ledger.done(folder / case, probabilities=None, inputs=inputs) for folder in self.next_stages
        )

    def note(self, brief: Brief, files: list[Path]) -> None:
        """An output is complete."""
        target = brief.target
        if target is None or target.parent not in (self.validation, *self.next_stages):
            return  # a trainer's own; it is made again each time
        case = target.name.removesuffix(".npz")
        self.ledger.note(target, files, probabilities=brief.probabilities, inputs=inputs_of(case, self.inputs))


class SurvivingValidation(Trainer):
    """See the module."""

    _validation: _Validation | None = None  # while it runs

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Nnu-Net's own, with our export pool.

        Raises:
            ExportError: cases could not be exported or evaluated; all others are.
            ConfigError: `SAFELOADER_EXPORT_TIMEOUT_S` is not a positive number.
        """
        timeout_s = export_timeout_s()
        validation = self._validation = self._begin_validation(save_probabilities)
        journal = Journal(Path(self.output_folder) / INCIDENTS_FILE)

        def exported(brief: Brief, files: list[Path]) -> None:
            try:
                validation.note(brief, files)
            except OSError as error:
                # It costs a second export, should this validation be run again.
                self.print_to_log_file(f"SafeLoader: {validation.ledger.path} could not be written: {error}")

        told = Told(self.print_to_log_file, lambda incident: journal.write(incident.to_dict()), exported)
        standin = Multiprocessing(available_cpus(), told, timeout_s)
        try:
            with ExitStack() as stack:
                for namespace in _namespaces(type(self)):
                    stack.enter_context(replaced(namespace, {"multiprocessing": standin}))
                super().perform_actual_validation(save_probabilities)
        finally:
            self._validation = None
            standin.close()
            journal.close(_FLUSH_S)

    def do_split(self) -> tuple[list[str], list[str]]:
        """Nnu-Net's own; while the validation runs, without the cases that are done."""
        train, validate = super().do_split()
        if self._validation is None:
            return train, validate
        kept = self._of_first_rank(lambda: [case for case in validate if self._done(case)])
        if kept:
            self.print_to_log_file(
                f"SafeLoader: {len(kept)} of {len(validate)} cases kept from an earlier validation with these weights: "
                f"to have them predicted again, remove {self._validation.ledger.path}"
            )
        return train, [case for case in validate if case not in set(kept)]

    def _done(self, case: str) -> bool:
        return self._validation is not None and self._validation.done(case)

    def _begin_validation(self, probabilities: bool) -> _Validation:
        usage = [self.plans_manager.plans, self.configuration_name, self.dataset_json]
        usage.append(self.inference_allowed_mirroring_axes)
        weights = self._of_first_rank(lambda: weights_identity(self.network.state_dict(), usage))
        folder, base = Path(self.output_folder), Path(self.output_folder_base)
        next_stages = self.configuration_manager.next_stage_names or ()
        return _Validation(
            Ledger(folder, base, weights, self.local_rank),
            probabilities,
            folder / "validation",
            tuple(base / "predicted_next_stage" / name for name in next_stages),
            (self.preprocessed_dataset_folder, self.folder_with_segs_from_previous_stage),
        )

    def _of_first_rank(self, make: Callable[[], Any]) -> Any:
        """What the first DDP rank makes, for all."""
        if not self.is_ddp:
            return make()
        shared = [make() if self.local_rank == 0 else None]
        distributed.broadcast_object_list(shared, src=0)
        return shared[0]


def _namespaces(trainer_class: type) -> Iterator[dict[str, Any]]:
    """Those in which the validation, and what computes its metrics, look `multiprocessing` up."""
    for namespace in namespaces(trainer_class, "perform_actual_validation"):
        yield namespace
        metrics = namespace.get(_METRICS)
        if inspect.isfunction(metrics):
            yield metrics.__globals__
