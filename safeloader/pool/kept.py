"""In the worker: files of nnU-Net's cases that stay open from one batch to the next.

nnU-Net opens a case's images anew for each sample: on 2D data that is a quarter of a worker's time (54 samples a batch;
269 ms of CPU a batch against 203), and on network storage several round trips a file. What is kept is the open file,
not its data, so the result is the same; one that was replaced or changed in between is opened again. A case's
properties are unpickled each time, as nnU-Net does: a loader may change them, and a copy would cost as much.
"""

from __future__ import annotations

import os
import resource
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from batchgenerators.utilities.file_and_folder_operations import load_pickle

MOST_FILES: Final = 256
"""Open at once: 128 cases, of up to 0.2 MiB a file."""
_PART_OF_LIMIT: Final = 4
"""At most this part (a quarter) of the files that the process may open: the rest is the user's."""
_OURS: Final = ("nnunetv2.training.dataloading.nnunet_dataset", "nnUNetDatasetBlosc2.load_case")
"""The only method that is known to do nothing but open files. A subclass's own may do anything."""

_Stamp = tuple[int, int, int, int]


@dataclass(frozen=True)
class _Opened:
    stamps: Sequence[_Stamp]
    arrays: tuple[Any, ...]  # data, segmentation, that of the previous stage or None


def keeping_files_open(dataset: Any) -> Callable[..., Any]:
    """The dataset's `load_case`: one that keeps files open if it is nnU-Net's for blosc2, else its own."""
    load_case: Callable[..., Any] = dataset.load_case
    if (load_case.__module__, getattr(load_case, "__qualname__", None)) != _OURS:
        return load_case
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST_FILES if soft == resource.RLIM_INFINITY else min(MOST_FILES, soft // _PART_OF_LIMIT)
    return KeptCases(load_case, dataset.source_folder, dataset.folder_with_segs_from_previous_stage, most_files=most)


class KeptCases:
    """Called in place of `load_case(identifier)`.

    Args:
        load_case: nnU-Net's.
        folder: where the cases lie.
        previous_folder: where the previous stage's segmentations lie, in a cascade.
        most_files: how many may be open; those that were not asked for the longest are closed.
    """

    def __init__(
        self, load_case: Callable[..., Any], folder: str, previous_folder: str | None, *, most_files: int
    ) -> None:
        self._load_case = load_case
        self._folder = folder
        self._previous_folder = previous_folder
        self._most_cases = most_files // (2 if previous_folder is None else 3)
        self._kept: OrderedDict[str, _Opened] = OrderedDict()

    def __call__(self, identifier: str) -> tuple[Any, Any, Any, Any]:
        """Data, segmentation, that of the previous stage or None, and properties.

        Raises:
            Exception: whatever nnU-Net's raises for a file that is missing or damaged.
        """
        try:
            stamps = [_stamp(file) for file in self._files(identifier)]
        except OSError:  # of a file that can't be had now, the error is to be nnU-Net's own
            self._kept.pop(identifier, None)
            return self._load_case(identifier)  # type: ignore[no-any-return]
        kept = self._kept.pop(identifier, None)
        if kept is not None and kept.stamps == stamps:
            properties = load_pickle(os.path.join(self._folder, f"{identifier}.pkl"))
        else:
            *arrays, properties = self._load_case(identifier)
            kept = _Opened(stamps, tuple(arrays))
        self._kept[identifier] = kept
        while len(self._kept) > self._most_cases:
            self._kept.popitem(last=False)
        data, segmentation, previous = kept.arrays
        return data, segmentation, previous, properties

    def _files(self, identifier: str) -> list[str]:
        files = [os.path.join(self._folder, f"{identifier}{ending}") for ending in (".b2nd", "_seg.b2nd")]
        if self._previous_folder is not None:
            files.append(os.path.join(self._previous_folder, f"{identifier}.b2nd"))
        return files


def _stamp(file: str) -> _Stamp:
    """Taken before a file is opened: if it is replaced just then, it is opened once more, not kept for ever."""
    found = os.stat(file)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
