"""What a test orders is done once: by one call one order, whoever runs on after it."""

from __future__ import annotations

from pathlib import Path

import pytest

from safeloader.testing import Orders


@pytest.fixture
def done() -> list[str]:
    return []


@pytest.fixture
def orders(tmp_path: Path, done: list[str]) -> Orders:
    return Orders(tmp_path / "orders", {deed: lambda deed=deed: done.append(deed) for deed in ("hang", "die")})


def test_one_call_does_one_of_them(orders: Orders, done: list[str]) -> None:
    """Who stopped itself and is continued, so that it can write its stacks, does not take the next one's."""
    orders.give("hang", "loading")
    orders.give("hang", "loading")
    for done_so_far in (1, 2, 2):
        orders.obey("loading")
        assert done == ["hang"] * done_so_far


def test_only_in_its_stage_and_not_once_it_is_withdrawn(orders: Orders, done: list[str]) -> None:
    orders.give("hang", "loading")
    orders.give("die", "loading")
    orders.obey("transforming")
    assert not done
    orders.withdraw("hang")
    orders.obey("loading")
    orders.obey("loading")
    assert done == ["die"]


def test_a_deed_that_nobody_knows(orders: Orders) -> None:
    with pytest.raises(KeyError, match="no deed 'explode': there are die, hang"):
        orders.give("explode", "loading")
