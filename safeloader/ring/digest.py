"""The checksum of a batch: what is in it, whoever made it and however it lies in memory.

    batch ─► head of each thing (what it is, how large), its own bytes, then what it contains ─► BLAKE2b, 16 bytes

A batch in the worker, the same batch rebuilt from its slot, and the same batch of another run have the same checksum.
It says nothing about strides, byte order, views, padding, shared objects, memoisation or the order of a set; it says
everything about types, dtypes, shapes, the order of a dict's keys, and bits: -0.0 is not 0.0, and one NaN is not
another. Objects are known by what they give pickle to rebuild them from; an object that is reached twice counts twice.
"""

from __future__ import annotations

import copyreg
import hashlib
import struct
import sys
import types
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import cloudpickle
import numpy as np
import torch

MAX_PARTS: Final = 64
"""Parts of one batch that have a checksum of their own: a message must stay small."""
_MAX_NAME_CHARS: Final = 60
_NBYTES: Final = 16
_PROTOCOL: Final = 4
"""Not 5, which would hand out the buffers of arrays."""
_X87_NBYTES: Final = 10 if np.finfo(np.longdouble).nmant == 63 else None
"""How much of a long double is its value, where the rest is padding, which may be anything."""

_Node = tuple[list[Any], Iterable[Any] | None]
"""What a thing is (bytes and buffers), and what it contains; None: it can't contain anything."""


@dataclass(frozen=True)
class Digest:
    """What a batch is known by.

    Attributes:
        checksum: of the whole batch, 32 hexadecimal digits.
        parts: name and checksum of what lies at its top level, in order; see `parts`.
    """

    checksum: str
    parts: tuple[tuple[str, str], ...]


def checksum(batch: Any) -> str:
    """The checksum of a batch: 32 hexadecimal digits."""
    return digest(batch).checksum


def parts(batch: Any) -> dict[str, str]:
    """A checksum for each key of a dict, or for each place ("[0]") of a list or tuple; else there are no parts.

    Beyond `MAX_PARTS` the last one stands for all the rest.
    """
    return dict(digest(batch).parts)


def digest(batch: Any) -> Digest:
    """Both at once: each byte is read once.

    Raises:
        Exception: whatever pickling raises for a batch that can't be pickled.
    """
    if type(batch) is dict:
        keys: Sequence[Any] = list(batch)
        names, values = [_name(key) for key in keys], list(batch.values())
    elif type(batch) in (list, tuple):
        keys, values = (), list(batch)
        names = [f"[{place}]" for place in range(len(values))]
    else:
        return Digest(_content(batch).hex(), ())
    sums = [_content(value, above=(batch,)) for value in values]
    whole = _head(type(batch).__name__, *(_content(key, above=(batch,)) for key in keys), *sums)
    return Digest(_sum(whole).hex(), tuple(_named(names, sums)))


def _named(names: list[str], sums: list[bytes]) -> Iterator[tuple[str, str]]:
    """Parts by names that are short, few, and each there once."""
    if len(names) > MAX_PARTS:
        kept = MAX_PARTS - 1
        names = [*names[:kept], f"({len(names) - kept} more)"]
        sums = [*sums[:kept], _sum(_head("rest", *sums[kept:]))]
    seen: set[str] = set()
    for place, (name, its_sum) in enumerate(zip(names, sums, strict=True)):
        shown = name if name not in seen else f"{name} #{place}"  # two that are alike once they are shortened
        seen.add(shown)
        yield shown, its_sum.hex()


def _name(key: Any) -> str:
    shown = key if type(key) is str else str(key) if type(key) in (int, bool, float) else type(key).__name__
    return shown[:_MAX_NAME_CHARS]


def _content(root: Any, *, above: Sequence[Any] = ()) -> bytes:
    """The checksum of one thing and all that it contains. `above`: what it lies in, from the outside.

    Not recursive: pickle's own depth is what limits a batch.
    """
    hasher = hashlib.blake2b(digest_size=_NBYTES)
    path: list[tuple[Any, Iterator[Any]]] = [(thing, iter(())) for thing in above]
    depth = {id(thing): place for place, thing in enumerate(above)}

    def enter(thing: Any) -> None:
        back = depth.get(id(thing))
        if back is not None:  # it contains itself
            hasher.update(_head("back", len(path) - back))
            return
        if isinstance(thing, (set, frozenset)):
            around = [*(outer for outer, _ in path), thing]
            head: list[Any] = [_head("set", _type_name(thing), *sorted(_content(i, above=around) for i in thing))]
            contained: Iterable[Any] | None = None
        else:
            head, contained = _node(thing)
        for piece in head:
            hasher.update(piece)
        if contained is not None:
            depth[id(thing)] = len(path)
            path.append((thing, iter(contained)))  # the thing itself, too: its id stays its own

    enter(root)
    while len(path) > len(above):
        thing, contained = path[-1]
        try:
            item = next(contained)
        except StopIteration:
            path.pop()
            del depth[id(thing)]
        else:
            enter(item)
    return hasher.digest()


def _node(thing: Any) -> _Node:
    kind = type(thing)
    if kind in _PLAIN:
        return [_head(kind.__name__, _PLAIN[kind](thing))], None
    if kind in (list, tuple):
        return [_head(kind.__name__, len(thing))], thing
    if kind is dict:
        return [_head("dict", len(thing))], (each for item in thing.items() for each in item)
    if isinstance(thing, torch.Tensor):
        return _tensor(thing)
    if isinstance(thing, (np.ndarray, np.generic)):
        return _numpy(thing)
    if isinstance(thing, (type, types.FunctionType)):
        code = thing.__code__.co_code if isinstance(thing, types.FunctionType) else b""
        return [_head("named", thing.__module__, thing.__qualname__, code)], None
    if isinstance(thing, types.BuiltinFunctionType) and isinstance(thing.__self__, (types.ModuleType, type(None))):
        return [_head("named", str(thing.__module__), thing.__qualname__, b"")], None
    return _object(thing)


def _tensor(tensor: torch.Tensor) -> _Node:
    usual = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not usual:  # sparse ones are made of usual ones
        return _object(tensor)
    head = _head("tensor", _type_name(tensor), str(tensor.dtype), *tensor.shape)
    kept = [tensor.__dict__] if tensor.__dict__ else []
    plain = tensor.detach().as_subclass(torch.Tensor)
    if plain.is_quantized:
        return [head], [plain.int_repr(), plain.dequantize(), *kept]
    if not plain.numel():
        return [head], kept
    flat = plain.resolve_conj().resolve_neg().contiguous().as_strided((plain.numel(),), (1,))
    return [head, flat.view(torch.uint8).numpy().data], kept


def _numpy(thing: Any) -> _Node:
    if isinstance(thing, np.generic):
        return _array(np.asarray(thing), "scalar")
    if type(thing) is np.ma.MaskedArray:  # it gets its fill value when somebody asks for it, pickle for example
        return [_head("masked")], [thing.data, np.ma.getmaskarray(thing), thing.fill_value]
    own: Any = type(thing).__reduce__
    if own is np.ndarray.__reduce__:  # such as a memory map: it arrives without its attributes
        return _array(thing.view(np.ndarray), _type_name(thing))
    return _object(thing)


def _array(array: np.ndarray[Any, Any], what: str) -> _Node:
    dtype = array.dtype
    if dtype.names is not None:  # field by field: between them there may be anything
        return [_head(what, *dtype.names, *array.shape)], [array[name] for name in dtype.names]
    if dtype.hasobject or dtype.kind == "T":
        return [_head(what, dtype.str, *array.shape)], array.reshape(-1).tolist()
    little = array if dtype.isnative and sys.byteorder == "little" else array.astype(dtype.newbyteorder("<"))
    head = _head(what, little.dtype.str, dtype.name, *array.shape)
    if not little.nbytes:
        return [head], None
    raw = np.ascontiguousarray(little).reshape(-1).view(np.uint8)
    if dtype.kind in "fc" and _X87_NBYTES is not None and dtype in (np.longdouble, np.clongdouble):
        raw = np.ascontiguousarray(raw.reshape(-1, np.dtype(np.longdouble).itemsize)[:, :_X87_NBYTES])
    return [head, raw.data], None


def _object(thing: Any) -> _Node:
    """Anything else: what it is rebuilt from."""
    reduce = copyreg.dispatch_table.get(type(thing))
    try:
        reduced = thing.__reduce_ex__(_PROTOCOL) if reduce is None else reduce(thing)
    except TypeError:  # what only cloudpickle knows how to send: a module, a cell, a property
        return [_head("bytes of", _type_name(thing), cloudpickle.dumps(thing, protocol=_PROTOCOL))], None
    if isinstance(reduced, str):  # a name in its module
        return [_head("named", _type_name(thing), reduced, b"")], None
    rebuild, arguments, state, items, pairs, setter = (*reduced, None, None, None, None)[:6]
    listed = [None if each is None else list(each) for each in (items, pairs)]
    return [_head("object", _type_name(thing))], [rebuild, arguments, state, *listed, setter]


def _type_name(thing: Any) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _head(what: str, *fields: str | bytes | int) -> bytes:
    """What a thing is, so that no two different things are written alike."""
    encoded = [field if isinstance(field, bytes) else str(field).encode("utf-8", "surrogatepass") for field in fields]
    sizes = [len(fields), *map(len, encoded)]
    return b"".join([what.encode(), b"\0", *(size.to_bytes(8, "little") for size in sizes), *encoded])


def _sum(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_NBYTES).digest()


def _bytes_of_int(number: int) -> bytes:
    return number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)


_PLAIN: Final[dict[type, Any]] = {
    type(None): lambda _: b"",
    type(...): lambda _: b"",
    bool: lambda value: bytes([value]),
    int: _bytes_of_int,
    float: struct.Struct("<d").pack,
    complex: lambda value: struct.pack("<dd", value.real, value.imag),
    str: lambda value: value.encode("utf-8", "surrogatepass"),
    bytes: lambda value: value,
    bytearray: bytes,
}
"""What contains nothing, and its value as bytes."""
