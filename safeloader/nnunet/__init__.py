"""SafeLoader inside nnU-Net: `nnUNetv2_train … -tr nnUNetTrainerSafeLoader`.

    mixin.py      SafeLoaderMixin: what a trainer gets from us; works before any nnU-Net trainer class
    trainer.py    nnUNetTrainerSafeLoader = the mixin + nnUNetTrainer
    named.py      the mixin + any other trainer, by name
    versions.py   which nnU-Net this works with
    upstream.py   what our mixins use of nnU-Net's trainer, for the type checker
    validation.py a validation whose processes may die; export/ is its pool
    cascade.py    finds the results of a cascade's first stage
    loaders.py    makes the stock get_dataloaders build our augmenters
    compile_guard.py   CompileGuard: torch.compile may fail; with compile_causes.py (did it, and why), compiled.py (what
                       it was put around), before_step.py (a step taken back), compile_vote.py (DDP: all ranks or none)
    preserve.py   the last finished epoch is on disk whatever ends a training; with checkpoints.py (files in one step),
                  interrupts.py (signals), go_on.py (the command to go on with)
    record.py     what the training log and safeloader_report.json say
    history.py    safeloader_epochs.jsonl: a line per epoch, for `safeloader report`
    install.py    puts shim/ where nnU-Net looks for trainers
    shim/         the module of a few lines that leads nnU-Net to the trainers
    apart.py      processes to which a command leaves what may crash or hang
    stock.py check/ bench/ probe.py   what the commands check, bench and doctor look at
    brain.py kinds.py workspace.py short.py    small datasets of each kind and short trainings: for the demo, the tests

Only this package imports nnunetv2, and only `trainer.py` does so on import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safeloader.nnunet.mixin import SafeLoaderMixin
    from safeloader.nnunet.trainer import nnUNetTrainerSafeLoader

__all__ = ["SafeLoaderMixin", "nnUNetTrainerSafeLoader"]


def __getattr__(name: str) -> Any:
    # On demand: `safeloader install` uses this package and should not wait for nnU-Net's imports.
    if name == "SafeLoaderMixin":
        from safeloader.nnunet.mixin import SafeLoaderMixin

        return SafeLoaderMixin
    if name == "nnUNetTrainerSafeLoader":
        from safeloader.nnunet.trainer import nnUNetTrainerSafeLoader

        return nnUNetTrainerSafeLoader
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
