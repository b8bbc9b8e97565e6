"""What `python -m tests.versions` runs in each environment: one short training. Imports only what is installed there.

Its last line is "RESULT " and what was measured, as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from safeloader.cli.demo.training import Length, Plan, train
from safeloader.nnunet.brain import DATASET_NAME, write_dataset
from safeloader.nnunet.install import install, variants_folder
from safeloader.nnunet.short import write_trainers
from safeloader.nnunet.workspace import Workspace
from safeloader.testing import DEADLY

LENGTH = Length(epochs=3, iterations=25, val_iterations=2)
TRAINER = "nnUNetTrainerSafeLoaderShort"
"""Its base is `nnUNetTrainerShort`; before nnU-Net 2.8.0 trainers are looked for in nnU-Net's own folder only."""


def main(folder: Path) -> None:
    workspace = Workspace(folder, DATASET_NAME, processes=1)
    install()
    write_trainers(
        variants_folder(), epochs=LENGTH.epochs, iterations=LENGTH.iterations, val_iterations=LENGTH.val_iterations
    )
    write_dataset(workspace.raw, cases=5, resolution_mm=6)
    command = workspace.preprocess_command("3d_fullres")
    subprocess.run(command, env=workspace.environment(), check=True, stdout=subprocess.DEVNULL, timeout=600)
    workspace.add_small_configuration(patch=(24, 32, 24), features=(4, 8, 16))
    plan = Plan("SafeLoader", "three workers killed", TRAINER, DEADLY, 0.25, kill_limit=3, calm_steps=8)
    run = train(workspace, plan, LENGTH, device="cpu", show=lambda run: None)
    assert run.outcome is not None
    measured = {
        "outcome": run.outcome.value,
        "batches": f"{len(run.steps)} of {LENGTH.batches}",
        "kills": len(run.kills),
        "workers replaced": run.restarts or 0,
        "Dice": "–" if run.dice is None else f"{run.dice:.3f}",
        "last_words": "\n".join(run.last_words),
    }
    print("RESULT", json.dumps(measured), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
