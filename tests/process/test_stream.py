"""The stream is the same whatever dies, and however many workers make it."""

from __future__ import annotations

import pytest

from safeloader import SafeAugmenter
from safeloader.testing import DEADLY, Killer
from tests.loaders import RandomLoader, fingerprint


def _stream(n: int, workers: int, *, kill_every: float | None = None, **options: object) -> list[object]:
    with SafeAugmenter(RandomLoader(), None, workers, 2, seed=7, **options) as augmenter:
        killer = Killer(augmenter, seed=workers, signals=DEADLY)
        batches = []
        for _ in range(n):
            if kill_every is not None:
                killer.maybe(every=kill_every)
            batches.append(fingerprint(next(augmenter)))
        assert kill_every is None or killer.kills
    return batches


@pytest.fixture(scope="module")
def undisturbed() -> list[object]:
    return _stream(300, 1)


@pytest.mark.parametrize("workers", [2, 5])
def test_more_workers_make_the_same_stream(undisturbed: list[object], workers: int) -> None:
    assert _stream(300, workers) == undisturbed


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_kills_leave_the_stream_as_it_was(undisturbed: list[object], workers: int) -> None:
    assert _stream(300, workers, kill_every=20) == undisturbed


def test_forked_workers_make_the_same_stream(undisturbed: list[object]) -> None:
    assert _stream(300, 2, kill_every=20, start_method="forked") == undisturbed
