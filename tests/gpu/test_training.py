"""nnU-Net's own training on a GPU: batches that are copied to it out of the slots, and a compiler that fails."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from safeloader.cli import main
from safeloader.cli.demo.killing import Killer
from safeloader.cli.demo.processes import CommandProcess, tail
from safeloader.nnunet.short import SAFE_TRAINER, read_steps, write_trainers
from safeloader.nnunet.workspace import Workspace
from tests import compilers
from tests.workspaces import beside

EPOCHS, ITERATIONS, VAL_ITERATIONS = 3, 100, 5
KILLS = 3
NOT_REGISTERED = "slots are not registered"

Break = Callable[[Path], dict[str, str]]
Make = Callable[..., Workspace]

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU on this machine")


@pytest.fixture
def make(brain: Workspace, tmp_path: Path) -> Make:
    """Makes workspaces with results of their own."""

    def make(name: str, epochs: int = EPOCHS, iterations: int = ITERATIONS) -> Workspace:
        workspace = beside(brain, tmp_path / name)
        write_trainers(workspace.trainers, epochs=epochs, iterations=iterations, val_iterations=VAL_ITERATIONS)
        return workspace

    return make


def start(workspace: Workspace, *options: str) -> CommandProcess:
    own = {"SAFELOADER_AUDIT": "1", "nnUNet_n_proc_DA": "3"} | ({} if options else {"SAFELOADER_SEED": "5"})
    command = workspace.train_command(SAFE_TRAINER, *options, device="cuda")
    return CommandProcess(command, workspace.environment(own), workspace.folder / f"console{len(options)}.log")


def finished(workspace: Workspace, *options: str) -> str:
    """Train to the end; what it printed."""
    with start(workspace, *options) as training:
        while (returncode := training.wait(1.0)) is None:
            pass
    log = workspace.folder / f"console{len(options)}.log"
    assert returncode == 0, tail(log, 40)
    return log.read_text()


def test_workers_are_killed_and_the_job_requeued_and_the_batches_are_the_same(
    make: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    undisturbed, disturbed = make("undisturbed"), make("disturbed")
    printed = finished(undisturbed)
    output, terminated = disturbed.output_folder(SAFE_TRAINER), False
    with start(disturbed) as training:
        killer = Killer(training.pid, (signal.SIGKILL,), every_s=0.3, limit=KILLS)
        while (returncode := training.wait(0.05)) is None:
            steps = read_steps(output)
            if steps:
                killer.tick(steps[-1].workers)
            if len(killer.kills) == KILLS and steps[-1].epoch == 1 and not terminated:
                os.kill(training.pid, signal.SIGTERM)
                terminated = True
    assert (returncode, len(killer.kills)) == (143, KILLS), tail(disturbed.folder / "console0.log", 40)
    printed += (disturbed.folder / "console0.log").read_text() + finished(disturbed, "--c")
    assert main(["audit", str(undisturbed.output_folder(SAFE_TRAINER)), str(output)]) == 0
    assert f"train: the same: {EPOCHS * ITERATIONS + 1} tickets" in capsys.readouterr().out
    assert NOT_REGISTERED not in printed
    assert (output / "validation" / "summary.json").exists()


# ---- torch.compile ----


def no_compiler(folder: Path) -> dict[str, str]:
    return {"PATH": str(folder)}


def no_headers(folder: Path) -> dict[str, str]:
    return {"PATH": compilers.without_headers(folder)}


def no_triton_cache(folder: Path) -> dict[str, str]:
    """A file where the folder should be: root may write everywhere else."""
    (folder / "cache").touch()
    return {"TRITON_CACHE_DIR": str(folder / "cache")}


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (no_compiler, "found no C or C++ compiler"),
        (no_headers, "found no Python headers (Python.h)"),
        (no_triton_cache, "can't write the folder in which it keeps what it builds"),
    ],
    ids=["no compiler", "no Python.h", "no cache"],
)
def test_where_torch_compile_fails_the_training_goes_on(broken: Break, said: str, make: Make, tmp_path: Path) -> None:
    workspace = make("workspace", epochs=1, iterations=5)
    folder = tmp_path / "broken"
    folder.mkdir()
    fresh = {name: str(tmp_path / name) for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")}
    environment = workspace.environment({"nnUNet_compile": "true", "nnUNet_n_proc_DA": "1"} | fresh | broken(folder))
    for name in ("CC", "CXX"):
        environment.pop(name, None)
    command = workspace.train_command(SAFE_TRAINER, device="cuda")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    output = workspace.output_folder(SAFE_TRAINER)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len(read_steps(output)) == 5 + VAL_ITERATIONS
    lines = [line for line in done.stdout.splitlines() if "SafeLoader: torch.compile" in line]
    assert len(lines) == 1 and f"SafeLoader: torch.compile {said} (" in lines[0], done.stdout[-3000:]
