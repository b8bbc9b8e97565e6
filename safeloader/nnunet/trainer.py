"""The trainer for `nnUNetv2_train … -tr nnUNetTrainerSafeLoader`, and those that are built by name (see `named.py`)."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from safeloader.nnunet.mixin import SafeLoaderMixin


class nnUNetTrainerSafeLoader(SafeLoaderMixin, nnUNetTrainer):  # type: ignore[misc] # noqa: N801
    """nnU-Net's default trainer with SafeLoader; nnU-Net asks for this spelling of the name."""


def __getattr__(name: str) -> type:
    from safeloader.nnunet.named import trainer_class

    return trainer_class(name)
