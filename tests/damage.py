"""Damaged cases: real nnU-Net cases, tiny ones, and what storage does to them.

    make_case ───► the files of one case ──► truncate, flip_bytes, punch_zeros   the content is damaged, in place
    tiny_loader ─► a real loader             rewrite, replace                    another writer, while it is read
                   over such cases           remove, replace_by_…, forbidden     the file system does not answer

Damage to the content stays. The others give a callable (or are a context manager) that puts all right again, as
storage does that comes back. What they lead to in nnU-Net is in `safeloader/faults/storage.py`.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
from nnunetv2.training.dataloading.data_loader import nnUNetDataLoader
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetBaseDataset, nnUNetDatasetBlosc2, nnUNetDatasetNumpy

Kind = Literal["b2nd", "npz", "npy"]
"""How a preprocessed case is stored; `npy` is `npz` that was unpacked, as nnU-Net does before it trains."""
Restore = Callable[[], None]

_LABELS = (1, 2)
_CHUNK = 16
"""Edge of a blosc2 chunk: a case has several, and each is compressed on its own."""
_CAPABILITY_VERSION = 0x20080522
_DAC_OVERRIDE_AND_READ_SEARCH = 0b110


@dataclass(frozen=True)
class Case:
    """One case: what was written, and where.

    Attributes:
        data: `(c, z, y, x)` float32. seg: `(1, z, y, x)` int8, labels 0 to 2.
        image, labels: the files that are read for them; the same one for `npz`.
        properties: the `.pkl`.
    """

    identifier: str
    data: np.ndarray[Any, np.dtype[np.float32]]
    seg: np.ndarray[Any, np.dtype[np.int8]]
    image: Path
    labels: Path
    properties: Path


# ---- real cases, and a real loader over them ----


def make_case(
    folder: Path,
    identifier: str,
    shape: tuple[int, int, int, int] = (1, 32, 32, 32),
    *,
    kind: Kind = "b2nd",
    seed: int = 0,
) -> Case:
    """Write one case of random numbers into a preprocessed folder, as nnU-Net does; all cases there are of one kind.

    A case of that name is overwritten.

    Args:
        shape: `(c, z, y, x)`; the default makes 8 chunks of about 15 KB in the `.b2nd`.
    """
    rng = np.random.default_rng(seed)
    data = rng.normal(size=shape).astype(np.float32)
    seg = rng.integers(0, 1 + max(_LABELS), (1, *shape[1:])).astype(np.int8)
    properties = {"class_locations": {label: np.argwhere(seg == label)[:500] for label in _LABELS}}
    folder.mkdir(parents=True, exist_ok=True)
    stem = folder / identifier
    for old in _files_of(folder, identifier):  # blosc2 does not overwrite
        old.unlink()
    if kind == "b2nd":
        chunks = (1, *(min(_CHUNK, edge) for edge in shape[1:]))
        blocks = (1, *(min(_CHUNK // 2, edge) for edge in shape[1:]))
        nnUNetDatasetBlosc2.save_case(data, seg, properties, str(stem), chunks=chunks, blocks=blocks)
    else:
        nnUNetDatasetNumpy.save_case(data, seg, properties, str(stem))
    if kind == "npy":
        np.save(f"{stem}.npy", data)
        np.save(f"{stem}_seg.npy", seg)
    labels = f"{stem}.npz" if kind == "npz" else f"{stem}_seg.{kind}"
    return Case(identifier, data, seg, Path(f"{stem}.{kind}"), Path(labels), Path(f"{stem}.pkl"))


def _files_of(folder: Path, identifier: str) -> list[Path]:
    return [*folder.glob(f"{identifier}.*"), *folder.glob(f"{identifier}_seg.*")]


def open_dataset(folder: Path, kind: Kind = "b2nd") -> nnUNetBaseDataset:
    """nnU-Net's own dataset over all cases in the folder."""
    return (nnUNetDatasetBlosc2 if kind == "b2nd" else nnUNetDatasetNumpy)(str(folder))


def tiny_loader(
    folder: Path,
    *,
    cases: int = 4,
    kind: Kind = "b2nd",
    batch_size: int = 2,
    patch_size: tuple[int, int, int] = (16, 16, 16),
    transforms: Callable[..., dict[str, Any]] | None = None,
) -> nnUNetDataLoader:
    """A real nnU-Net loader over `case_000`, `case_001`, …; those that are not there are made. A batch takes 4 ms.

    A batch is `data` `(b, 1, z, y, x)` float32, `target` `(b, 1, z, y, x)` int16 and `keys`. Every second sample is
    centred on a foreground voxel, so the properties are used as well.

    Args:
        transforms: called as `transforms(image=…, segmentation=…)`, like those of batchgeneratorsv2.
    """
    for number in range(cases):
        if not _files_of(folder, f"case_{number:03d}"):
            make_case(folder, f"case_{number:03d}", kind=kind, seed=number)
    label_manager = SimpleNamespace(all_labels=list(_LABELS), has_ignore_label=False)
    return nnUNetDataLoader(
        open_dataset(folder, kind),
        batch_size,
        patch_size,
        patch_size,
        label_manager,
        oversample_foreground_percent=0.5,
        transforms=transforms,
    )


# ---- damage to the content, in place: whoever has the file open or mapped sees it ----


def truncate(path: Path, keep_nbytes: int) -> None:
    """Cut off all but the first bytes; a negative number says how many are cut off."""
    os.truncate(path, keep_nbytes if keep_nbytes >= 0 else path.stat().st_size + keep_nbytes)


def flip_bytes(path: Path, at: int, count: int) -> None:
    """Invert bytes, as bad RAM or a bad cable does; a negative `at` counts from the end."""
    _patch(path, at, lambda found: bytes(byte ^ 0xFF for byte in found), count)


def punch_zeros(path: Path, at: int, count: int) -> None:
    """Zeros where data was, as a crashed file system leaves that had the length, but not the blocks, on disk."""
    _patch(path, at, lambda found: bytes(len(found)), count)


def _patch(path: Path, at: int, change: Callable[[bytes], bytes], count: int) -> None:
    with path.open("r+b") as file:
        file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
        start = file.tell()
        found = file.read(count)
        file.seek(start)
        file.write(change(found))


# ---- another writer ----


def rewrite(path: Path, content: bytes) -> None:
    """Write the file anew under its old inode, as `open(path, "wb")` does: readers see it shrink, then change."""
    with path.open("wb") as file:
        file.write(content)


def replace(path: Path, content: bytes) -> None:
    """Put another file in its place in one step, as careful writers do: who has the old one open keeps it."""
    fresh = path.parent.with_name(f"{path.parent.name}.{path.name}.fresh")  # not among the cases
    fresh.write_bytes(content)
    fresh.replace(path)


# ---- the file system does not answer as it should ----


def remove(path: Path) -> Restore:
    """The file, or the whole folder, is gone, as when a mount is lost. Returns what brings it back."""
    aside = (
        path.with_name(f"{path.name}.aside")
        if path.is_dir()
        else path.parent.with_name(f"{path.parent.name}.{path.name}.aside")
    )
    path.rename(aside)

    def restore() -> None:
        if path.is_dir():
            path.rmdir()
        aside.replace(path)

    return restore


def replace_by_eio(path: Path) -> Restore:
    """A file that can be opened, and of which every `read` fails with a real EIO."""
    restore = remove(path)
    path.symlink_to("/proc/self/mem")  # address 0 is never mapped
    return restore


def replace_by_fifo(path: Path) -> Restore:
    """A file that never answers: who opens it hangs, as on stalled storage, but can be killed."""
    restore = remove(path)
    os.mkfifo(path)
    return restore


def replace_by_folder(path: Path) -> Restore:
    """A folder of that name."""
    restore = remove(path)
    path.mkdir()
    return restore


def replace_by_loop(path: Path) -> Restore:
    """A symbolic link to itself, as a wrong automount map makes."""
    restore = remove(path)
    path.symlink_to(path.name)
    return restore


@contextmanager
def forbidden(path: Path) -> Iterator[None]:
    """A file or folder that this thread may not read, root or not. (Another user would not get to it at all.)"""
    mode = path.stat().st_mode
    path.chmod(0)
    try:
        with _modes_count():
            yield
    finally:
        path.chmod(mode)


@contextmanager
def _modes_count() -> Iterator[None]:
    """Without root's capabilities to read everything; see capabilities(7) and capset(2)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, sets) == 0
    effective = sets[0]
    sets[0] = effective & ~_DAC_OVERRIDE_AND_READ_SEARCH
    assert libc.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = effective
        assert libc.capset(header, sets) == 0
