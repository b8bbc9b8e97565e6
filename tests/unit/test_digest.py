"""Checksums of batches: the same for the same content, whoever holds it and however; another for any other content."""

from __future__ import annotations

import collections
import copy
import enum
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from safeloader.pool import wire
from safeloader.ring import codec
from safeloader.ring.digest import MAX_PARTS, checksum, digest, parts
from safeloader.ring.memfile import MemoryFile

ROOT = Path(__file__).parents[2]


@dataclass
class Meta:
    spacing: tuple[float, ...]
    notes: Any = None
    found: set[str] = field(default_factory=set)


@dataclass
class Slotted:
    __slots__ = ("x",)
    x: int


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


Pair = collections.namedtuple("Pair", "x y")


class Subclass(torch.Tensor):
    """As MONAI's MetaTensor: a tensor with something beside its values."""


def annotated(values: torch.Tensor, meta: object) -> Subclass:
    tensor = values.as_subclass(Subclass)
    tensor.meta = meta  # type: ignore[attr-defined]
    return tensor


def through(batch: Any, *, by_value: bool = True) -> Any:
    slot = MemoryFile.create("test-slot")
    try:
        used = codec.encode(batch, slot, 3, by_value=by_value)
        return codec.decode(memoryview(bytearray(memoryview(slot.map())[:used])), 3)
    finally:
        slot.close()


_RANDOM = np.random.default_rng(0)
_STRUCTURED = np.dtype([("x", "f4"), ("y", "i2", (2,)), ("z", "O")], align=True)
pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support"),
]

KINDS: dict[str, Callable[[], Any]] = {
    "float32": lambda: torch.arange(64.0).reshape(2, 1, 4, 8),
    "bfloat16": lambda: torch.arange(3).to(torch.bfloat16),
    "bool": lambda: torch.tensor([[True, False]]),
    "complex, conjugated": lambda: torch.complex(torch.arange(3.0), torch.ones(3)).conj(),
    "0-d": lambda: torch.tensor(2.5),
    "empty": lambda: torch.zeros(0, 3),
    "transposed": lambda: torch.arange(20.0).reshape(4, 5).t(),
    "strided": lambda: torch.arange(24.0).reshape(4, 6)[:, ::2],
    "expanded": lambda: torch.arange(3.0)[:, None].expand(3, 4),
    "requires grad": lambda: torch.ones(2, requires_grad=True),
    "parameter": lambda: torch.nn.Parameter(torch.arange(2.0)),
    "quantized": lambda: torch.quantize_per_tensor(torch.arange(3.0), 0.1, 0, torch.qint8),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse csr": lambda: torch.eye(3).to_sparse_csr(),
    "a tensor with attributes": lambda: annotated(torch.arange(3.0), {"affine": np.eye(4)}),
    "np floats": lambda: np.arange(12.0).reshape(3, 4),
    "np big-endian": lambda: np.arange(3, dtype=">i4"),
    "np fortran": lambda: np.asfortranarray(np.arange(20.0).reshape(4, 5)),
    "np reversed": lambda: np.arange(5)[::-1],
    "np broadcast": lambda: np.broadcast_to(np.arange(3.0), (4, 3)),
    "np long double": lambda: np.arange(3, dtype=np.longdouble) / 7,
    "np objects": lambda: np.array([None, "a", {"b": np.arange(2)}], dtype=object),
    "np strings": lambda: np.array(["a", "bcd"]),
    "np dates": lambda: np.array(["2020-01-01", "NaT"], dtype="datetime64[D]"),
    "np structured": lambda: np.array([(1.0, (2, 3), "a"), (4.0, (5, 6), None)], dtype=_STRUCTURED),
    "np void": lambda: np.array([b"ab", b"c"], dtype="V3"),
    "np no bytes": lambda: np.zeros(3, dtype="V0"),
    "np 0-d": lambda: np.array(3),
    "np scalar": lambda: np.float32(1.5),
    "np date": lambda: np.datetime64("2020-01-01"),
    "np masked": lambda: np.ma.masked_array([1, 2, 3], [0, 1, 0]),
    "np masked, strided": lambda: np.ma.masked_array(np.arange(8), [0, 1] * 4, fill_value=7)[::2],
    "np memory map": lambda: np.memmap(ROOT / "LICENSE", "u1", "r", offset=2, shape=(5, 4))[:, 1:],
    "np matrix": lambda: np.arange(12).reshape(3, 4).view(np.matrix).T,
    "np records": lambda: np.array([(1.0, 2)], dtype=[("x", "f4"), ("y", "i2")]).view(np.recarray),
    "np generator": lambda: np.random.default_rng(3),
    "dataclass": lambda: Meta((1.0, 0.5), notes={"array": np.arange(3)}, found={"a", "b", "c", "d"}),
    "slots": lambda: Slotted(4),
    "enum": lambda: Colour.RED,
    "namedtuple": lambda: Pair(1, "b"),
    "ordered dict": lambda: collections.OrderedDict(a=1, b=[2]),
    "counter": lambda: collections.Counter("abca"),
    "deque": lambda: collections.deque([1, 2], maxlen=3),
    "sets": lambda: {frozenset({"a", "b"}), frozenset({"c"}), 1, None},
    "path": lambda: Path("/a/b"),
    "pattern": lambda: re.compile("a+"),
    "class and function": lambda: (Meta, through, len, np.mean, torch.float32),
    "plain": lambda: [None, True, 1, -1, 255, 256, 1 << 80, 0.1, 1j, "é\udcff", b"x", bytearray(b"y"), ...],
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_arrives_has_the_checksum_of_what_was_sent(kind: str) -> None:
    batch = {"data": KINDS[kind](), "nested": [(KINDS[kind](),)]}
    sent = digest(batch)
    assert sent == digest(through(batch)) == digest(through(batch, by_value=False)) == digest(through(through(batch)))
    assert list(dict(sent.parts)) == ["data", "nested"]
    assert checksum(batch) == sent.checksum and parts(batch) == dict(sent.parts)


@pytest.mark.parametrize("kind", KINDS)
def test_a_thing_made_again_has_the_same_checksum_alone_and_shared(kind: str) -> None:
    one = KINDS[kind]()
    assert checksum([one, one]) == checksum([one, KINDS[kind]()]), "shared, or equal"
    assert re.fullmatch("[0-9a-f]{32}", checksum(one))


def test_what_only_cloudpickle_can_send() -> None:
    assert checksum(through([os, re])) == checksum([os, re]) != checksum([re, os])


def test_no_two_different_things_have_the_same_checksum() -> None:
    sums = {kind: checksum(make()) for kind, make in KINDS.items()}
    assert len(set(sums.values())) == len(sums)


PAIRS: list[tuple[Any, Any]] = [
    (0.0, -0.0),
    (1, True),
    (1, 1.0),
    (1, "1"),
    ("1", b"1"),
    (b"1", bytearray(b"1")),
    ([1, 2], (1, 2)),
    ([[1], 2], [[1, 2]]),
    (["ab", "c"], ["a", "bc"]),
    ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    ({"a": [1]}, {"a": [2]}),
    ([], [[]]),
    (None, "None"),
    (np.float32(1), np.float64(1)),
    (np.float64(1), 1.0),
    (np.array(1.0), np.float64(1)),
    (np.zeros((2, 3)), np.zeros((3, 2))),
    (np.zeros(3), np.zeros(3, dtype=np.int64)),
    (np.zeros(0), np.zeros((0, 1))),
    (np.zeros(2), torch.zeros(2, dtype=torch.float64)),
    (torch.zeros(2), torch.tensor([0.0, -0.0])),
    (torch.zeros(2), torch.nn.Parameter(torch.zeros(2))),
    (torch.zeros(4, dtype=torch.int16), torch.zeros(4, dtype=torch.float16)),
    (torch.arange(4).reshape(2, 2), torch.arange(4).reshape(2, 2).t()),
    (annotated(torch.ones(1), "x"), annotated(torch.ones(1), "y")),
    (KINDS["np masked"](), np.ma.masked_array([1, 2, 3], [0, 0, 1])),
    (Meta((1.0,)), Meta((1.5,))),
    (Meta((1.0,), found={"a"}), Meta((1.0,), found={"b"})),
    (Colour.RED, Colour.BLUE),
    (Pair(1, 2), (1, 2)),
    (collections.OrderedDict(a=1), {"a": 1}),
    ({"a", "b"}, {"a", "c"}),
    ({"a"}, frozenset({"a"})),
    (Path("/a"), Path("/b")),
    (len, max),
]


@pytest.mark.parametrize("number", range(len(PAIRS)), ids=lambda number: f"{PAIRS[number][0]}, no. {number}")
def test_what_differs_has_another_checksum(number: int) -> None:
    one, other = PAIRS[number]
    assert checksum(one) != checksum(other)
    assert checksum({"k": one}) != checksum({"k": other})


def test_the_bits_of_a_nan_count() -> None:
    quiet, marked = (np.array([bits], dtype=np.uint32).view(np.float32) for bits in (0x7FC00000, 0x7FC00001))
    assert np.isnan(quiet).all() and np.isnan(marked).all()
    for kind in (np.array, torch.from_numpy, lambda array: array[0]):
        assert checksum(kind(quiet)) != checksum(kind(marked))  # type: ignore[operator]
        assert checksum(kind(quiet)) == checksum(kind(quiet.copy()))  # type: ignore[operator]


def test_what_lies_between_values_does_not_count() -> None:
    dtype = np.dtype({"names": ["x", "y"], "formats": ["i1", "i4"], "offsets": [0, 4], "itemsize": 12})
    zeros, ones = np.zeros(24, np.uint8), np.ones(24, np.uint8)
    for array in (zeros.view(dtype), ones.view(dtype)):
        array["x"], array["y"] = 3, 4
    assert checksum(zeros.view(dtype)) == checksum(ones.view(dtype))
    long = np.arange(3, dtype=np.longdouble) / 7
    padded = np.frombuffer(bytearray(long.tobytes()), np.uint8).reshape(3, -1)
    if np.finfo(np.longdouble).nmant == 63:
        padded[:, 10:] = 0xAB
    assert checksum(padded.reshape(-1).view(np.longdouble)) == checksum(long)


@given(
    array=hnp.arrays(
        dtype=hnp.scalar_dtypes() | hnp.byte_string_dtypes() | hnp.unicode_string_dtypes() | hnp.array_dtypes(),
        shape=hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
    ),
    data=st.data(),
)
def test_any_view_of_any_array_is_its_values(array: np.ndarray[Any, Any], data: st.DataObject) -> None:
    view = array[data.draw(hnp.basic_indices(array.shape))] if array.ndim else array
    expected = checksum(view)
    assert checksum(through(view)) == expected
    assert checksum(pickle.loads(pickle.dumps(view))) == expected
    if isinstance(view, np.ndarray):
        assert checksum(np.array(view, order="F")) == checksum(np.array(view, order="C")) == expected


_LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.complex_numbers() | st.text() | st.binary()
_TREES = st.recursive(
    _LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=4)
        | st.frozensets(st.text(max_size=2) | st.integers())
    ),
    max_leaves=20,
)


@given(tree=_TREES)
def test_any_tree_keeps_its_checksum(tree: Any) -> None:
    assert checksum(tree) == checksum(through(tree)) == checksum(copy.deepcopy(tree))


@given(one=_TREES, other=_TREES)
def test_checksums_differ_where_pickles_of_fresh_copies_do(one: Any, other: Any) -> None:
    """`repr` tells types, values and order apart (but not the payload of a NaN, nor a set's order)."""
    if not any("set" in repr(tree) or "nan" in repr(tree) for tree in (one, other)):
        assert (checksum(one) == checksum(other)) == (repr(one) == repr(other))


def test_a_batch_that_contains_itself() -> None:
    def knot(depth: int) -> Any:
        batch: dict[str, Any] = {"a": [1], "b": {}}
        batch["a"].append(batch if depth == 0 else batch["a"])
        batch["b"]["meta"] = Meta((1.0,), notes=batch["b"])
        return batch

    assert checksum(knot(0)) == checksum(knot(0)) == checksum(through(knot(0)))
    assert checksum(knot(0)) != checksum(knot(1))


def test_a_batch_may_be_nested_deeply() -> None:
    def nested(depth: int, innermost: int) -> Any:
        batch: Any = innermost
        for _ in range(depth):
            batch = [batch]
        return batch

    assert checksum(nested(100_000, 1)) == checksum(nested(100_000, 1)) != checksum(nested(100_000, 2))


def test_another_process_finds_the_same() -> None:
    """Each has its own hash seed, so a set of strings has another order in each."""
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
from tests.unit.test_digest import KINDS, checksum
print(checksum({{kind: make() for kind, make in KINDS.items()}}))
"""
    seeds = ["1", "2"]
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for seed in seeds
    }
    assert found == {checksum({kind: make() for kind, make in KINDS.items()})}


def test_parts_say_which_key_differs() -> None:
    batch = {"data": torch.zeros(3), "target": [torch.ones(2)], "keys": ["a"]}
    changed = {**batch, "target": [torch.zeros(2)]}
    assert [key for key in batch if parts(batch)[key] != parts(changed)[key]] == ["target"]
    assert checksum(batch) != checksum(changed)
    assert parts(batch)["data"] == checksum(torch.zeros(3))
    assert list(parts([1, 2])) == ["[0]", "[1]"] and parts(1) == {} == parts(Pair(1, 2))


def test_parts_are_few_and_their_names_short() -> None:
    batch: dict[Any, int] = {f"{'x' * 200}{number}": number for number in range(MAX_PARTS + 10)}
    found = parts(batch)
    assert len(found) == MAX_PARTS and list(found)[-1] == "(11 more)"
    assert all(len(name) <= 70 for name in found)
    for number in (0, 1, MAX_PARTS + 9):
        changed = {**batch, f"{'x' * 200}{number}": -1}
        place = min(number, MAX_PARTS - 1)
        assert [i for i, name in enumerate(found) if found[name] != parts(changed)[name]] == [place]
    assert list(parts({1: 0, "1": 0, (2,): 0})) == ["1", "1 #1", "tuple"]


def test_what_a_worker_says_of_a_batch_stays_a_small_message() -> None:
    known = digest({f"{number:0200}": number for number in range(1000)})
    cases = tuple(f"{number:0200}" for number in range(256))
    packet = wire.pack(wire.Done(10**9, 10**3, cases, (123.4, 567.8), known.checksum, known.parts))
    assert len(packet) < wire.MAX_PACKET_NBYTES * 3 / 4
