"""Puts lists that batchgeneratorsv2's cascade transforms shuffle in place back in order, before each ticket.

The two transforms that nnU-Net's `3d_cascade_fullres` applies to the previous stage's prediction draw the order of its
channels by `np.random.shuffle(self.channel_idx)`: each shuffle begins with the order that the one before has left. So a
batch would depend on what its worker has made before, and a replacement, or another number of workers, would make
another one. From a list in ascending order the shuffle draws every order with the same probability as from any other.

It is done in the worker. A transform that only comes into being with a batch is not found.
"""

from __future__ import annotations

from typing import Final

from safeloader.pool.walk import attributes_of, classes_of, name_of, walk

_TRANSFORMS: Final = ("ApplyRandomBinaryOperatorTransform", "RemoveRandomConnectedComponentFromOneHotEncodingTransform")


class ShuffledLists:
    """Those of one loader and transform."""

    def __init__(self, *roots: object) -> None:
        self._found = [channels for thing in walk(*roots) if (channels := _shuffled_of(thing)) is not None]

    def __len__(self) -> int:
        return len(self._found)

    def restore(self) -> None:
        """Bring each back into ascending order."""
        for channels in self._found:
            channels.sort()


def _shuffled_of(thing: object) -> list[int] | None:
    """The list that a transform shuffles; None for anything else. Known by names, as in `pool.blur`."""
    names = (name_of(cls) for cls in classes_of(thing))
    if not any(name.startswith("batchgeneratorsv2.") and name.endswith(_TRANSFORMS) for name in names):
        return None
    channels = attributes_of(thing).get("channel_idx")
    return channels if type(channels) is list else None
