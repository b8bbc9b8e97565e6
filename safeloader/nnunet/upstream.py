"""What we use of nnU-Net's trainer, for the type checker: the base of our mixins, which stand before a trainer class.

When the program runs it is `object`: nothing of nnU-Net is imported, and a mixin adds nothing to the classes behind it
but itself.
"""

# ruff: noqa: D102 - what each does is said in nnU-Net

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    class Trainer:
        """Attributes and methods of `nnUNetTrainer` that our mixins read or extend."""

        output_folder: str
        output_folder_base: str
        preprocessed_dataset_folder: str
        folder_with_segs_from_previous_stage: str | None
        plans_manager: Any
        configuration_manager: Any
        dataset_json: dict[str, Any]
        inference_allowed_mirroring_axes: Any
        log_file: str
        local_rank: int
        is_ddp: bool
        device: torch.device
        fold: int | str
        configuration_name: str
        num_epochs: int
        num_iterations_per_epoch: int
        num_val_iterations_per_epoch: int
        current_epoch: int
        disable_checkpointing: bool
        was_initialized: bool
        network: Any
        loss: Any
        optimizer: Any
        grad_scaler: Any
        logger: Any
        dataloader_train: Any
        dataloader_val: Any

        def initialize(self) -> None: ...
        def do_split(self) -> tuple[list[str], list[str]]: ...
        def _build_loss(self) -> Any: ...
        def get_dataloaders(self) -> tuple[Any, Any]: ...
        def on_train_start(self) -> None: ...
        def on_train_end(self) -> None: ...
        def on_epoch_end(self) -> None: ...
        def train_step(self, batch: dict[str, Any]) -> dict[str, Any]: ...
        def validation_step(self, batch: dict[str, Any]) -> dict[str, Any]: ...
        def run_training(self) -> None: ...
        def save_checkpoint(self, filename: str) -> None: ...
        def load_checkpoint(self, filename_or_checkpoint: Any) -> None: ...
        def perform_actual_validation(self, save_probabilities: bool = False) -> None: ...
        def print_to_log_file(self, *args: object, also_print_to_console: bool = True) -> None: ...

else:
    Trainer = object
