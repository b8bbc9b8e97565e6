"""What a batch depends on beside its seed is found by making it twice."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest

from safeloader.cli.check import in_words
from safeloader.testing import make_twice
from tests.loaders import RandomLoader

pytestmark = pytest.mark.usefixtures("warm_nursery")


class Counts(RandomLoader):
    made = 0

    def __next__(self) -> dict[str, Any]:
        self.made += 1
        return {**super().__next__(), "seg": np.full(3, self.made)}


class AsksWhoItIs(RandomLoader):
    def __next__(self) -> dict[str, Any]:
        return {**super().__next__(), "seg": np.full(3, self.thread_id)}


class ReadsTheClock(RandomLoader):
    def __next__(self) -> dict[str, Any]:
        return {**super().__next__(), "seg": np.full(3, time.monotonic())}


class DrawsAnew(RandomLoader):
    def __next__(self) -> dict[str, Any]:
        return {**super().__next__(), "seg": np.random.default_rng().random(3)}


class ChoosesOtherCases(RandomLoader):
    def __next__(self) -> dict[str, Any]:
        return {**super().__next__(), "keys": [f"case_{self.thread_id}"]}


def test_nothing_is_found_where_there_is_nothing() -> None:
    assert make_twice(RandomLoader()) == []
    assert in_words([], 20) == (
        "20 batches, each made twice by different workers: the same, bit for bit. Their seed is all that they depend "
        "on."
    )


@pytest.mark.parametrize("loader", [Counts, AsksWhoItIs, ReadsTheClock, DrawsAnew])
def test_what_differs_is_named(loader: type[RandomLoader]) -> None:
    differences = make_twice(loader(), tickets=12)
    assert len(differences) >= 11, "a count may agree once"
    assert {difference.parts for difference in differences} == {("seg",)}
    for difference in differences:
        assert difference.cases[0] == difference.cases[1] != ()
    words = in_words(differences, 12)
    assert words.startswith(f"12 batches, each made twice by different workers: {len(differences)} of them differ.\n")
    assert f"  ticket {differences[0].ticket} (of case_" in words and "): seg\n" in words
    assert words.splitlines()[-1].startswith("What to do: look in the loader and its transforms for what does not")


def test_other_cases_are_shown_both() -> None:
    words = in_words(make_twice(ChoosesOtherCases(), tickets=3), 3)
    assert "  ticket 2 (of case_0 the one time, of case_1 the other): keys" in words
