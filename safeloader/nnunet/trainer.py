"""The trainer for `nnUNetv2_train … -tr nnUNetTrainerSafeLoader`."""

from __future__ import annotations

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from safeloader.nnunet.mixin import SafeLoaderMixin


class nnUNetTrainerSafeLoader(SafeLoaderMixin, nnUNetTrainer):  # type: ignore[misc] # noqa: N801
    """nnU-Net's default trainer with SafeLoader; nnU-Net asks for this spelling of the name."""
