"""What is thrown at a training: a table of small classes, each of which knows how to strike and how to prove it.

    environment, command   before nnU-Net starts      strike   again and again while it runs
    proven                 afterwards, from what SafeLoader has said and written

A fault that was not proven did not strike, and then the training has shown nothing about it.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safeloader.cli.demo.killing import Kill, Killer
from safeloader.nnunet.short import Step
from safeloader.testing import Orders
from tests.gauntlet import orders

SHM_MIB: Final = 64
"""Docker's `/dev/shm`."""
HANG_S: Final = 2.0
"""So soon a worker without progress is replaced, in these trainings of seconds."""
EXPORT_S: Final = 15.0
"""So soon an export is given up; it takes less than a second."""
_CALM_STEPS: Final = 2
LEFT_IN_SHM: Final = "gauntlet: left in /dev/shm: "


@dataclass
class Scene:
    """A training that runs, as a fault sees it.

    Attributes:
        trainer_pid: Of nnU-Net's process.
        steps: The batches that it has trained and validated on, those before a restart included.
        incidents: What SafeLoader has written about its workers so far.
        console: What it has printed, those before a restart included.
    """

    trainer_pid: int
    steps: Sequence[Step]
    incidents: Sequence[Mapping[str, Any]]
    console: str


class Fault(ABC):
    """One class of fault, for one training."""

    name: str
    before: list[Fault]
    """Faults that strike workers while it trains: this one waits until each of them is proven."""

    def __init__(self, folder: Path) -> None:
        """Keep files of its own in `folder`."""
        self.folder = folder
        self.before: list[Fault] = []

    @classmethod
    def impossible(cls) -> str | None:
        """Why it can't be thrown here; None if it can."""
        return None

    def environment(self) -> dict[str, str]:
        """Environment variables of nnU-Net's command."""
        return {}

    def command(self, argv: Sequence[str]) -> list[str]:
        """The command with which it is run."""
        return list(argv)

    def strike(self, scene: Scene) -> None:  # noqa: B027 - most faults that lie in the environment do no more
        """Called again and again while nnU-Net runs: strike, if it is time."""

    def _its_turn(self, scene: Scene) -> bool:
        return all(fault.proven(scene) for fault in self.before)

    @property
    @abstractmethod
    def times(self) -> int:
        """How often it struck, as far as this process knows."""

    @abstractmethod
    def proven(self, scene: Scene) -> bool:
        """Whether what SafeLoader says shows that it did."""


class WorkersSignalled(Fault):
    """Sends signals to workers that load and augment."""

    signals: tuple[signal.Signals, ...]
    kind: str
    every_s: float = 0.3

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.kills: list[Kill] = []

    def strike(self, scene: Scene) -> None:
        if len(self.kills) < len(self.signals) and len(scene.steps) >= _CALM_STEPS and self._its_turn(scene):
            limit = len(self.signals)
            Killer(scene.trainer_pid, self.signals, self.every_s, limit, self.kills).tick(scene.steps[-1].workers)

    @property
    def times(self) -> int:
        return len(self.kills)

    def proven(self, scene: Scene) -> bool:
        """Each is an incident of its pid."""
        said = {incident.get("pid") for incident in scene.incidents if incident.get("kind") == self.kind}
        return len(self.kills) == len(self.signals) and said >= {kill.pid for kill in self.kills}


class WorkersHung(WorkersSignalled):
    name = "worker-hung"
    signals = (signal.SIGSTOP,)
    kind = "worker-hang"

    def environment(self) -> dict[str, str]:
        return {"SAFELOADER_HANG_TIMEOUT_S": str(HANG_S), "SAFELOADER_HANG_TIMEOUT_FIRST_S": "30"}


class WorkersKilled(WorkersSignalled):
    name = "worker-killed"
    signals = (signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS)
    kind = "worker-death"

    def environment(self) -> dict[str, str]:
        # Two kills may meet the same case by chance; that is nobody's fault, and must not change the stream.
        return {"SAFELOADER_ON_BAD_CASE": "retry"}


class SmallShm(Fault):
    """`/dev/shm` of 64 MiB, as Docker makes it: in a mount namespace of its own."""

    name = "small-shm"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.seen = 0

    @classmethod
    def impossible(cls) -> str | None:
        unshare = shutil.which("unshare")
        if unshare is None or subprocess.run([unshare, "-m", "true"], check=False, capture_output=True).returncode:
            return "this user may not make a mount namespace"
        return super().impossible()

    def command(self, argv: Sequence[str]) -> list[str]:
        # By path, since the search path may have no tools in it. What is left is listed while the namespace lives.
        mount, ls, unshare, shell = (_tool(name) for name in ("mount", "ls", "unshare", "sh"))
        script = (
            f'{mount} -t tmpfs -o size={SHM_MIB}m tmpfs /dev/shm && "$@"; code=$?; '
            f'echo "{LEFT_IN_SHM}"$({ls} -A /dev/shm); exit $code'
        )
        return [unshare, "-m", shell, "-c", script, "sh", *argv]

    def strike(self, scene: Scene) -> None:
        if not self.seen:
            mounts = Path(f"/proc/{scene.trainer_pid}/mountinfo").read_text(encoding="utf-8").splitlines()
            self.seen = sum(" /dev/shm " in line and f"size={SHM_MIB * 1024}k" in line for line in mounts)

    @property
    def times(self) -> int:
        return self.seen

    def proven(self, scene: Scene) -> bool:
        """It had that mount, and trained."""
        return bool(self.seen and scene.steps)


class NoCompiler(Fault):
    """torch.compile is asked for, and there is no compiler: PATH leads nowhere, and nothing is cached."""

    name = "no-compiler"

    def environment(self) -> dict[str, str]:
        nowhere = self.folder / "no-tools"
        nowhere.mkdir(parents=True, exist_ok=True)
        return {
            orders.COMPILE_VARIABLE: "1",
            "nnUNet_compile": "true",
            "PATH": str(nowhere),
            "CXX": "g++",  # torch's default, whatever this environment says
            "TORCHINDUCTOR_CACHE_DIR": str(self.folder / "inductor"),
        }

    @property
    def times(self) -> int:
        return 1

    def proven(self, scene: Scene) -> bool:
        """SafeLoader says that there is no compiler, and goes on."""
        return re.search(r"SafeLoader: torch\.compile found no C or C\+\+ compiler", scene.console) is not None


class _ExportStruck(Fault):
    """Strikes a process of the validation's export pool while it exports."""

    deed: str
    said: str

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._orders = Orders(folder / "orders", orders.DEEDS)
        self._orders.give(self.deed, orders.EXPORTING)

    def environment(self) -> dict[str, str]:
        return {orders.ORDERS_VARIABLE: str(self._orders.folder)}

    @property
    def times(self) -> int:
        """Whoever obeys an order takes it away first."""
        return int(not any(self._orders.folder.glob(f"*:{self.deed}:*")))

    def proven(self, scene: Scene) -> bool:
        """The order was obeyed, and the process's end is an incident."""
        ends = [str(one.get("message")) for one in scene.incidents if one.get("kind") == "export-death"]
        return bool(self.times) and any(self.said in message for message in ends)


class ExportKilled(_ExportStruck):
    name = "export-killed"
    deed = "kill"
    said = "was killed by SIGKILL"


class ExportHung(_ExportStruck):
    name = "export-hung"
    deed = "stop"
    said = "had not finished after"

    def environment(self) -> dict[str, str]:
        return {**super().environment(), "SAFELOADER_EXPORT_TIMEOUT_S": str(EXPORT_S)}


class Terminated(Fault):
    """SIGTERM in the middle of an epoch, as a scheduler sends it; whoever runs the training goes on with `--c`."""

    name = "sigterm"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._sent = 0

    def strike(self, scene: Scene) -> None:
        if self._sent or not scene.steps:
            return
        now = scene.steps[-1]
        in_an_epoch = now.epoch >= 1 and now.phase == "train" and scene.steps[-2].epoch == now.epoch
        if in_an_epoch and self._its_turn(scene):
            os.kill(scene.trainer_pid, signal.SIGTERM)
            self._sent = 1

    @property
    def times(self) -> int:
        return self._sent

    def proven(self, scene: Scene) -> bool:
        """The continued training goes on where the checkpoint left the streams."""
        return bool(self._sent) and "the batches go on where the checkpoint left them" in scene.console


FAULTS: Final[tuple[type[Fault], ...]] = (
    SmallShm, NoCompiler, WorkersHung, WorkersKilled, Terminated, ExportKilled, ExportHung,
)  # fmt: skip


def _tool(name: str) -> str:
    found = shutil.which(name)
    assert found is not None, f"{name} is not on the search path"
    return found
