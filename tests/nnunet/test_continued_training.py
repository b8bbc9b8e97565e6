"""A real training that is killed and continued with `--c` is given the batches of one that was never disturbed."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable

import pytest

from safeloader.cli import main
from safeloader.nnunet.resume import STATE_FILE
from safeloader.nnunet.short import SAFE_TRAINER, read_steps
from safeloader.nnunet.workspace import Workspace
from safeloader.testing import wait_until

EPOCHS, ITERATIONS = 4, 10


def start(workspace: Workspace, *options: str, workers: int) -> subprocess.Popen[bytes]:
    own = {"SAFELOADER_AUDIT": "1", "nnUNet_n_proc_DA": str(workers)}
    if not options:
        own["SAFELOADER_SEED"] = "5"
    log = (workspace.folder / "console.log").open("ab")
    command = workspace.train_command(SAFE_TRAINER, *options)
    with log:
        return subprocess.Popen(command, env=workspace.environment() | own, stdout=log, stderr=log)


@pytest.fixture(scope="module")
def make(make_workspace: Callable[..., Workspace]) -> Callable[[], Workspace]:
    return lambda: make_workspace(epochs=EPOCHS, iterations=ITERATIONS, val_iterations=2, validates=False)


def test_killed_and_continued(make: Callable[[], Workspace], capsys: pytest.CaptureFixture[str]) -> None:
    undisturbed, killed = make(), make()
    whole = start(undisturbed, workers=1)

    output = killed.output_folder(SAFE_TRAINER)
    trainer = start(killed, workers=2)
    # nnU-Net writes its best checkpoint after the first epoch; the training is killed in a later one.
    wait_until(
        lambda: (output / STATE_FILE).exists() and any(step.epoch >= 1 for step in read_steps(output)),
        timeout_s=120,
        what="the second epoch",
    )
    os.kill(trainer.pid, signal.SIGKILL)
    trainer.wait(timeout=30)
    assert start(killed, "--c", workers=1).wait(timeout=200) == 0, (killed.folder / "console.log").read_text()
    assert whole.wait(timeout=200) == 0, (undisturbed.folder / "console.log").read_text()

    logs = "".join(path.read_text() for path in output.glob("training_log_*.txt"))
    assert "SafeLoader: the batches go on where the checkpoint left them (train: ticket " in logs
    assert main(["audit", str(undisturbed.output_folder(SAFE_TRAINER)), str(output)]) == 0
    last = EPOCHS * ITERATIONS
    assert f"train: the same: {last + 1} tickets, 0 to {last} (seed 5, stream 0)." in capsys.readouterr().out
