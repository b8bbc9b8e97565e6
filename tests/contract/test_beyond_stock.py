"""What ours promises where the stock class can't: any loader, any script, and a look inside from any thread."""

from __future__ import annotations

import importlib
import json
import logging
import math
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil
import pytest
from torch import distributed

from safeloader import SafeAugmenter
from safeloader.errors import ConfigError
from safeloader.report.stats import Report, WorkerInfo
from safeloader.testing import wait_until
from tests import scripts
from tests.loaders import RandomLoader

# ---- loaders that can't be pickled, or not in this way ----


class Locked(RandomLoader):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()

    def __next__(self) -> Any:
        with self.lock:
            return super().__next__()


class Generating(RandomLoader):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = ({"n": n} for n in iter(int, 1))

    def __next__(self) -> Any:
        return next(self.numbers)


class Large(RandomLoader):
    def __init__(self) -> None:
        super().__init__()
        self.volume = bytes(3 << 20)


class OnlyHere(RandomLoader):
    """Can be pickled, but unpickled in the trainer alone."""

    def __setstate__(self, state: Any) -> None:
        raise RuntimeError("not in a clean process")


@pytest.mark.parametrize(
    ("loader", "reason"),
    [
        (Locked, "cannot pickle '_thread.lock' object"),
        (Generating, "cannot pickle 'generator' object"),
        (Large, "the loader's pickle is larger than loader_max_mib=2"),
    ],
)
def test_a_loader_that_cannot_be_sent_comes_by_fork(loader: Any, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="safeloader")
    with SafeAugmenter(loader(), None, 2, 2, loader_max_mib=2) as augmenter:
        next(augmenter)
        assert augmenter.report().start_method == "forked"
    assert reason in caplog.text and "forked from this process" in caplog.text
    with (
        SafeAugmenter(loader(), None, 2, 2, loader_max_mib=2, start_method="clean") as augmenter,
        pytest.raises(
            ConfigError, match=r"start_method='clean': the loader can't be sent .* Use start_method='auto'\."
        ),
    ):
        next(augmenter)


class Arrays(RandomLoader):
    """Its data are in memory: a pickler hands large arrays to its file as they are, not as bytes."""

    def __init__(self, order: Literal["C", "F"]) -> None:
        super().__init__()
        self.volume = np.asarray(np.arange(1 << 18, dtype=np.int64).reshape(8, -1), order=order)

    def __next__(self) -> dict[str, Any]:
        return {**super().__next__(), "volume": self.volume}


@pytest.mark.parametrize("loader", [Large(), Arrays("C"), Arrays("F")], ids=["bytes", "array", "Fortran array"])
def test_a_loader_that_fits_is_sent(loader: Any) -> None:
    with SafeAugmenter(loader, None, 1, 1, loader_max_mib=4) as augmenter:
        batch = next(augmenter)
        assert augmenter.report().start_method == "clean"
    if isinstance(loader, Arrays):
        assert np.array_equal(batch["volume"], loader.volume)


@pytest.fixture
def module_of_the_trainer_only(tmp_path: Path) -> Iterator[Any]:
    (tmp_path / "vanishing.py").write_text(
        "from tests.loaders import RandomLoader\n"
        "class Vanishing(RandomLoader):\n"
        "    def __next__(self):\n"
        "        return {'sample': Sample(), **super().__next__()}\n"
        "class Sample:\n"
        "    pass\n"
    )
    sys.path.insert(0, str(tmp_path))
    module = importlib.import_module("vanishing")
    sys.path.remove(str(tmp_path))
    yield module
    del sys.modules["vanishing"]


def test_a_loader_of_a_module_that_only_the_trainer_has(module_of_the_trainer_only: Any) -> None:
    with SafeAugmenter(module_of_the_trainer_only.Vanishing(), None, 2, 2, seed=7) as augmenter:
        assert isinstance(next(augmenter)["sample"], module_of_the_trainer_only.Sample)
        report = augmenter.report()
    assert (report.start_method, report.incidents) == ("forked", ())


def test_a_loader_that_only_the_trainer_can_unpickle() -> None:
    with SafeAugmenter(OnlyHere(), None, 2, 2, seed=7) as augmenter:
        next(augmenter)
        assert augmenter.report().start_method == "forked"


# ---- scripts ----


def test_classes_and_lambdas_of_a_script_without_main_guard(tmp_path: Path) -> None:
    source = """
    import enum
    from dataclasses import dataclass

    assert not globals().get("again"), "the script runs once"
    again = True
    SCALE = 3

    class Kind(enum.Enum):
        LESION = 1

    @dataclass
    class Sample:
        name: str
        shared = []
        made = 0

        def scaled(self):
            return SCALE

    class Loader(RandomLoader):
        def __next__(self):
            Sample.made += 1
            return {"sample": Sample(f"x{SCALE}"), "kind": Kind.LESION, "type": Sample, **super().__next__()}

    augmenter = SafeAugmenter(Loader(), lambda **batch: {**batch, "double": 2 * SCALE}, 2, 2)
    batch = next(augmenter)
    assert isinstance(batch["sample"], Sample) and batch["type"] is Sample, "the very class"
    assert batch["kind"] is Kind.LESION
    assert (batch["sample"].name, batch["double"]) == ("x3", 6)
    SCALE = 5
    Sample.made = 100
    Sample.shared.append(1)
    method = Sample.scaled
    for _ in range(10):
        batch = next(augmenter)
    assert Sample.made == 100, "the class is the trainer's: batches don't set its attributes"
    assert Sample.shared == [1] and Sample.scaled is method
    assert batch["sample"].scaled() == 5, "methods see the script's globals"
    assert augmenter.report().start_method == "clean"
    print("all well")
    """
    ended = scripts.run(tmp_path, source)
    assert (ended.code, ended.out, ended.err) == (0, "all well\n", "")


# ---- a look inside ----


def test_workers_and_report_before_while_and_after() -> None:
    augmenter = SafeAugmenter(RandomLoader(), None, 2, 2, name="val", seed=5, start_method="forked")
    assert augmenter.workers() == ()
    before = augmenter.report()
    assert (before.batches, before.slots, before.uptime_s, before.seed) == (0, None, 0.0, 5)
    with augmenter as entered:
        assert entered is augmenter
        for _ in range(5):
            next(augmenter)
        wait_until(lambda: all(worker.state == "ready" for worker in augmenter.workers()))
        first, second = augmenter.workers()
        assert isinstance(first, WorkerInfo)
        assert (first.worker, second.worker) == (0, 1) and first.incarnation == 0
        assert first.pid is not None and psutil.Process(first.pid).name() == "sl-val-0"
        assert first.memory_nbytes is not None and first.memory_nbytes > 1 << 20
        assert first.since_s >= 0 and first.stage in {"idle", "loading", "transforming", "encoding"}
        assert augmenter.report().slots is not None
    after = augmenter.report()
    assert augmenter.workers() == ()
    assert (after.name, after.batches, after.next_ticket, after.slots) == ("val", 5, 5, None)
    assert (after.workers, after.stream, after.start_method) == (2, 0, "forked")
    assert after.wait_s > 0 and after.uptime_s > 0


def test_report_as_json_with_incidents() -> None:
    with SafeAugmenter(RandomLoader(), None, 1, 1, start_method="forked") as augmenter:
        next(augmenter)
        wait_until(lambda: augmenter.workers()[0].pid is not None)
        pid = augmenter.workers()[0].pid
        assert pid is not None
        psutil.Process(pid).kill()
        wait_until(lambda: augmenter.report().incidents != ())
        written = json.loads(json.dumps(augmenter.report().to_dict()))
        assert written["incidents"][0]["pid"] == pid
        assert written["incidents"][0]["signal"] == "SIGKILL"
        assert set(written) == set(Report.__dataclass_fields__)
        assert json.dumps(augmenter.report().incidents[0].to_dict())


def test_asking_from_other_threads_all_the_time() -> None:
    """While it starts, runs, restarts and ends; nothing raises and every answer fits together."""
    augmenter = SafeAugmenter(RandomLoader(), None, 2, 2, start_method="forked")
    done, wrong = threading.Event(), []

    def ask() -> None:
        last = 0
        while not done.is_set():
            try:
                report, workers = augmenter.report(), augmenter.workers()
                assert len(workers) in (0, 2)
                assert report.batches >= last, "it never goes back"
                last = report.batches
            except Exception as error:  # noqa: BLE001 - whatever it is, the test shows it
                wrong.append(error)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        for _ in range(50):
            next(augmenter)
        augmenter.restart()
    augmenter.close()
    done.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert augmenter.report().batches == 150


# ---- elsewhere than on Linux ----


def test_elsewhere_the_stock_augmenter_runs_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "platform", "sunos5")
    first, second = (SafeAugmenter(RandomLoader(), None, 2, 2, seed=7) for _ in range(2))
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == [
        "SafeLoader needs Linux, and this is sunos5: the stock NonDetMultiThreadedAugmenter runs instead, without "
        "protection"
    ]
    with first:
        assert next(first)["data"].shape == (2, 1, 8, 8, 8)
        assert len(first._processes) == 2, "the stock class's own workers"
        first.restart()
        next(first)
        assert first.workers() == () and first.report().slots is None
    assert first._processes == []
    second._start()
    second._finish(2, True)


@pytest.mark.parametrize(("given", "expected_s"), [({}, 240.0), ({"hang_timeout_max_s": 30}, 30.0)])
def test_in_distributed_training_the_watchdog_is_faster_than_nccl(given: dict[str, float], expected_s: float) -> None:
    """NCCL gives up on a rank after 600 s, and takes all the others along."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with SafeAugmenter(RandomLoader(), None, 1, 1, **given) as augmenter:
            next(augmenter)
            assert augmenter._pool is not None
            assert augmenter._pool.machine.limits.hang.most_s == expected_s
    finally:
        distributed.destroy_process_group()


def test_without_it_the_watchdog_has_no_upper_bound() -> None:
    with SafeAugmenter(RandomLoader(), None, 1, 1) as augmenter:
        next(augmenter)
        assert augmenter._pool is not None
        assert augmenter._pool.machine.limits.hang.most_s == math.inf
