"""CompileGuard: torch.compile may fail, and the training goes on without it.

    step ── failure of torch.compile ──► state before the step ──► network and loss uncompiled ──► the same step again

nnU-Net compiles the network and `loss.dc` by default on a GPU, and it is compiled only when it is called: in the first
training step, in the first validation step (another mode), whenever shapes change, and in the prediction after the
training (without deep supervision). What can go wrong there has nothing to do with the training: no compiler, no
Python.h, no libcuda, a cache that can't be written, a GPU that is too old for Triton, a bug in a backend.

    compile_causes.py   is an exception such a failure, and which
    compiled.py         what is compiled, and the originals
    before_step.py      what a step has changed by then, and how to take it back
    compile_vote.py     DDP: all ranks or none

Everything else that a step raises passes through as it is, and `nnUNet_compile=f` leaves nothing to guard. A function
that is compiled where neither the network nor the loss holds it stays compiled: if it fails again, that ends the
training.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from safeloader.nnunet.before_step import BeforeStep, Draws
from safeloader.nnunet.compile_causes import NOT_COMPILED, compile_failure
from safeloader.nnunet.compile_vote import Ballot, CompileRefusedError
from safeloader.nnunet.compiled import Forward, answered, eager, is_compiled, optimized_modules
from safeloader.nnunet.loaders import namespaces, replaced
from safeloader.nnunet.upstream import Trainer

if TYPE_CHECKING:
    from safeloader.nnunet.record import TrainingRecord

_THREADS: Final = "TORCHINDUCTOR_COMPILE_THREADS"
_PREDICTOR: Final = "nnUNetPredictor"


class CompileGuard(Trainer):
    """Mixed in before an nnU-Net trainer class: see the module."""

    _safeloader: TrainingRecord | None = None
    _guarding: bool | None = None  # whether anything is compiled; None before the first step
    _uncompiled = False  # whether the training went back from torch.compile
    _ballot: Ballot | None = None
    _untold_failure: str | None = None  # what the report does not have yet

    def initialize(self) -> None:
        """Have nnU-Net build network and loss; if it compiles them, with one thread, as it intends.

        Nothing is compiled here yet, but `torch.compile` looks around: it fails where its cache can't be written, and
        on a Python that it does not know. Then they are built again, with the same random weights.
        """
        draws = Draws.so_far(self.device)
        failure = None
        try:
            super().initialize()
        except Exception as error:
            failure = compile_failure(error)
            if failure is None or self.was_initialized:
                raise
        if failure is not None:
            draws.go_on()
            self._compile_no_more()
            super().initialize()
            self._tell_uncompiled(failure.line(did=NOT_COMPILED))
        if is_compiled(self.network) or is_compiled(self.loss):
            compile_with_one_thread()

    def on_train_start(self) -> None:
        """Begin; from here on there is a report."""
        super().on_train_start()
        self._report_uncompiled()

    def train_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Train on one batch, without torch.compile if that fails."""
        return self._guarded_step(super().train_step, batch)

    def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Validate on one batch, without torch.compile if that fails."""
        return self._guarded_step(super().validation_step, batch)

    def perform_actual_validation(self, save_probabilities: bool = False) -> None:
        """Predict the validation cases; where torch.compile fails, the same patch is predicted without it."""
        with ExitStack() as stack:
            for namespace in namespaces(type(self), "perform_actual_validation"):
                if _PREDICTOR in namespace:
                    predictor = _guarded_predictor(namespace[_PREDICTOR], self._for_prediction, stack)
                    stack.enter_context(replaced(namespace, {_PREDICTOR: predictor}))
            super().perform_actual_validation(save_probabilities)

    def _guarded_step(self, step: Callable[[dict[str, Any]], dict[str, Any]], batch: dict[str, Any]) -> dict[str, Any]:
        if self._guarding is None:
            self._guarding = is_compiled(self.network) or is_compiled(self.loss)
        if not self._guarding:
            return step(batch)
        before = BeforeStep.of(self, batch)
        try:
            with self._votes():
                return step(batch)
        except Exception as error:
            line = self._survivable(error, before)
            if line is None:
                raise
        # Outside of the handler: with the exception its traceback is gone, and with it the memory of the failed step.
        before.restore()
        self._back_to_eager()
        outputs = step(batch)
        self._tell_uncompiled(line)
        return outputs

    def _votes(self) -> AbstractContextManager[None]:
        if not self.is_ddp:
            return nullcontext()
        if self._ballot is None:
            self._ballot = Ballot(self.device, [*optimized_modules(self.network), *optimized_modules(self.loss)])
        return self._ballot.held()

    def _survivable(self, error: Exception, before: BeforeStep) -> str | None:
        """What to say once the step has been repeated; None if it is not to be repeated."""
        if isinstance(error, CompileRefusedError):
            return error.failure.line(error.ranks)
        failure = compile_failure(error)
        # Under DDP the others can't be asked here: see `compile_vote.py`.
        return None if failure is None or self.is_ddp or not before.can_be_repeated else failure.line()

    def _back_to_eager(self) -> None:
        """Take torch.compile out of the network and the loss; the same parameters stay with the same optimizer."""
        self.network, self.loss = eager(self.network), eager(self.loss)
        self._compile_no_more()
        if self.is_ddp and hasattr(self.loss, "weight_factors"):
            # Without torch.compile, DDP needs a gradient from every output of the network: nnU-Net then gives the
            # coarsest one a tiny weight in place of none.
            self.loss.weight_factors = self._build_loss().weight_factors

    def _compile_no_more(self) -> None:
        self._guarding, self._uncompiled = False, True
        # On the instance: the classes in front of this one may have a method of their own.
        vars(self)["_do_i_compile"] = _never

    def _for_prediction(self, network: Any, stack: ExitStack) -> Any:
        """The network that a predictor of ours should use; until `stack` ends, each call of it is answered."""
        if self._uncompiled:
            return eager(network)  # with nnUNet_compile=t the predictor compiles what it is given
        for part in optimized_modules(network):
            stack.enter_context(answered(part, partial(self._answering, part)))
        return network

    def _answering(self, part: Any, compiled: Forward) -> Forward:
        """A forward pass in eval mode changes nothing, so the call itself can be repeated."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._uncompiled:
                return part._orig_mod(*args, **kwargs)
            try:
                return compiled(*args, **kwargs)
            except Exception as error:
                failure = compile_failure(error)
                if failure is None:
                    raise
            self._back_to_eager()
            outputs = part._orig_mod(*args, **kwargs)
            self._tell_uncompiled(failure.line())
            return outputs

        return forward

    def _tell_uncompiled(self, line: str) -> None:
        self.print_to_log_file(line)
        self._untold_failure = line
        self._report_uncompiled()

    def _report_uncompiled(self) -> None:
        if self._untold_failure is not None and self._safeloader is not None:
            with suppress(OSError):  # a report is not worth a training, and the log has the line
                self._safeloader.note("compile-failed", self._untold_failure, epoch=self.current_epoch)
            self._untold_failure = None


def compile_with_one_thread() -> None:
    """Set `TORCHINDUCTOR_COMPILE_THREADS=1`, unless the user has set it; before the first compilation.

    nnU-Net says: "More threads don't help and can cause problems", but sets it only where `run_training.py` runs as a
    script, which `nnUNetv2_train` does not do. inductor reads the variable when its configuration is imported, which
    `torch.compile` has done by then.
    """
    if _THREADS in os.environ:
        return
    os.environ[_THREADS] = "1"
    config: Any = sys.modules.get("torch._inductor.config")
    if config is not None:
        config.compile_threads = 1


def _never() -> bool:
    return False


def _guarded_predictor(predictor: type, guard: Callable[[Any, ExitStack], Any], stack: ExitStack) -> type:
    """nnU-Net's predictor class, which passes the network that it is given through `guard`."""

    class Guarded(predictor):  # type: ignore[misc]
        network: Any

        def manual_initialization(self, *args: Any, **kwargs: Any) -> None:
            super().manual_initialization(*args, **kwargs)
            self.network = guard(self.network, stack)

    Guarded.__name__ = predictor.__name__
    return Guarded
