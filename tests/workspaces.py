"""Several workspaces on one preprocessed dataset."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from safeloader.nnunet.workspace import Workspace


def beside(workspace: Workspace, folder: Path) -> Workspace:
    """A workspace with results and trainers of its own in `folder`, on the same data."""
    folder.mkdir(exist_ok=True)
    made = replace(workspace, folder=folder)
    made.raw.symlink_to(workspace.raw)
    made.preprocessed.symlink_to(workspace.preprocessed)
    return made
