"""Whatever a loader returns arrives: same types, shapes, dtypes and bits."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from safeloader.ring import codec
from safeloader.ring.memfile import MemoryFile


@dataclass
class Meta:
    spacing: tuple[float, ...]
    notes: Any = None


@pytest.fixture
def slot() -> Iterator[MemoryFile]:
    file = MemoryFile.create("test-slot")
    yield file
    file.close()


def _through(batch: Any, slot: MemoryFile, *, by_value: bool = True) -> Any:
    used = codec.encode(batch, slot, 3, by_value=by_value)
    memory = bytearray(memoryview(slot.map())[:used])
    return codec.decode(memoryview(memory), 3)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype).copy_(tensor.detach().resolve_conj().reshape(-1))
    return flat.view(torch.uint8) if tensor.numel() else flat


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        bits, other = (_bits(t) for t in (a, b))
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits, other)
    if isinstance(a, np.ndarray):
        if a.dtype.hasobject:
            return a.dtype == b.dtype and a.shape == b.shape and a.tolist() == b.tolist()
        a, b = (x.astype(x.dtype.newbyteorder("="), copy=False) for x in (a, b))  # pickle may change the byte order
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() and b.flags.writeable
    if isinstance(a, np.generic):
        return type(a) is type(b) and a.tobytes() == b.tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and bool(a == b)


_READ_ONLY = np.broadcast_to(np.arange(3.0), (4, 3))
_TENSORS = {
    "float32": torch.randn(2, 1, 4, 4, 4),
    "bfloat16": torch.randn(3).to(torch.bfloat16),
    "float16": torch.randn(3).half(),
    "bool": torch.tensor([[True, False]]),
    "int16": torch.arange(5, dtype=torch.int16),
    "complex, conjugated": torch.randn(3, dtype=torch.complex64).conj(),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "transposed": torch.randn(4, 5).t(),
    "strided": torch.randn(4, 6)[:, ::2],
    "expanded": torch.randn(3, 1).expand(3, 4),
    "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "one element of a strided view": torch.randn(6)[::2][:1],
    "a view of something large": torch.randn(1000)[5:7],
    "parameter": torch.nn.Parameter(torch.randn(2)),
    "quantized": torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8),
}
_ARRAYS = {
    "objects": np.array([None, "a", {"b": 1}], dtype=object),
    "strings": np.array(["a", "bcd"]),
    "dates": np.array(["2020-01-01"], dtype="datetime64[D]"),
    "structured": np.zeros(3, dtype=[("x", "f4"), ("y", "i2")]),
    "fortran": np.asfortranarray(np.random.rand(3, 4)),
    "strided": np.arange(12).reshape(3, 4)[:, ::2],
    "reversed": np.arange(5)[::-1],
    "empty": np.zeros((0, 3)),
    "scalar": np.array(3),
    "read-only": _READ_ONLY,
}


@pytest.mark.parametrize("by_value", [True, False])
@pytest.mark.parametrize(
    "batch", [*_TENSORS.values(), *_ARRAYS.values()], ids=[*_TENSORS, *(f"np {k}" for k in _ARRAYS)]
)
def test_every_kind_of_array_arrives(batch: Any, slot: MemoryFile, by_value: bool) -> None:
    arrived = _through(batch, slot, by_value=by_value)
    if isinstance(batch, torch.Tensor) and batch.is_quantized:
        assert torch.equal(arrived.int_repr(), batch.int_repr())
    else:
        assert _same(batch, arrived)


@pytest.mark.parametrize("name", ["transposed", "channels last", "float32"])
def test_dense_tensors_keep_their_strides(name: str, slot: MemoryFile) -> None:
    assert _through(_TENSORS[name], slot).stride() == _TENSORS[name].stride()


@pytest.mark.parametrize("name", ["float32", "transposed", "bfloat16"])
def test_tensors_take_no_room_in_the_stream(name: str, slot: MemoryFile) -> None:
    large = torch.cat([_TENSORS[name]] * 1000)
    large = large.t() if name == "transposed" else large
    used = codec.encode(large, slot, 0, by_value=True)
    assert used < large.nbytes + 4096


def test_nested_things_arrive(slot: MemoryFile) -> None:
    batch = {
        "data": torch.randn(2, 3),
        "target": [torch.randint(0, 3, (2, 1, s, s), dtype=torch.int16) for s in (8, 4, 2)],
        "keys": ["case_1", "case_2"],
        "meta": (Meta((1.0, 0.5), notes={"array": np.arange(3)}), None, b"bytes", 1 << 80),
    }
    arrived = _through(batch, slot)
    assert _same(batch["target"], arrived["target"])
    assert arrived["meta"][0].spacing == (1.0, 0.5)
    assert arrived["meta"][0].notes["array"].tolist() == [0, 1, 2]
    assert _same(batch["meta"][1:], arrived["meta"][1:])


@given(
    array=hnp.arrays(
        dtype=hnp.scalar_dtypes() | hnp.byte_string_dtypes() | hnp.unicode_string_dtypes(),
        shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6),
    ),
    data=st.data(),
)
def test_any_array_and_view_arrives(array: np.ndarray[Any, Any], data: st.DataObject) -> None:
    view = array[data.draw(hnp.basic_indices(array.shape))] if array.ndim else array
    file = MemoryFile.create("test-slot")
    try:
        assert _same(pickle.loads(pickle.dumps(view)), _through(view, file)), "not what the stock class would give"
    finally:
        file.close()


def test_a_slot_grows_and_is_used_again(slot: MemoryFile) -> None:
    for n in (10, 3_000_000, 10):
        batch = torch.arange(n)
        assert torch.equal(_through(batch, slot), batch)


def test_another_tickets_slot_is_refused(slot: MemoryFile) -> None:
    codec.encode("batch", slot, 4, by_value=True)
    with pytest.raises(codec.CorruptSlotError, match="expected ticket 5 in the slot, found 4"):
        codec.decode(memoryview(slot.map()), 5)


def test_small_buffers_are_private_and_large_ones_are_views(slot: MemoryFile) -> None:
    codec.encode([np.arange(3), np.arange(4096)], slot, 0, by_value=True)
    memory = memoryview(slot.map())
    small, large = codec.decode(memory, 0)
    span = np.frombuffer(memory, np.uint8)
    assert np.shares_memory(large, span)
    assert not np.shares_memory(small, span)


def test_what_cannot_be_pickled_is_found() -> None:
    batch = {"data": np.zeros(3), "meta": [1, {"lock": (i for i in range(3))}]}
    assert codec.unpicklable_path(batch, by_value=True) == "batch['meta'][1]['lock']"
    with pytest.raises(TypeError):
        pickle.dumps(batch)
