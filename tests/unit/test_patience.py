"""How long without progress is too long: twenty times the 99th percentile, two minutes at least, or what users say."""

from __future__ import annotations

import math
import random

import pytest

from safeloader.pool.patience import HangLimits, Patience


def patience(*seconds: float, limits: HangLimits | None = None) -> Patience:
    made = Patience(HangLimits() if limits is None else limits)
    for each in seconds:
        made.took(each)
    return made


def test_nothing_is_known_yet() -> None:
    assert patience().allowed_s(first=True) == 300.0
    assert patience().allowed_s(first=False) == 120.0


def test_fast_batches_have_two_minutes() -> None:
    assert patience(*[0.5] * 200).allowed_s(first=False) == 120.0


def test_slow_batches_have_twenty_times_as_long() -> None:
    slow = patience(*[30.0] * 5)
    assert slow.allowed_s(first=False) == 600.0
    assert slow.allowed_s(first=True) == 600.0, "a first batch never has less"


def test_one_slow_batch_of_a_hundred_does_not_make_it_wait_longer() -> None:
    assert patience(*[10.0] * 99, 1000.0).allowed_s(first=False) == 200.0
    assert patience(*[10.0] * 97, 50.0, 50.0, 50.0).allowed_s(first=False) == 1000.0


def test_old_batches_are_forgotten() -> None:
    assert patience(*[100.0] * 1000, *[10.0] * 1100).allowed_s(first=False) == pytest.approx(200.0, rel=0.01)


@pytest.mark.parametrize("seed", range(5))
def test_no_false_alarm_in_twenty_thousand_batches_whose_time_varies_a_hundredfold(seed: int) -> None:
    chance = random.Random(seed)
    watched = patience()
    for number in range(20_000):
        seconds = 1.0 * 100 ** chance.random()
        assert seconds < watched.allowed_s(first=number < 12)
        watched.took(seconds)


def test_a_fixed_deadline_knows_no_percentile() -> None:
    fixed = patience(*[30.0] * 100, limits=HangLimits(fixed_s=5.0))
    assert fixed.allowed_s(first=False) == 5.0
    assert fixed.allowed_s(first=True) == 300.0
    assert patience(limits=HangLimits(fixed_s=5.0, first_s=2.0)).allowed_s(first=True) == 5.0


def test_no_deadline_at_all() -> None:
    never = patience(1.0, limits=HangLimits(fixed_s=math.inf))
    assert never.allowed_s(first=True) == never.allowed_s(first=False) == math.inf


@pytest.mark.parametrize("fixed_s", [None, 3600.0, math.inf])
def test_the_cap_is_above_everything(fixed_s: float | None) -> None:
    """NCCL ends a distributed training after 600 s, so nothing may wait for long there."""
    capped = patience(*[100.0] * 100, limits=HangLimits(fixed_s=fixed_s, first_s=1000.0, most_s=240.0))
    assert capped.allowed_s(first=True) == capped.allowed_s(first=False) == 240.0


def test_the_typical_time_follows_the_latest_batches() -> None:
    assert patience().typical_s == 0.0
    assert patience(1.0).typical_s == 1.0
    assert patience(1.0, 3.0).typical_s == 2.0
    assert patience(1.0, *[0.01] * 500).typical_s == pytest.approx(0.01, rel=0.1)
