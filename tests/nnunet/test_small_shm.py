"""Training in a container as Docker makes it: 64 MiB of `/dev/shm`. Stock nnU-Net hangs; with SafeLoader it trains."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest

from safeloader.nnunet.short import SAFE_TRAINER, STOCK_TRAINER, Step, read_steps
from safeloader.nnunet.workspace import PLANS, SMALL_CONFIGURATION, Workspace
from safeloader.testing import wait_until

CONFIGURATION = "3d_many"
"""As `3d_small`, with batches of 72 MB. (Of smaller ones the stock class loses some, and others get through.)"""
BATCH_SIZE = 640
STEPS = 2  # one of training, one of validation

HANGS_FOR_S = 20
"""How long the stock training is watched after its loader has failed. It would hang for ever."""

pytestmark = pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "true"], check=False, capture_output=True).returncode != 0,
    reason="needs the right to make a mount namespace",
)


@pytest.fixture(scope="module")
def workspace(brain_workspace: Workspace, make_workspace: Callable[..., Workspace]) -> Workspace:
    path = brain_workspace.preprocessed / brain_workspace.dataset / f"{PLANS}.json"
    plans = json.loads(path.read_text())
    architecture = deepcopy(plans["configurations"][SMALL_CONFIGURATION]["architecture"])
    architecture["arch_kwargs"]["features_per_stage"] = [1, 1, 1]  # the network is not what this is about
    plans["configurations"][CONFIGURATION] = {
        "inherits_from": SMALL_CONFIGURATION,
        "batch_size": BATCH_SIZE,
        "architecture": architecture,
    }
    path.write_text(json.dumps(plans))
    return make_workspace(epochs=1, iterations=1, val_iterations=1)


def _train(workspace: Workspace, trainer: str, console: Path) -> subprocess.Popen[bytes]:
    command = [CONFIGURATION if word == SMALL_CONFIGURATION else word for word in workspace.train_command(trainer)]
    # What is left in /dev/shm is listed at the end, while the namespace is still there.
    script = f"mount -t tmpfs -o size=64m tmpfs /dev/shm && {shlex.join(command)}; code=$?; ls /dev/shm; exit $code"
    return subprocess.Popen(
        ["unshare", "-m", "sh", "-c", script],
        env=workspace.environment({"nnUNet_n_proc_DA": "1"}),
        stdout=console.open("wb"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def _output(workspace: Workspace, trainer: str) -> Path:
    small = workspace.output_folder(trainer)
    return small.parents[1] / small.parent.name.replace(SMALL_CONFIGURATION, CONFIGURATION) / small.name


def _stock_steps(workspace: Workspace) -> list[Step]:
    return read_steps(_output(workspace, STOCK_TRAINER))


def _end(training: subprocess.Popen[bytes]) -> None:
    os.killpg(training.pid, signal.SIGKILL)
    training.wait()


def test_stock_hangs_and_safeloader_trains(workspace: Workspace, tmp_path: Path) -> None:
    console = tmp_path / "safe.txt"
    training = _train(workspace, SAFE_TRAINER, console)
    try:
        assert training.wait(timeout=240) == 0, console.read_text()[-3000:]
    finally:
        if training.poll() is None:
            _end(training)
    assert len(read_steps(_output(workspace, SAFE_TRAINER))) == STEPS
    report = json.loads((_output(workspace, SAFE_TRAINER) / "safeloader_report.json").read_text())
    assert report["loaders"]["train"]["restarts"] == 0
    assert "safeloader" not in console.read_text().splitlines()[-1], "something of ours is left in /dev/shm"

    console = tmp_path / "stock.txt"
    training = _train(workspace, STOCK_TRAINER, console)
    try:
        wait_until(lambda: "No space left on device" in console.read_text(), timeout_s=120)
        with pytest.raises(TimeoutError):  # it knows that now, and goes on as if nothing had happened
            wait_until(lambda: training.poll() is not None or bool(_stock_steps(workspace)), timeout_s=HANGS_FOR_S)
    finally:
        _end(training)
