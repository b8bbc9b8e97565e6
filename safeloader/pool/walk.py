"""Every object that a loader is made of, found without running any of the user's code.

    loader ─► __dict__, __slots__ ─► values of dicts, lists, tuples, deques ─► partials, bound methods, closures, …

A loader hides its transforms anywhere: in a list of a composed transform, in a partial, in a method of another object,
in a variable of a generator. Whoever has to find something in it (a transform, a generator of random numbers) walks
over all of it here. Nothing of the user's is called, no property and no `__getattr__`: attributes are read where the
interpreter stores them, through the descriptors of the built-in types.

What is not found: what is reachable only through a module, a class, a set, an array, a weak reference, an extension's
own memory, or that does not exist yet.
"""

from __future__ import annotations

import functools
import gc
import itertools
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

import numpy as np

MAX_OBJECTS: Final = 200_000
"""A walk ends after so many objects: 0.1 s to 0.4 s. nnU-Net's loaders have about a hundred."""
_LOOKS_PER_OBJECT: Final = 10
"""A walk also ends after so many times as many looks at whatever it may be: a list of numbers costs time as well."""

_LEAVES: Final = (
    type(None), bool, int, float, complex, str, bytes, bytearray, memoryview, range, np.ndarray, np.generic, np.dtype,
    types.ModuleType, type, types.CodeType, types.FrameType,
)  # fmt: skip
"""Neither yielded nor looked into, and neither are torch's tensors."""

_ITERATORS: Final[tuple[type, ...]] = (
    map, filter, zip, enumerate, reversed, type(iter([])), type(iter(())), itertools.accumulate, itertools.chain,
    itertools.compress, itertools.count, itertools.cycle, itertools.dropwhile, itertools.filterfalse, itertools.islice,
    itertools.product, itertools.repeat, itertools.starmap, itertools.takewhile, itertools.zip_longest,
)  # fmt: skip
"""Iterators of which pipelines are built; only the garbage collector knows what they refer to."""

_read_mro: Final[Callable[[type], tuple[type, ...]]] = type.__dict__["__mro__"].__get__
_read_namespace: Final[Callable[[type], types.MappingProxyType[str, Any]]] = type.__dict__["__dict__"].__get__
_read_name: Final[Callable[[type], str]] = type.__dict__["__name__"].__get__
_read_module: Final[Callable[[type], object]] = type.__dict__["__module__"].__get__
_PARTIAL: Final = [vars(functools.partial)[name] for name in ("func", "args", "keywords")]


def walk(*roots: object, limit: int = MAX_OBJECTS) -> Iterator[object]:
    """Yield every object reachable from the roots, each once, the nearest first, always in the same order.

    It follows instances' `__dict__` and `__slots__`, the values of dicts, lists, tuples, deques, partials, bound
    methods, functions' closures and defaults, the variables of suspended generators, and the iterators of `itertools`.
    The roots are yielded, too. Strings, numbers, arrays, tensors, classes and modules are not.

    Args:
        roots: where to begin.
        limit: after so many objects the walk ends.
    """
    seen: dict[int, object] = {}  # by id, which stays an object's own as long as it is kept here
    leaves: dict[int, tuple[type, bool]] = {}  # by the class's id: its hash may be the user's
    queue: deque[object] = deque()
    looks = 0
    neighbours: Iterable[object] = roots
    while True:
        for thing in neighbours:
            looks += 1
            if looks > limit * _LOOKS_PER_OBJECT:
                return
            cls = type(thing)
            if id(cls) not in leaves:
                leaves[id(cls)] = cls, _is_leaf(cls)
            if not leaves[id(cls)][1] and id(thing) not in seen:
                seen[id(thing)] = thing
                queue.append(thing)
                yield thing
                if len(seen) >= limit:
                    return
        if not queue:
            return
        neighbours = _neighbours(queue.popleft(), limit * _LOOKS_PER_OBJECT - looks + 1)


def classes_of(thing: object) -> tuple[type, ...]:
    """The class of an object and those that it inherits from, whatever `__class__` says."""
    return _read_mro(type(thing))


def attributes_of(thing: object) -> dict[str, Any]:
    """The `__dict__` of an instance itself, not a copy; an empty one if it has none."""
    for cls in classes_of(thing):
        descriptor = _read_namespace(cls).get("__dict__")
        # Not a property of the user's that has the same name.
        if type(descriptor) is types.GetSetDescriptorType or type(descriptor) is types.MemberDescriptorType:
            found = descriptor.__get__(thing)
            return found if type(found) is dict else {}
    return {}


def name_of(cls: type) -> str:
    """The name of a class with its module's: "collections.OrderedDict"."""
    module = _read_module(cls)
    return f"{module}.{_read_name(cls)}" if type(module) is str else _read_name(cls)


def _is_leaf(cls: type) -> bool:
    return issubclass(cls, _LEAVES) or any(name_of(base) == "torch.Tensor" for base in _read_mro(cls))


def _neighbours(thing: object, at_most: int) -> Iterator[object]:
    """What an object refers to directly. Containers are copied first: another thread may change them."""
    yield from list(itertools.islice(dict.values(attributes_of(thing)), at_most))
    yield from _slots(thing)
    cls = type(thing)  # `isinstance` would ask a `__class__` of the user's
    if issubclass(cls, dict):
        yield from list(itertools.islice(dict.values(thing), at_most))  # type: ignore[arg-type]
    elif issubclass(cls, (list, tuple, deque)):
        own_iter = next(base for base in (list, tuple, deque) if issubclass(cls, base)).__iter__
        yield from list(itertools.islice(own_iter(thing), at_most))  # type: ignore[arg-type]
    elif issubclass(cls, functools.partial):
        yield from (descriptor.__get__(thing) for descriptor in _PARTIAL)
    elif any(cls is kind for kind in _ITERATORS):
        yield from gc.get_referents(thing)
    else:
        yield from _of_code(thing)


def _slots(thing: object) -> Iterator[object]:
    for cls in classes_of(thing):
        namespace = _read_namespace(cls)
        if "__slots__" in namespace:
            for member in list(namespace.values()):
                if type(member) is types.MemberDescriptorType:
                    try:
                        value = member.__get__(thing)
                    except AttributeError:  # never set
                        continue
                    yield value


def _of_code(thing: Any) -> Iterator[object]:
    """What functions, methods and generators hold; none of these types can be inherited from."""
    cls = type(thing)
    if cls is types.FunctionType:
        yield from _contents(thing.__closure__ or ())
        yield from thing.__defaults__ or ()
        yield from (thing.__kwdefaults__ or {}).values()
    elif cls is types.MethodType:
        yield thing.__self__
        yield thing.__func__
    elif cls is types.BuiltinMethodType or cls is types.MethodWrapperType:
        yield thing.__self__
    elif cls is types.GeneratorType and thing.gi_frame is not None:
        yield from list(thing.gi_frame.f_locals.values())
        yield thing.gi_yieldfrom


def _contents(cells: Iterable[types.CellType]) -> Iterator[object]:
    for cell in cells:
        try:
            value = cell.cell_contents
        except ValueError:  # a variable that has no value yet
            continue
        yield value
