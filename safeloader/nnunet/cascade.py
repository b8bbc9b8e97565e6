"""A cascade finds its first stage's results, whichever trainer made them: SafeLoader's, or the one behind it.

nnU-Net looks for the predictions of `3d_lowres` under the trainer's own class name. Those of the trainer that ours
stands before are as good, since the network is the same.
"""

from __future__ import annotations

import os
from pathlib import Path

from safeloader.nnunet.upstream import Trainer


class CascadeFolders(Trainer):
    """See the module."""

    def initialize(self) -> None:
        """Choose the folder with the previous stage's predictions, then nnU-Net's own."""
        if not self.was_initialized and self.folder_with_segs_from_previous_stage is not None:
            # Only here: the mixin derives from this class.
            from safeloader.nnunet.mixin import checkpoint_trainer_name

            own = Path(self.folder_with_segs_from_previous_stage)
            found = self._choose(own, type(self).__name__, checkpoint_trainer_name(type(self)))
            self.folder_with_segs_from_previous_stage = str(found)
        super().initialize()

    def _choose(self, own: Path, own_name: str, base_name: str) -> Path:
        model = own.parents[1]  # …/TRAINER__PLANS__CONFIGURATION/predicted_next_stage/NEXT
        stage = model.name.rpartition("__")[2]
        base = model.with_name(base_name + model.name.removeprefix(own_name)) / own.relative_to(model)
        if _holds_predictions(own):
            return own
        if _holds_predictions(base):
            self.print_to_log_file(f"SafeLoader: the predictions of {stage} are those of {base_name}: {base}")
            return base
        both = f"{own} or {base}" if base != own else str(own)
        self.print_to_log_file(
            f"SafeLoader: this cascade needs the predictions of {stage}, and there are none in {both}: run "
            f"nnUNetv2_train {model.parent.name} {stage} FOLD -tr {own_name} for all folds first"
        )
        return own


def _holds_predictions(folder: Path) -> bool:
    try:
        with os.scandir(folder) as entries:
            return any(not entry.name.startswith(".") and entry.is_file() for entry in entries)
    except OSError:
        return False
