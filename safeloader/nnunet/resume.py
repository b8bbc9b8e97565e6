"""Where the streams stood when nnU-Net wrote a checkpoint, so that `--c` goes on with the batch after it.

    checkpoint_latest.pth ◄── belongs to ── safeloader_state.json: {"checkpoint_latest.pth": {epoch, identity, loaders}}

One small file beside the checkpoints, replaced in one step each time nnU-Net has written one. An entry knows its
checkpoint by its epoch and by its content, so one of another run, or of a run that went on without SafeLoader, is not
taken for it. Quarantined cases are not in it: the file of incidents remembers those.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from safeloader.report.atomic import write_atomically

STATE_FILE: Final = "safeloader_state.json"
_VERSION: Final = 1
_TAIL_NBYTES: Final = 1 << 20
"""A checkpoint is a zip file: its end lists the checksums of all that is in it."""


class NoStateError(Exception):
    """The streams can't go on where the checkpoint left them; the message ends the sentence "… because"."""


@dataclass(frozen=True)
class StreamStates:
    """Where all loaders of a training stand.

    Attributes:
        seed: the root seed of all.
        next_tickets: of each loader by name, the first one that was not delivered.
    """

    seed: int
    next_tickets: Mapping[str, int]

    def state_of(self, name: str, stream: int, *, given_back: int = 0) -> dict[str, Any] | None:
        """What `SafeAugmenter.load_state_dict` takes; None if there was no such loader.

        `given_back` tickets are delivered once more.
        """
        if name not in self.next_tickets:
            return None
        ticket = max(0, self.next_tickets[name] - given_back)
        return {"version": 1, "seed": self.seed, "stream": stream, "next_ticket": ticket, "quarantined": []}


def remember(checkpoint: Path, epoch: int, states: StreamStates) -> None:
    """Note that the streams stand there in this checkpoint, which has just been written.

    Args:
        checkpoint: its file.
        epoch: the one that it goes on with.
        states: of all loaders.

    Raises:
        OSError: a file can't be read or written.
    """
    path = checkpoint.with_name(STATE_FILE)
    try:
        entries = _read(path)
    except NoStateError:
        entries = {}
    entries[checkpoint.name] = {
        "epoch": epoch,
        "identity": _identity(checkpoint),
        "seed": states.seed,
        "next_tickets": dict(states.next_tickets),
    }
    kept = {name: entry for name, entry in entries.items() if checkpoint.with_name(name).exists()}
    write_atomically(path, json.dumps({"version": _VERSION, "checkpoints": kept}, indent=2) + "\n")


def recall(checkpoint: Path, epoch: int) -> StreamStates:
    """Where the streams stood in this checkpoint.

    Raises:
        NoStateError: that is not known.
    """
    path = checkpoint.with_name(STATE_FILE)
    entry = _read(path).get(checkpoint.name)
    if entry is None:
        raise NoStateError(f"{path} has nothing about {checkpoint.name}")
    try:
        if entry["epoch"] != epoch:
            raise NoStateError(f"{path} is about {checkpoint.name} of epoch {entry['epoch']}, and this is {epoch}")
        if entry["identity"] != _identity(checkpoint):
            raise NoStateError(f"{path} is about another {checkpoint.name} than the one that is there")
        tickets = {str(name): int(ticket) for name, ticket in entry["next_tickets"].items()}
        return StreamStates(int(entry["seed"]), tickets)
    except OSError as error:
        raise NoStateError(f"{checkpoint} can't be read: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise NoStateError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise NoStateError(f"there is no {path}") from error
    except (OSError, ValueError) as error:
        raise NoStateError(f"{path} can't be read: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("checkpoints"), dict):
        raise NoStateError(f"{path} is damaged")
    if found.get("version") != _VERSION:
        raise NoStateError(f"{path} is of another version of SafeLoader")
    entries: dict[str, Any] = found["checkpoints"]
    return entries


def _identity(checkpoint: Path) -> str:
    """A checksum that tells one checkpoint from another, without reading all of it."""
    with checkpoint.open("rb") as file:
        nbytes = os.fstat(file.fileno()).st_size
        file.seek(max(0, nbytes - _TAIL_NBYTES))
        return hashlib.blake2b(file.read() + str(nbytes).encode(), digest_size=16).hexdigest()
