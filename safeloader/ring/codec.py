"""A batch in a slot: encoded with one copy, decoded with none.

The batch is pickled with protocol 5. Small things go into the pickle stream; the memory of tensors and arrays goes
out-of-band straight into the slot, and is rebuilt as views on it. So any picklable batch works. A slot describes
itself:

    header │ buffer 0 │ buffer 1 │ … │ table of (offset, nbytes) │ pickle stream
    64 B     each aligned to 64 B

The header is written last: what it describes is complete.

Tensors keep dtype, shape, strides (if dense) and values; arrays keep dtype, shape and values, and are writable.
Not kept: that two tensors of one batch overlap in memory. They arrive as two.
"""

from __future__ import annotations

import functools
import io
import pickle
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final

import cloudpickle
import numpy as np
import torch

from safeloader import killpoints
from safeloader.ring.memfile import MemoryFile

_HEADER: Final = struct.Struct("=QqQQQQ")  # magic, ticket, n_buffers, table offset, stream offset, stream nbytes
_ENTRY: Final = struct.Struct("=QQ")  # offset, nbytes
_MAGIC: Final = 0x31_30_52_44_4C_46_53_53
ALIGN_NBYTES: Final = 64
"""Cache line, and the alignment that vectorised kernels like best."""


COPY_BELOW_NBYTES: Final = 4096
"""Smaller buffers are copied out of the slot: who keeps a batch's identifiers should not keep its whole slot."""


_SENT_BY_VALUE: Final = b"_class_setstate"
"""How a stream calls what `_Unpickler` is for. Without it, pickle's own is as good, and needs no line of Python."""
_IN_NUMPY: Final[dict[torch.dtype, np.dtype[Any]]] = {
    getattr(torch, name): np.dtype(name)
    for name in (
        *("float16", "float32", "float64", "complex64", "complex128"),
        *("int8", "int16", "int32", "int64", "uint8", "bool"),
    )
}
"""An array with its shape and a tensor of that cost a third of `torch.frombuffer` and a view: 2 µs instead of 7."""

_MAX_PATH_DEPTH: Final = 20
"""How deep in a batch `unpicklable_path` looks."""


class CorruptSlotError(RuntimeError):
    """A slot does not hold what its owner said it holds."""


class _OutOfBand:
    """Pickler mixin: tensors and awkward arrays become buffers instead of bytes in the stream."""

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is torch.Tensor:
            return _reduce_tensor(obj)
        if kind is np.ndarray and not obj.dtype.hasobject:
            return _reduce_array(obj)
        parent = getattr(super(), "reducer_override", None)
        return NotImplemented if parent is None else parent(obj)


class _ByReference(_OutOfBand, pickle.Pickler):
    """Classes by name, as the stock augmenter does: for workers that share the trainer's `__main__`."""


class _ByValue(_OutOfBand, cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no types
    """Classes of the user's script by value: for workers whose `__main__` is another module."""


class _Unpickler(pickle.Unpickler):
    """Finds the user's own classes again, and leaves them as they are.

    cloudpickle recognises a class that was sent to the worker by value, but then sets all its attributes to the
    worker's: class variables would fall back, and methods would see copies of the script's globals.
    """

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        return functools.partial(_unless_own, found) if name == "_class_setstate" else found


def _unless_own(set_state: Callable[[type, Any], type], kind: type, state: Any) -> type:
    own: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        own = getattr(own, name, None)
    return kind if own is kind else set_state(kind, state)


def encode(batch: Any, slot: MemoryFile, ticket: int, *, by_value: bool) -> int:
    """Write a batch into a slot, which grows if it has to.

    Args:
        batch: anything picklable.
        slot: the slot's memory file.
        ticket: written into the header, checked by `decode`.
        by_value: whether classes that the trainer defines in its `__main__` are sent by value.

    Returns:
        How many bytes of the slot are used.

    Raises:
        Exception: whatever pickling raises for a batch that can't be pickled.
    """
    buffers: list[memoryview] = []
    stream = io.BytesIO()
    pickler = (_ByValue if by_value else _ByReference)(
        stream, protocol=5, buffer_callback=lambda buffer: buffers.append(buffer.raw())
    )
    pickler.dump(batch)
    killpoints.reach("worker.step.pickled")

    offsets = []
    end = _aligned(_HEADER.size)
    for buffer in buffers:
        offsets.append(end)
        end = _aligned(end + buffer.nbytes)
    table_at, stream_at = end, end + len(buffers) * _ENTRY.size
    used = stream_at + stream.tell()
    slot.grow(used)
    killpoints.reach("worker.step.grown")

    with memoryview(slot.map(populate=True)) as memory:
        for number, (offset, buffer) in enumerate(zip(offsets, buffers, strict=True)):
            memory[offset : offset + buffer.nbytes] = buffer
            _ENTRY.pack_into(memory, table_at + number * _ENTRY.size, offset, buffer.nbytes)
        memory[stream_at:used] = stream.getbuffer()
        killpoints.reach("worker.step.copied")
        _HEADER.pack_into(memory, 0, _MAGIC, ticket, len(buffers), table_at, stream_at, stream.tell())
    return used


def decode(memory: memoryview, ticket: int) -> Any:
    """Rebuild the batch in a slot as views on `memory`; whoever exports that memory lives as long as they do.

    Args:
        memory: the slot's bytes, writable.
        ticket: the ticket that the slot must hold.

    Raises:
        CorruptSlotError: the slot holds something else.
    """
    magic, found, n_buffers, table_at, stream_at, stream_nbytes = _HEADER.unpack_from(memory, 0)
    if magic != _MAGIC or found != ticket:
        raise CorruptSlotError(f"expected ticket {ticket} in the slot, found {found} (magic {magic:#x})")
    table = _ENTRY.iter_unpack(memory[table_at : table_at + n_buffers * _ENTRY.size])
    views = [memory[offset : offset + nbytes] for offset, nbytes in table]
    buffers = [bytearray(view) if view.nbytes < COPY_BELOW_NBYTES else view for view in views]
    stream = bytes(memory[stream_at : stream_at + stream_nbytes])
    if _SENT_BY_VALUE in stream:
        return _Unpickler(io.BytesIO(stream), buffers=buffers).load()
    return pickle.loads(stream, buffers=buffers)


def private_copy(memory: memoryview) -> memoryview:
    """What a slot holds, in memory of its own."""
    _, _, _, _, stream_at, stream_nbytes = _HEADER.unpack_from(memory, 0)
    return memoryview(bytearray(memory[: stream_at + stream_nbytes]))


def unpicklable_path(batch: Any, *, by_value: bool, root: str = "batch") -> str:
    """Where in a batch the thing is that can't be pickled, for example `batch['meta'][0]`."""

    def picklable(obj: Any) -> bool:
        try:
            (_ByValue if by_value else _ByReference)(
                io.BytesIO(), protocol=5, buffer_callback=lambda _buffer: None
            ).dump(obj)
        except Exception:  # noqa: BLE001 - whatever a user's __reduce__ raises means: not this one
            return False
        return True

    path, culprit = root, batch
    seen = {id(batch)}  # a batch may contain itself
    for _ in range(_MAX_PATH_DEPTH):
        items: Sequence[tuple[Any, Any]] = ()
        if isinstance(culprit, dict):
            items = list(culprit.items())
        elif isinstance(culprit, (list, tuple)):
            items = list(enumerate(culprit))
        within = ((key, value) for key, value in items if id(value) not in seen and not picklable(value))
        found = next(within, None)
        if found is None:
            break
        key, culprit = found
        seen.add(id(culprit))
        path += f"[{_shown(key)}]"
    return path


def _shown(key: Any) -> str:
    try:
        return repr(key)
    except Exception:  # noqa: BLE001 - a user's __repr__ may raise anything
        return f"<{type(key).__name__}>"


def _aligned(offset: int) -> int:
    return -(-offset // ALIGN_NBYTES) * ALIGN_NBYTES


def _reduce_tensor(tensor: torch.Tensor) -> tuple[Callable[..., Any], tuple[Any, ...]] | Any:
    """How a tensor becomes a buffer; `NotImplemented` leaves the unusual ones to torch."""
    usual = tensor.device.type == "cpu" and tensor.layout == torch.strided and not tensor.is_quantized
    if not usual or tensor.requires_grad or tensor.__dict__:
        return NotImplemented
    tensor = tensor.resolve_conj().resolve_neg()
    strides = tensor.stride()
    order = sorted(range(tensor.dim()), key=lambda dim: -strides[dim])
    if not tensor.permute(order).is_contiguous():
        order = list(range(tensor.dim()))
        tensor = tensor.contiguous()
    dense = tensor.permute(order)
    # Not reshape(-1): of a single element it keeps whatever stride that had.
    flat = dense.as_strided((dense.numel(),), (1,))
    raw = pickle.PickleBuffer(flat.view(torch.uint8).numpy().data) if dense.numel() else None
    as_it_lies_there = (raw, tensor.dtype, tuple(dense.shape))
    if order == sorted(order):
        return _rebuild_tensor, as_it_lies_there
    return _rebuild_permuted, (*as_it_lies_there, tuple(order))


def _rebuild_tensor(raw: memoryview | None, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """The reverse for a usual tensor, which lies in the buffer in the order of its dimensions."""
    if raw is None:
        return torch.empty(shape, dtype=dtype)
    in_numpy = _IN_NUMPY.get(dtype)
    if in_numpy is None:
        return torch.frombuffer(raw, dtype=dtype).view(shape)
    return torch.from_numpy(np.ndarray(shape, in_numpy, raw))


def _rebuild_permuted(
    raw: memoryview | None, dtype: torch.dtype, shape: tuple[int, ...], order: tuple[int, ...]
) -> torch.Tensor:
    """The reverse for others: `shape` and the buffer are in the order of descending strides, `order` says which."""
    return _rebuild_tensor(raw, dtype, shape).permute(sorted(range(len(order)), key=order.__getitem__))


def _reduce_array(array: np.ndarray[Any, Any]) -> Any:
    """Let NumPy send the array's own memory if it can, and a copy where it would fall back to in-band bytes.

    A read-only array is copied, too: it would arrive read-only, and with the stock augmenter it does not.
    """
    contiguous = array.flags.c_contiguous or array.flags.f_contiguous
    if contiguous and array.flags.writeable:
        return NotImplemented
    return array.copy(order="F" if array.flags.f_contiguous and not array.flags.c_contiguous else "C").__reduce_ex__(5)
