"""The files that a call writes: into a folder of its own first, then each in one step to its place.

    validation/.safeloader-4123/7/brain_004.nii.gz ── the trainer, when it is done ──► validation/brain_004.nii.gz

So a process that dies half-way leaves no half file at a place where nnU-Net looks for whole ones, and what two
processes write never mixes. The folder is a hidden one beside the files, since only within a file system a file can be
moved in one step; nnU-Net lists files there, and no folders.
"""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil

_PREFIX: Final = ".safeloader-"


@dataclass(frozen=True)
class Output:
    """Where a call's files go.

    Attributes:
        target: the path that nnU-Net gave, in most cases without the files' ending.
        folder: where they are written first.
    """

    target: Path
    folder: Path

    @classmethod
    def of(cls, target: Path, number: int) -> Output:
        """For the job of that number."""
        return cls(target, target.parent / f"{_PREFIX}{os.getpid()}" / str(number))

    @property
    def path(self) -> str:
        """What the call is told in place of the target."""
        return str(self.folder / self.target.name)

    def begin(self) -> None:
        """Make the folder, empty.

        Raises:
            OSError: that can't be done.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)

    def commit(self) -> list[Path]:
        """Move the files to their place.

        Returns:
            Where they are now.

        Raises:
            OSError: a file can't be moved.
        """
        files = []
        for file in sorted(self.folder.iterdir()):
            place = self.target.parent / file.name
            os.replace(file, place)
            files.append(place)
        self.discard()
        return files

    def discard(self) -> None:
        """Remove the folder, with what may be in it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # other jobs have theirs in it
            self.folder.parent.rmdir()


def remove_abandoned(folder: Path) -> None:
    """Remove what trainers have left beside the files there that are gone."""
    with suppress(OSError):
        for left in folder.glob(f"{_PREFIX}*"):
            pid = left.name.removeprefix(_PREFIX)
            if pid.isdecimal() and int(pid) != os.getpid() and not psutil.pid_exists(int(pid)):
                shutil.rmtree(left, ignore_errors=True)
