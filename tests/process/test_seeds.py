"""No two workers share a random stream, and a seed is all that a stream depends on."""

from __future__ import annotations

import itertools
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter

from safeloader import SafeAugmenter
from tests import scripts
from tests.loaders import RandomLoader, fingerprint

pytestmark = pytest.mark.usefixtures("warm_nursery")


class Drawing(RandomLoader):
    """What each generator gives first, and who drew it."""

    def __next__(self) -> dict[str, Any]:
        return {
            "worker": self.thread_id,
            "torch": torch.rand(4).tolist(),
            "numpy": np.random.rand(4).tolist(),
            "random": [random.random() for _ in range(4)],
        }


GENERATORS = ("torch", "numpy", "random")


def _stream(n: int, workers: int = 1, **options: Any) -> list[Any]:
    with SafeAugmenter(RandomLoader((1, 1)), None, workers, 2, **options) as augmenter:
        return [fingerprint(next(augmenter)) for _ in range(n)]


def _draws(augmenter: Any, n: int) -> list[dict[str, Any]]:
    """Tickets of several workers."""
    draws = [next(augmenter) for _ in range(n)]
    while len({draw["worker"] for draw in draws}) < 2:
        draws.append(next(augmenter))
    return draws


def test_the_stock_workers_share_a_torch_stream() -> None:
    """With `seeds=None`, as nnU-Net calls it: NumPy is seeded anew in each worker, torch is not."""
    augmenter = NonDetMultiThreadedAugmenter(Drawing(), None, 2, 2)
    draws = _draws(augmenter, 40)
    augmenter._finish()
    of_worker = [[draw["torch"] for draw in draws if draw["worker"] == worker] for worker in (0, 1)]
    n = min(map(len, of_worker))
    assert n > 0 and of_worker[0][:n] == of_worker[1][:n], "the same numbers, in the same order"


@pytest.mark.parametrize("method", ["clean", "forked"])
def test_no_number_is_drawn_twice(method: str) -> None:
    with SafeAugmenter(Drawing(), None, 3, 2, start_method=method) as augmenter:
        draws = _draws(augmenter, 200)
    for generator in GENERATORS:
        numbers = [number for draw in draws for number in draw[generator]]
        # torch.rand has 24 bits: among 800 draws some few may meet by chance; whole batches may not.
        assert len({tuple(draw[generator]) for draw in draws}) == len(draws)
        assert len(set(numbers)) >= len(numbers) - 5


def test_the_generators_of_one_batch_are_not_correlated() -> None:
    with SafeAugmenter(Drawing(), None, 1, 2, seed=1) as augmenter:
        draws = [next(augmenter) for _ in range(500)]
    for one, other in itertools.combinations(GENERATORS, 2):
        a, b = (np.array([draw[name] for draw in draws]).ravel() for name in (one, other))
        assert abs(np.corrcoef(a, b)[0, 1]) < 0.1, (one, other)
    neighbours = np.array([draw["torch"][0] for draw in draws])
    assert abs(np.corrcoef(neighbours[:-1], neighbours[1:])[0, 1]) < 0.15


def test_every_way_to_give_a_seed_gives_the_same_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _stream(20, seed=11)
    assert _stream(20, workers=3, seed=11) == expected
    monkeypatch.setenv("SAFELOADER_SEED", "11")
    assert _stream(20) == expected
    assert _stream(20, seed=12) != expected, "an argument wins over the environment"
    assert _stream(20, workers=2, seeds=[5, 6]) == expected, "and so does the environment over `seeds`"


def test_the_same_seeds_give_the_same_stream() -> None:
    expected = _stream(20, workers=2, seeds=[5, 6])
    assert _stream(20, workers=2, seeds=[5, 6]) == expected
    assert _stream(20, workers=2, seeds=[np.int64(5), np.int64(6)]) == expected
    assert _stream(20, workers=2, seeds=[6, 5]) != expected


@pytest.mark.parametrize("seeds", [None, [None, None]])
def test_without_a_seed_each_run_differs_and_reports_how_to_repeat_it(seeds: list[None] | None) -> None:
    with SafeAugmenter(RandomLoader((1, 1)), None, 2, 2, seeds) as augmenter:
        first = [fingerprint(next(augmenter)) for _ in range(20)]
        seed = augmenter.report().seed
    assert _stream(20, seed=seed) == first
    assert _stream(20, workers=2, seeds=seeds) != first


def test_the_trainers_own_generators_are_left_alone() -> None:
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    expected = torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    _stream(5), _stream(5, start_method="forked")
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()) == expected


class Words(RandomLoader):
    """Its batch is a set of strings in the order in which Python iterates it: that follows from the hash seed."""

    def __next__(self) -> dict[str, Any]:
        return {"words": list({f"word_{number}" for number in range(20)})}


WORDS = """
from tests.process.test_seeds import Words
with SafeAugmenter(Words(), None, 2, 2, seed=7, start_method="clean") as augmenter:
    print([next(augmenter)["words"] for _ in range(4)])
    for child in psutil.Process().children():
        child.kill()  # the nursery
    print([next(augmenter)["words"] for _ in range(4)][-1])
"""


def test_sets_have_one_order_in_every_nursery_and_run(tmp_path: Path) -> None:
    def run(hash_seed: str) -> scripts.Ended:
        return scripts.run(tmp_path, f"import psutil\n{WORDS}", environ={"PYTHONHASHSEED": hash_seed})

    with ThreadPoolExecutor(2) as two_at_once:
        runs = list(two_at_once.map(run, ("random", "random", "7", "7")))
    assert [run.code for run in runs] == [0] * 4, runs[0].err
    for run in runs:
        before, after = run.out.splitlines()
        assert before.count(after) == 4, "a new nursery iterates as the one before"
    assert runs[0].out == runs[1].out
    assert runs[2].out == runs[3].out != runs[0].out, "a hash seed of the user's is kept"


def test_streams_of_one_seed_never_share_a_number() -> None:
    seen: dict[str, set[Any]] = {generator: set() for generator in GENERATORS}
    for stream in (0, 1, 2, 2**32 - 1):
        with SafeAugmenter(Drawing(), None, 1, 2, seed=7, stream=stream) as augmenter:
            draws = [next(augmenter) for _ in range(50)]
            assert augmenter.report().stream == stream
        for generator in GENERATORS:
            new = {tuple(draw[generator]) for draw in draws}
            assert len(new) == 50 and not new & seen[generator]
            seen[generator] |= new


def test_restart_and_finish_go_on_with_the_stream() -> None:
    expected = _stream(40, seed=7)
    with SafeAugmenter(RandomLoader((1, 1)), None, 2, 2, seed=7) as augmenter:
        batches = [fingerprint(next(augmenter)) for _ in range(10)]
        augmenter.restart()
        batches += [fingerprint(next(augmenter)) for _ in range(10)]
        augmenter._finish()
        batches += [fingerprint(next(augmenter)) for _ in range(10)]
        augmenter._finish()
        augmenter._start()
        batches += [fingerprint(next(augmenter)) for _ in range(10)]
        assert augmenter.report().batches == 40
    assert batches == expected
