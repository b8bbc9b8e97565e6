"""A training's history: a line of JSON for each epoch, and one for each start, in `safeloader_epochs.jsonl`.

What `safeloader report` draws. nnU-Net's own numbers (epoch time, losses, pseudo Dice) are in its log, and are not
written once more. Each epoch's numbers are also given to the loggers that nnU-Net has beside its own (Weights & Biases,
from 2.7 on), and, if `SAFELOADER_PROMETHEUS` names a file, to Prometheus.
"""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

import psutil

from safeloader.faults.cpus import available_cpus
from safeloader.faults.memory import available
from safeloader.nnunet.upstream import Trainer
from safeloader.report import prometheus
from safeloader.report.atomic import write_atomically
from safeloader.report.journal import Journal
from safeloader.report.versions import versions_of
from safeloader.runner import PoolRunner

EPOCHS_FILE: Final = "safeloader_epochs.jsonl"
_PACKAGES: Final = ("safeloader", "nnunetv2", "batchgenerators", "batchgeneratorsv2", "torch", "numpy", "blosc2")
_SCALARS: Final = ("wait_s", "restarts", "quarantined", "workers_nbytes")
_FLUSH_S: Final = 1.0
PROMETHEUS: Final = "SAFELOADER_PROMETHEUS"
"""The environment variable that names the file for node_exporter's textfile collector: `….prom`."""


def epochs_file(rank: int) -> str:
    """The file of a DDP rank."""
    return EPOCHS_FILE if rank == 0 else f"safeloader_epochs_rank{rank}.jsonl"


class KeepsHistory(Trainer):
    """Mixed in before an nnU-Net trainer: writes the history. A folder that can't be written stops no training."""

    _history: Journal | None = None

    def on_train_start(self) -> None:
        """Say what this run runs on."""
        super().on_train_start()
        path = Path(self.output_folder) / epochs_file(self.local_rank)
        self._history = Journal(path, what="an epoch", disk_free=False)
        about = _start(type(self).__name__, self.current_epoch, str(self.device))
        self._history.write({**about, "loaders": self._counts()})  # the first batches are waited for before any epoch

    def on_epoch_end(self) -> None:
        """Write what the epoch was like for the loaders."""
        epoch = self.current_epoch
        super().on_epoch_end()
        if self._history is None:
            return
        counts = self._counts()
        trainer_nbytes = psutil.Process().memory_info().rss
        record = {"kind": "epoch", "at": _now(), "epoch": epoch, "trainer_nbytes": trainer_nbytes, "loaders": counts}
        self._history.write(record)
        # nnU-Net's own logger knows nothing but its own names; the others take any.
        for other in getattr(self.logger, "loggers", []):
            for loader, of in counts.items():
                for name in _SCALARS:
                    other.log(f"safeloader/{loader}_{name}", of[name], epoch)
        self._tell_prometheus(epoch, counts)

    def _tell_prometheus(self, epoch: int, counts: dict[str, dict[str, Any]]) -> None:
        file = os.environ.get(PROMETHEUS)
        if not file:
            return
        path = Path(file)
        if self.local_rank:
            path = path.with_name(f"{path.stem}_rank{self.local_rank}{path.suffix}")
        training = "/".join(Path(self.output_folder).parts[-3:])
        try:
            ended_s = datetime.now(timezone.utc).timestamp()
            write_atomically(path, prometheus.text(training, epoch, ended_s, counts))
        except OSError as error:
            self.print_to_log_file(f"SafeLoader: {PROMETHEUS}={file} can't be written: {error.strerror}")

    def on_train_end(self) -> None:
        """Give what is still to be written a moment."""
        super().on_train_end()
        if self._history is not None:
            self._history.close(_FLUSH_S)

    def _counts(self) -> dict[str, dict[str, Any]]:
        loaders = {"train": self.dataloader_train, "val": self.dataloader_val}
        return {name: _count(loader) for name, loader in loaders.items() if isinstance(loader, PoolRunner)}


def _start(trainer: str, epoch: int, device: str) -> dict[str, Any]:
    cpus, memory = available_cpus(), available()
    return {
        "kind": "start",
        "at": _now(),
        "epoch": epoch,
        "trainer": trainer,
        "versions": {"python": platform.python_version(), **versions_of(*_PACKAGES)},
        "machine": {
            "host": platform.node(),
            "device": _device(device),
            "cpus": cpus.reason,
            "memory": "unknown" if memory is None else memory.reason,
        },
    }


def _device(name: str) -> str:
    if not name.startswith("cuda"):
        return name
    import torch

    return torch.cuda.get_device_name(name)


def _count(loader: PoolRunner) -> dict[str, Any]:
    """Since the start of this run, all in all; and the memory of its workers now."""
    report = loader.report()
    return {
        "batches": report.batches,
        "wait_s": round(report.wait_s, 3),
        "restarts": report.restarts,
        "incidents": report.incident_counts,
        "quarantined": len(report.quarantined),
        "resting": report.resting,
        "workers_nbytes": sum(worker.memory_nbytes or 0 for worker in loader.workers()),
    }


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")
