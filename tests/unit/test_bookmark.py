"""The last two states that a worker has kept are there, whole or not at all, for all its next incarnations."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from safeloader.ring.bookmark import _HALF_NBYTES, _HEADER, MAX_STATE_NBYTES, Bookmark
from safeloader.ring.memfile import MemoryFile


@pytest.fixture
def bookmark() -> Iterator[Bookmark]:
    bookmark = Bookmark.create()
    yield bookmark
    bookmark.close()


def test_a_new_one_is_empty(bookmark: Bookmark) -> None:
    assert bookmark.empty
    assert bookmark.read(0) is None


def test_the_last_two_are_there(bookmark: Bookmark) -> None:
    for number in range(5):
        bookmark.write(number, b"state %d" % number)
    assert [bookmark.read(number) for number in range(6)] == [None, None, None, b"state 3", b"state 4", None]
    assert not bookmark.empty


def test_the_other_side_sees_them(bookmark: Bookmark) -> None:
    worker = Bookmark(MemoryFile(os.dup(bookmark.fd)))
    worker.write(0, b"x" * MAX_STATE_NBYTES)
    worker.write(1, b"")
    worker.close()
    assert bookmark.read(0) == b"x" * MAX_STATE_NBYTES
    assert bookmark.read(1) == b""


def test_it_takes_memory_only_for_what_was_written(bookmark: Bookmark) -> None:
    bookmark.write(0, b"small")
    assert os.fstat(bookmark.fd).st_blocks * 512 <= 64 << 10


@given(states=st.lists(st.binary(max_size=200), min_size=1, max_size=9), torn_at=st.integers(0, 250))
@example(states=[b""], torn_at=8)  # its number is there, and no more
def test_who_dies_while_writing_leaves_the_state_before(states: list[bytes], torn_at: int) -> None:
    """The last write is torn: of header and state only the first bytes are there."""
    first = Bookmark.create()
    for number, state in enumerate(states):
        first.write(number, state)
    torn = len(states)
    at, intended = torn % 2 * _HALF_NBYTES, _HEADER.pack(torn, 100, 12345) + b"n" * 100
    first._clear(torn % 2)
    first._map[at : at + min(torn_at, len(intended))] = intended[:torn_at]
    second = Bookmark.create(first)
    third = Bookmark.create(second)
    assert third.read(torn) is None
    assert third.read(torn - 1) == states[-1]
    for bookmark in (first, second, third):
        bookmark.close()
