"""Puts the shim where nnU-Net looks for trainers, so that `-tr nnUNetTrainerSafeLoader…` finds ours.

nnU-Net searches its own package, and from 2.8.0 on also the folders that `nnUNet_extTrainer` names. The shim goes
into nnU-Net's `variants` folder; where that is read-only, the environment variable does the same without a copy.
Nothing here imports nnU-Net.
"""

from __future__ import annotations

import importlib.util
import os
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Final

from safeloader.errors import ConfigError
from safeloader.nnunet.versions import refuse_old

SHIM_FOLDER: Final = Path(__file__).parent / "shim"
"""For `nnUNet_extTrainer`."""

SHIM_NAME: Final = "safeloader_trainer.py"


class Outcome(Enum):
    """What `install` or `uninstall` did."""

    WRITTEN = "written"
    REPLACED = "replaced"
    UNCHANGED = "unchanged"
    REMOVED = "removed"
    ABSENT = "absent"
    READ_ONLY = "read-only"


@dataclass(frozen=True)
class Change:
    """What was done to which file; `reason` is the operating system's, where it refused."""

    outcome: Outcome
    path: Path
    reason: str = ""


def variants_folder() -> Path:
    """Where the installed nnU-Net keeps trainer variants.

    Raises:
        ConfigError: nnU-Net is not installed for this Python, is too old, or has no such folder.
    """
    spec = importlib.util.find_spec("nnunetv2")
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError("nnU-Net is not installed for this Python: pip install nnunetv2")
    refuse_old()
    folder = Path(spec.submodule_search_locations[0]) / "training" / "nnUNetTrainer" / "variants"
    if not folder.is_dir():
        raise ConfigError(f"this nnU-Net has no folder {folder}: is it nnunetv2?")
    return folder


def export_line() -> str:
    """The shell line that does without a copy, for nnU-Net from 2.8.0 on; keeps folders already named."""
    return f'export nnUNet_extTrainer="{SHIM_FOLDER}${{nnUNet_extTrainer:+:$nnUNet_extTrainer}}"'


def install(folder: Path | None = None) -> Change:
    """Write the shim into `folder` (None: nnU-Net's variants folder); again is fine."""
    path = (variants_folder() if folder is None else folder) / SHIM_NAME
    wanted = (SHIM_FOLDER / SHIM_NAME).read_bytes()
    existed = path.exists()
    if existed and path.read_bytes() == wanted:
        return Change(Outcome.UNCHANGED, path)
    temporary = path.with_name(f".{SHIM_NAME}.{os.getpid()}")
    try:
        temporary.write_bytes(wanted)
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        return Change(Outcome.READ_ONLY, path, error.strerror or str(error))
    return Change(Outcome.REPLACED if existed else Outcome.WRITTEN, path)


def uninstall(folder: Path | None = None) -> Change:
    """Remove the shim from `folder` (None: nnU-Net's variants folder); again is fine."""
    path = (variants_folder() if folder is None else folder) / SHIM_NAME
    try:
        path.unlink()
    except FileNotFoundError:
        return Change(Outcome.ABSENT, path)
    except OSError as error:
        return Change(Outcome.READ_ONLY, path, error.strerror or str(error))
    return Change(Outcome.REMOVED, path)
