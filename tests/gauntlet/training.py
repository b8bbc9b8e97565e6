"""nnU-Net's own `nnUNetv2_train` of one kind, with the faults that are thrown at it, watched to its end."""

from __future__ import annotations

import json
import shutil
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import psutil

import safeloader
from safeloader.cli.demo.processes import CommandProcess, tail
from safeloader.nnunet.kinds import Kind
from safeloader.nnunet.short import read_steps
from safeloader.nnunet.workspace import Workspace
from safeloader.testing import wait_until
from tests.gauntlet import orders
from tests.gauntlet.faults import LEFT_IN_SHM, Fault, Scene, Terminated, WorkersSignalled

LIMIT_S: Final = 600.0
"""A training that takes longer hangs."""
_LOOK_EVERY_S: Final = 0.05
_GONE_S: Final = 10.0
_WORKERS: Final = 2
_STEP_S: Final = 0.2
"""What a step takes at least while faults are thrown: 16 s for all of a training."""


@dataclass
class Struck:
    """What became of a fault: how often it struck one training, and whether that was seen."""

    name: str
    times: int
    proven: bool


@dataclass
class Training:
    """One training of one configuration, from its beginning to nnU-Net's `summary.json`.

    Attributes:
        configuration: Which. fold: which.
        output: Where nnU-Net writes.
        failure: How it ended, if not well.
        struck: What became of the faults.
        left: Processes, and entries of `/dev/shm`, that are there after its end.
        seconds: How long it took, with all its starts.
    """

    configuration: str
    fold: str
    output: Path
    failure: str | None = None
    struck: list[Struck] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    seconds: float = 0.0


def run_kind(
    kind: Kind, folder: Path, prepared: Workspace, faults: Sequence[type[Fault]], seed: int, ended: Callable[[], bool]
) -> list[Training]:
    """Train all configurations of a kind in `folder`, in order; the rest is left out after one that failed.

    Args:
        kind: Which.
        folder: Made; results and logs go there.
        prepared: Where the preprocessed datasets are.
        faults: What is thrown at each training; nothing gives an undisturbed one.
        seed: Of the batches and of the first weights.
        ended: Whether all is to end now.
    """
    folder.mkdir(parents=True)
    workspace = replace(kind.workspace(prepared), folder=folder)
    workspace.raw.symlink_to(prepared.raw)
    # Its own: nnU-Net writes into it, the splits and unpacked files.
    shutil.copytree(prepared.preprocessed, workspace.preprocessed)
    workspace.trainers.mkdir()
    line = f"from tests.gauntlet.trainer import {orders.TRAINER}\n"
    (workspace.trainers / "gauntlet.py").write_text(line, encoding="utf-8")
    trainings: list[Training] = []
    for configuration, fold in kind.trainings:
        thrown = [fault(folder / f"faults-{configuration}") for fault in faults]
        watched = _Watched(workspace, configuration, fold, thrown, seed)
        trainings.append(watched.to_its_end(ended))
        if trainings[-1].failure is not None:
            break
    return trainings


class _Watched:
    """One training."""

    def __init__(self, workspace: Workspace, configuration: str, fold: str, faults: Sequence[Fault], seed: int) -> None:
        self._workspace, self._faults = workspace, faults
        self._configuration, self._fold = configuration, fold
        self._output = workspace.output_folder(orders.TRAINER, configuration=configuration, fold=fold)
        self._mark = uuid.uuid4().hex
        self._seed = seed
        self._logs: list[Path] = []
        for place, fault in enumerate(faults):
            fault.before = [other for other in faults[:place] if isinstance(other, WorkersSignalled)]

    def to_its_end(self, ended: Callable[[], bool]) -> Training:
        """Start it, and go on with `--c` after a SIGTERM of ours, until nnU-Net has validated."""
        began = time.monotonic()
        shm = _in_shm()
        training = Training(self._configuration, self._fold, self._output)
        options: tuple[str, ...] = ()
        while True:
            code = self._start(options, began + LIMIT_S, ended)
            training.left += self._left_behind()
            # As often as it was terminated, and not after an end of its own.
            if code == 0 or code is None or len(self._logs) > self._terminations():
                break
            options = ("--c",)
        scene = self._scene(0)
        training.struck = [Struck(fault.name, fault.times, fault.proven(scene)) for fault in self._faults]
        training.left += [f"/dev/shm/{name}" for name in sorted(_in_shm() - shm) if "safeloader" in name]
        training.left += [line for line in scene.console.splitlines() if _names_something_left(line)]
        if code is None:
            training.failure = f"did not end within {LIMIT_S:g} s"
        elif code != 0:
            training.failure = f"exit status {code}: {' / '.join(tail(self._logs[-1], 3))}"
        elif not (self._output / "validation" / "summary.json").exists():
            training.failure = "there is no summary.json"
        training.seconds = time.monotonic() - began
        return training

    def _start(self, options: Sequence[str], deadline: float, ended: Callable[[], bool]) -> int | None:
        """Run nnU-Net's command; its exit status, or None if it did not end in time."""
        log = self._workspace.folder / "logs" / f"{self._configuration}-{len(self._logs)}.log"
        self._logs.append(log)
        argv = self._workspace.train_command(
            orders.TRAINER, *options, configuration=self._configuration, fold=self._fold
        )
        own = {
            "PYTHONPATH": str(Path(safeloader.__file__).parents[1]),
            "PYTHONUNBUFFERED": "1",
            "nnUNet_n_proc_DA": str(_WORKERS),
            "SAFELOADER_AUDIT": "1",
            orders.SEED_VARIABLE: str(self._seed),
            orders.THREADS_VARIABLE: "1",
            orders.RUN_VARIABLE: self._mark,
        }
        if not options:  # one that continues knows it
            own["SAFELOADER_SEED"] = str(self._seed)
        if self._faults:
            own[orders.STEP_VARIABLE] = str(_STEP_S)
        for fault in self._faults:
            argv = fault.command(argv)
            own |= fault.environment()
        with CommandProcess(argv, self._workspace.environment(own), log) as process:
            while (code := process.wait(_LOOK_EVERY_S)) is None:
                if time.monotonic() > deadline or ended():
                    return None
                trainer = _trainer_of(process.pid)
                if trainer is not None:
                    self._strike(trainer)
        return code

    def _strike(self, trainer: int) -> None:
        scene = self._scene(trainer)
        for fault in self._faults:
            try:
                fault.strike(scene)
            except (ProcessLookupError, FileNotFoundError, psutil.NoSuchProcess):
                return  # it has just ended

    def _scene(self, trainer: int) -> Scene:
        incidents: list[dict[str, Any]] = []
        for file in sorted(self._output.glob("safeloader_incidents*.jsonl")):
            # The last line may still be being written.
            incidents += [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
        console = "".join(log.read_text(encoding="utf-8", errors="replace") for log in self._logs if log.exists())
        return Scene(trainer, read_steps(self._output), incidents, console)

    def _terminations(self) -> int:
        return sum(fault.times for fault in self._faults if isinstance(fault, Terminated))

    def _left_behind(self) -> list[str]:
        """Processes that were started for this training and do not end by themselves."""
        try:
            wait_until(lambda: not self._processes(), timeout_s=_GONE_S)
        except TimeoutError:
            left = self._processes()
            for process in left:
                process.kill()
            return [f"process {process.pid} ({process.name()})" for process in left]
        return []

    def _processes(self) -> list[psutil.Process]:
        found = psutil.process_iter(["environ"])
        return [process for process in found if (process.info["environ"] or {}).get(orders.RUN_VARIABLE) == self._mark]


def _trainer_of(pid: int) -> int | None:
    """The process of nnU-Net's command: this one, or the one below it that a fault has wrapped; None if it is gone."""
    try:
        started = psutil.Process(pid)
        for process in (started, *started.children()):
            if any(Path(word).name == "nnUNetv2_train" for word in process.cmdline()[:2]):
                return int(process.pid)
    except psutil.NoSuchProcess:
        pass
    return None


def _names_something_left(line: str) -> bool:
    return line.startswith(LEFT_IN_SHM) and line != LEFT_IN_SHM.rstrip() and bool(line[len(LEFT_IN_SHM) :].strip())


def _in_shm() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}
