"""Generators of random numbers that a loader or transform owns: found, and seeded for each ticket.

A loader that draws from a `numpy.random.Generator` of its own would otherwise give all workers copies of one state, and
each batch would depend on what its worker has made before. Found are those of NumPy, `random` and torch (CPU):

    in the loader and the transform     whatever `walk` reaches: attributes, lists, closures, variables of generators
    beside their code                   variables of the modules and attributes of the classes that they come from

Not found: what is made anew for each batch, what an extension keeps to itself, `random.SystemRandom`. Those that come
into being with a worker's first batch are found after it, and that batch is made again.
"""

from __future__ import annotations

import random
import sys
import types
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import torch

from safeloader.pool.walk import classes_of, name_of, walk

_KINDS: Final = (np.random.Generator, np.random.RandomState, random.Random, torch.Generator)
_GLOBAL: Final = (np.random.mtrand._rand, random._inst, torch.default_generator)
"""Seeded by `seed_everything`."""
_IN_OBJECTS: Final = 0
_BESIDE_CODE: Final = 1

_Key = tuple[int, int]


class OwnedGenerators:
    """Those of one loader and transform, by a key that is the same in every process."""

    def __init__(self, *roots: object) -> None:
        self._roots = roots
        self._found: dict[_Key, Any] = {}
        self.look_again()

    def __len__(self) -> int:
        return len(self._found)

    def look_again(self) -> bool:
        """Whether there are others now than at the last look."""
        before = {id(generator) for generator in self._found.values()}
        self._found = dict(_find(*self._roots))
        return not before.issuperset(id(generator) for generator in self._found.values())

    def seed(self, root: int, stream: int, ticket: int, attempt: int) -> None:
        """Seed each for one ticket, as `seed_everything` does for the global ones."""
        for key, generator in self._found.items():
            _seed(generator, np.random.SeedSequence(root, spawn_key=(stream, ticket, attempt, *key)))


def _find(*roots: object) -> Iterator[tuple[_Key, Any]]:
    number = 0
    namespaces: set[int] = set()
    for thing in walk(*roots):
        if _is_owned(thing):
            yield (_IN_OBJECTS, number), thing
            number += 1
        for where, namespace in _beside(thing):
            if id(namespace) not in namespaces:
                namespaces.add(id(namespace))
                for name, value in list(namespace.items()):
                    if _is_owned(value):
                        # By name: code that travels by value has only those variables that it uses, in any order.
                        yield (_BESIDE_CODE, zlib.crc32(f"{where}:{name}".encode())), value


def _beside(thing: object) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The names that an object's code can use: of its classes and their modules, or of a function's module."""
    if isinstance(thing, types.FunctionType):
        yield str(thing.__globals__.get("__name__")), thing.__globals__
        return
    for cls in classes_of(thing):
        yield name_of(cls), vars(cls)
        for value in list(vars(cls).values()):
            if isinstance(value, types.FunctionType):
                yield str(value.__globals__.get("__name__")), value.__globals__
        module = sys.modules.get(cls.__module__)
        if module is not None:
            yield cls.__module__, vars(module)


def _is_owned(thing: object) -> bool:
    if not issubclass(type(thing), _KINDS) or any(thing is known for known in _GLOBAL):
        return False
    if isinstance(thing, torch.Generator):
        return thing.device.type == "cpu"
    return not isinstance(thing, random.SystemRandom)


def _seed(generator: Any, words: np.random.SeedSequence) -> None:
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = type(generator.bit_generator)(words).state
    elif isinstance(generator, np.random.RandomState):
        fresh = np.random.RandomState(type(generator._bit_generator)(words))
        generator.set_state(fresh.get_state(legacy=False))
    elif isinstance(generator, torch.Generator):
        generator.manual_seed(int(words.generate_state(1, np.uint64)[0]) >> 1)
    else:
        generator.seed(int.from_bytes(words.generate_state(8, np.uint32).tobytes(), "little"))
