"""Which cases of a validation are exported, so that one that is run again makes only what is missing.

    fold_0/safeloader_validation.json   (a DDP rank above 0: safeloader_validation_rank1.json)
        weights   a checksum of the network and of how it is used
        exports   for each output: its files with size and time, whether with probabilities, and what it was made of

An entry is written once its files are complete and at their place. It counts only if the weights are the same, the
files are as they were written, and the case's preprocessed data is as it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from safeloader.report.atomic import write_atomically
from safeloader.ring.digest import checksum

LEDGER_FILE: Final = "safeloader_validation.json"
_VERSION: Final = 1
_INPUT_ENDINGS: Final = (".b2nd", ".npz", ".pkl")
"""Not `.npy`: older nnU-Nets unpack these from the `.npz`, and remove them again."""
_WRAPPERS: Final = ("module.", "_orig_mod.")
"""What DDP and torch.compile put before the names of weights."""


def weights_identity(weights: Mapping[str, Any], usage: Any) -> str:
    """A checksum of a network's `state_dict()` and of how it is used for prediction (anything that JSON takes)."""
    tensors = {}
    for name, value in weights.items():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        tensors[name] = value.detach().cpu() if isinstance(value, torch.Tensor) else repr(value)
    return checksum({"weights": tensors, "usage": json.dumps(usage, sort_keys=True, default=str)})


def inputs_of(case: str, folders: Iterable[str | None]) -> list[list[Any]]:
    """Names and sizes of what a case's prediction is made of: its files in the preprocessed folders.

    Not their times: on a cluster each job may have a copy of its own.
    """
    paths = [Path(folder) / f"{case}{ending}" for folder in folders if folder for ending in _INPUT_ENDINGS]
    return [[path.name, path.stat().st_size] for path in paths if path.exists()]


class Ledger:
    """The ledgers of all ranks, and this rank's to write.

    Args:
        folder: the output folder of a fold.
        base: the folder that all outputs lie below; they are known by their path from there.
        weights: see `weights_identity`; entries of others are forgotten.
        rank: of this process in DDP, else 0.
    """

    def __init__(self, folder: Path, base: Path, weights: str, rank: int = 0) -> None:
        own = LEDGER_FILE if rank == 0 else LEDGER_FILE.replace(".json", f"_rank{rank}.json")
        self.path = folder / own
        self._base = base
        self._weights = weights
        self._own = self._read(self.path)
        others = sorted(folder.glob(LEDGER_FILE.replace(".json", "_rank*.json")))
        self._all: dict[str, Any] = {}
        for path in [*others, folder / LEDGER_FILE]:
            self._all |= self._read(path)

    def done(self, target: Path, *, probabilities: bool | None, inputs: list[list[Any]]) -> bool:
        """Whether that output is there, as it was written, of these weights and of this data.

        `probabilities` is None for an output that never has any.
        """
        entry = self._all.get(self._name(target))
        if not isinstance(entry, dict) or not isinstance(entry.get("files"), list) or not entry["files"]:
            return False
        if entry.get("probabilities") != probabilities or entry.get("inputs") != inputs:
            return False
        return all(self._unchanged(target.parent, file) for file in entry["files"])

    def note(self, target: Path, files: Iterable[Path], *, probabilities: bool | None, inputs: list[list[Any]]) -> None:
        """These files are complete.

        Raises:
            OSError: it can't be written.
        """
        seen = [_seen(file) for file in files]
        self._own[self._name(target)] = {"files": seen, "probabilities": probabilities, "inputs": inputs}
        state = {"version": _VERSION, "weights": self._weights, "exports": self._own}
        write_atomically(self.path, json.dumps(state, indent=1) + "\n")

    def _name(self, target: Path) -> str:
        # Up to 2.5, nnU-Net names the next stage's file with its ending.
        return target.relative_to(self._base).as_posix().removesuffix(".npz")

    def _read(self, path: Path) -> dict[str, Any]:
        """The entries of a ledger; none if it is not there, damaged, or of other weights: then all is made again."""
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        if not isinstance(found, dict) or not isinstance(found.get("exports"), dict):
            return {}
        same = found.get("version") == _VERSION and found.get("weights") == self._weights
        return dict(found["exports"]) if same else {}

    @staticmethod
    def _unchanged(folder: Path, file: Any) -> bool:
        try:
            return bool(_seen(folder / file[0]) == file)
        except (OSError, LookupError, TypeError):
            return False


def _seen(path: Path) -> list[Any]:
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]
