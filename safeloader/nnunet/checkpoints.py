"""Checkpoint files: replaced in one step, kept in memory, looked at before they are loaded.

nnU-Net calls `torch.save(checkpoint, filename)`, which writes into the old file: a process that dies meanwhile leaves
half of one, and `--c` can't load it. While a trainer's `save_checkpoint` runs, `torch` in the modules of its methods
stands for torch with another `save`. So no code of nnU-Net's is copied, what a subclass adds to a checkpoint is in
it, and further files that a subclass saves are treated alike.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Final

import torch

from safeloader.errors import CheckpointError
from safeloader.nnunet.loaders import namespaces, replaced
from safeloader.nnunet.resume import StreamStates

FINAL: Final = "checkpoint_final.pth"
LATEST: Final = "checkpoint_latest.pth"
BEST: Final = "checkpoint_best.pth"
IN_ORDER: Final = (FINAL, LATEST, BEST)
"""What `--c` looks for: it takes the first that is there."""

EARLIER_FINAL: Final = "checkpoint_final_earlier.pth"

_ZIP: Final = b"PK\x03\x04"
_PICKLE: Final = b"\x80"


@dataclass
class Snapshot:
    """What `save_checkpoint` would have written at the end of an epoch, in this process's memory.

    Attributes:
        epoch: The one that had just ended, from 0.
        main: The checkpoint's own file.
        files: The content of all files that would have been written, by path.
        states: Where the streams stood; None if there are none.
    """

    epoch: int
    main: Path
    files: dict[Path, io.BytesIO] = field(default_factory=dict, repr=False)
    states: StreamStates | None = None

    def save(self, content: object, file: Any, *args: Any, **kwargs: Any) -> None:
        """Stands for `torch.save`: keeps the bytes that would be in the file."""
        if not isinstance(file, str | os.PathLike):
            torch.save(content, file, *args, **kwargs)
            return
        kept = io.BytesIO()
        _save(content, kept, *args, **kwargs)
        self.files[Path(file)] = kept

    def write(self) -> None:
        """Write the files, the checkpoint's own last.

        Raises:
            OSError: One can't be written; what was there before still is.
        """
        for path in sorted(self.files, key=lambda path: path == self.main):
            with replacing(path) as file:
                file.write(self.files[path].getbuffer())


@contextmanager
def saving_with(trainer_class: type, save: Callable[..., None]) -> Iterator[None]:
    """Inside the `with` block, the methods `save_checkpoint` along the classes find `save` for `torch.save`."""
    with ExitStack() as stack:
        for namespace in namespaces(trainer_class, "save_checkpoint"):
            stack.enter_context(replaced(namespace, {"torch": _TorchThatSaves(save)}))
        yield


class _TorchThatSaves:
    """The module torch, but for one function."""

    def __init__(self, save: Callable[..., None]) -> None:
        self.save = save

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def save_atomically(content: object, file: Any, *args: Any, **kwargs: Any) -> None:
    """Stands for `torch.save`: a reader finds the old file or the new one, never half of one.

    Raises:
        OSError: The file can't be written, for example because the disk is full; the old one is still there.
    """
    if not isinstance(file, str | os.PathLike):
        torch.save(content, file, *args, **kwargs)
        return
    with replacing(Path(file)) as new:
        _save(content, new, *args, **kwargs)


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block is through, once it is on the disk.

    It lies in the same folder under a fixed name, so a process that is killed leaves one such file, not one each time.
    A link stays a link. Unlike `report.atomic` it syncs: a checkpoint should outlive the machine's end.
    """
    path = Path(os.path.realpath(path))
    temporary = path.with_name(f".{path.name}.new")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def _save(content: object, file: BinaryIO, *args: Any, **kwargs: Any) -> None:
    try:
        torch.save(content, file, *args, **kwargs)
    except RuntimeError as error:
        # torch's zip writer wants to end its file after a write that failed, and reports only that it could not.
        cause = error.__context__
        if isinstance(cause, OSError | MemoryError):
            raise cause from None
        raise


def _sync_folder(folder: Path) -> None:
    """The new name outlives the machine's end, too; not every file system can do that for a folder."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's file; None if nothing is. Reads all of it, as loading it does.

    Raises:
        OSError: It can't be read: this says nothing about what is in it.
    """
    with path.open("rb") as file:
        begin = file.read(len(_ZIP))
        if begin.startswith(_PICKLE):  # torch's format before 1.6 has no checksums
            return None
        if begin != _ZIP:
            return "it is empty" if not begin else "it does not begin as a checkpoint does"
        try:
            with zipfile.ZipFile(file) as archive:
                broken = archive.testzip()
        except zipfile.BadZipFile:
            return "its end is missing"
        except EOFError:
            return "a part of it is missing"
    return None if broken is None else f"the checksum of {broken} in it is wrong"


def undamaged(path: Path, say: Callable[[str], None]) -> Path:
    """This checkpoint, or what `--c` may go on from instead: the best one for the latest, which `say` is told.

    Nothing takes the place of a damaged final one: who asks for that may want to validate with it.

    Raises:
        CheckpointError: It is damaged, and nothing may take its place.
        OSError: It can't be read.
    """
    wrong = damage(path)
    if wrong is None:
        return path
    best = path.with_name(BEST)
    if path.name == LATEST and best.exists() and damage(best) is None:
        say(
            f"SafeLoader: {path} is damaged ({wrong}): training goes on from the last undamaged checkpoint, "
            f"{BEST}. The epochs after it are trained again."
        )
        return best
    raise CheckpointError(f"{path} is damaged ({wrong}): {_remedy(path)}", path)


def _remedy(path: Path) -> str:
    others = [name for name in IN_ORDER if name != path.name and path.with_name(name).exists()]
    if path.name == FINAL and others:
        return f"remove it, and --c goes on from {others[0]}"
    return "there is no other to go on from, so start again without --c, or put a copy of it there"
