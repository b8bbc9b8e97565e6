"""Bad input gets a clear error, what was right before it is delivered, and the augmenter can be closed."""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from batchgenerators.dataloading.data_loader import DataLoader

from safeloader import SafeAugmenter
from safeloader.errors import (
    BatchNotPicklableError,
    ClosedError,
    ConfigError,
    ForkedError,
    LoaderFinishedError,
    WorkerError,
)
from safeloader.testing import wait_until
from tests import scripts
from tests.loaders import RandomLoader, fingerprint

pytestmark = pytest.mark.usefixtures("warm_nursery")


# ---- arguments ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_processes": 0}, r"num_processes=0: must be an integer of at least 1; .* use .*SingleThreadedAugmenter"),
        ({"num_processes": -3}, r"num_processes=-3: must be an integer of at least 1"),
        ({"num_processes": 1.5}, r"num_processes=1\.5: must be an integer of at least 1"),
        ({"num_processes": True}, r"num_processes=True: must be an integer of at least 1"),
        ({"num_processes": None}, r"num_processes=None: must be an integer of at least 1"),
        ({"num_cached": 0}, r"num_cached=0: must be an integer of at least 1$"),
        ({"num_cached": -1}, r"num_cached=-1: must be an integer of at least 1$"),
        ({"seeds": [1]}, r"seeds: 1 given for num_processes=2; give one per worker, or None"),
        ({"seeds": [1, 2, 3]}, r"seeds: 3 given for num_processes=2"),
        ({"seeds": [1, -2]}, r"seeds: -2 must be an integer of at least 0, or None"),
        ({"seeds": [1, "x"]}, r"seeds: 'x' must be an integer of at least 0, or None"),
        ({"seed": -1}, r"seed=-1: must be at least 0 \(root seed of the stream"),
        ({"seed": 1.5}, r"seed=1\.5: expected int \(root seed"),
        ({"max_restart": 3}, r"unknown option 'max_restart': did you mean 'max_restarts'\?"),
        ({"start_methode": "x"}, r"unknown option 'start_methode': did you mean 'start_method'\?"),
        ({"colour": "red"}, r"unknown option 'colour': there are: audit, backoff_first_s, .*, stream"),
        ({"start_method": "spawn"}, r"start_method='spawn': expected auto or clean or forked \(auto, clean or forked"),
        ({"max_restarts": -1}, r"max_restarts=-1: must be at least 0 \(deaths allowed"),
        ({"restart_window_s": 0}, r"restart_window_s=0: must be at least 1 s \(window"),
        ({"backoff_max_s": 1e9}, r"backoff_max_s=1000000000\.0: must be at most 600 s \(longest wait"),
        ({"backoff_max_s": float("nan")}, r"backoff_max_s=nan: must be at least 0 s"),
        ({"stream": 2**32}, r"stream=4294967296: must be at most 4\.29497e\+09"),
    ],
)
def test_arguments_that_cannot_work(arguments: dict[str, Any], message: str) -> None:
    given = {"num_processes": 2, "num_cached": 2, **arguments}
    with pytest.raises(ConfigError, match=message) as caught:
        SafeAugmenter(RandomLoader(), None, **given)
    assert isinstance(caught.value, ValueError), "what a caller who checks arguments expects"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("SAFELOADER_SEED", "seven", r"SAFELOADER_SEED=seven: expected int \(root seed"),
        ("SAFELOADER_SEED", "-7", r"SAFELOADER_SEED=-7: must be at least 0 \(root seed"),
        ("SAFELOADER_MAX_RESTARTS", "1.5", r"SAFELOADER_MAX_RESTARTS=1\.5: expected int \(deaths"),
        ("SAFELOADER_START_METHOD", "fork", r"SAFELOADER_START_METHOD=fork: expected auto or clean or forked"),
        ("SAFELOADER_BACKOFF_MAX_S", "5 s", r"SAFELOADER_BACKOFF_MAX_S=5 s: expected float"),
    ],
)
def test_environment_variables_that_cannot_work(
    monkeypatch: pytest.MonkeyPatch, name: str, text: str, message: str
) -> None:
    monkeypatch.setenv(name, text)
    with pytest.raises(ConfigError, match=message):
        SafeAugmenter(RandomLoader(), None, 2)


def test_numpy_integers_work_as_with_the_stock_augmenter() -> None:
    with SafeAugmenter(RandomLoader(), None, np.int64(1), np.int32(2), [np.int64(3)]) as augmenter:
        next(augmenter)
        json.dumps(augmenter.report().to_dict())


def test_a_loader_that_is_no_iterator() -> None:
    with (
        SafeAugmenter([{"data": 1}], None, 1, 1) as augmenter,
        pytest.raises(
            WorkerError, match=r"TypeError: 'list' object is not an iterator, raised in worker loader-0 \(pid"
        ),
    ):
        next(augmenter)


def test_a_transform_that_gets_no_dict() -> None:
    with (
        SafeAugmenter(Counting(lambda number: number), dict, 1, 1) as augmenter,
        pytest.raises(WorkerError, match=r"TypeError: .*must be a mapping, not int, raised in worker .* transforming"),
    ):
        next(augmenter)


# ---- batches that can't be sent ----


class Counting:
    """Batch number n (of a worker) is `make(n)`."""

    def __init__(self, make: Any) -> None:
        self.make, self.number = make, -1

    def __next__(self) -> Any:
        self.number += 1
        return self.make(self.number)


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass
class Sample:
    handle: Any


class UnprintableKey:
    def __repr__(self) -> str:
        raise RuntimeError("not me")


def _cycle() -> list[Any]:
    cycle: list[Any] = [threading.Lock()]
    cycle.insert(0, cycle)
    return cycle


UNPICKLABLE: dict[str, tuple[Any, str]] = {
    "a lock": (lambda: threading.Lock(), "batch"),
    "in a dict": (lambda: {"data": 1, "lock": threading.Lock()}, "batch['lock']"),
    "deep": (lambda: {"meta": [1, (2, {"x": [threading.Lock()]})]}, "batch['meta'][1][1]['x'][0]"),
    "a socket": (lambda: {"socket": socket.socket()}, "batch['socket']"),
    "a generator": (lambda: {"iter": [(n for n in range(3))]}, "batch['iter'][0]"),
    "a named tuple": (lambda: {"pair": Pair(1, threading.Lock())}, "batch['pair'][1]"),
    "a dataclass": (lambda: {"sample": Sample(threading.Lock())}, "batch['sample']"),
    "an ordered dict": (lambda: OrderedDict(a=1, b=threading.Lock()), "batch['b']"),
    "an object array": (lambda: {"array": np.array([1, threading.Lock()], dtype=object)}, "batch['array']"),
    "a key": (lambda: {"data": {threading.Lock(): 1}}, "batch['data']"),
    "a cycle": (lambda: {"data": _cycle()}, "batch['data'][1]"),
    "an unprintable key": (lambda: {"data": {UnprintableKey(): threading.Lock()}}, "batch['data'][<UnprintableKey>]"),
}  # fmt: skip


@pytest.mark.parametrize("what", UNPICKLABLE)
def test_a_batch_that_cannot_be_pickled_is_named_with_its_path(what: str) -> None:
    make, path = UNPICKLABLE[what]
    with SafeAugmenter(Counting(lambda number: make() if number == 3 else number), None, 1, 2) as augmenter:
        assert [next(augmenter) for _ in range(3)] == [0, 1, 2]
        with pytest.raises(BatchNotPicklableError) as caught:
            next(augmenter)
        with pytest.raises(BatchNotPicklableError, match=re.escape(str(caught.value))):
            next(augmenter)
    error = caught.value
    assert str(error).startswith(f"{path} can't be sent to the trainer: TypeError: cannot pickle ")
    assert str(error).endswith(
        f"It comes from worker loader-0 (pid {error.pid}) while encoding the batch of ticket 3; return something that "
        "pickle can handle there."
    )
    assert (error.stage, error.ticket, error.worker) == ("encoding", 3, 0)


def test_a_batch_too_deep_to_pickle() -> None:
    def nest(depth: int) -> list[Any]:
        inner: list[Any] = []
        for _ in range(depth):
            inner = [inner]
        return inner

    with (
        SafeAugmenter(Counting(lambda _: {"tree": nest(100_000)}), None, 1, 1) as augmenter,
        pytest.raises(BatchNotPicklableError, match=r"batch\['tree'\](\[0\])+ can't be sent .*recursion"),
    ):
        next(augmenter)


class OnlyInWorkers:
    """Pickles, but can't be rebuilt in the trainer."""

    def __reduce__(self) -> Any:
        return _rebuild_in, (os.getpid(),)


def _rebuild_in(pid: int) -> Any:
    if pid != os.getpid():
        raise RuntimeError("no such table here")
    return OnlyInWorkers()


def test_a_batch_that_cannot_be_unpickled() -> None:
    loader = Counting(lambda number: {"meta": OnlyInWorkers()} if number == 2 else number)
    with SafeAugmenter(loader, None, 1, 2) as augmenter:
        assert [next(augmenter) for _ in range(2)] == [0, 1]
        for _ in range(2):
            with pytest.raises(RuntimeError, match="no such table here"):
                next(augmenter)


# ---- loaders that end ----


class Finite(DataLoader):
    def __init__(self, infinite: bool) -> None:
        super().__init__(list(range(10)), 2, 1, infinite=infinite)
        self.indices = list(range(10))

    def generate_train_batch(self) -> dict[str, Any]:
        return {"data": np.array(self.get_indices())}


def test_a_loader_that_says_it_is_finite() -> None:
    with pytest.raises(
        LoaderFinishedError,
        match=r"data_loader is finite \(infinite=False\): .* Make it infinite, or use SafeMultiThreadedAugmenter\.",
    ):
        SafeAugmenter(Finite(infinite=False), None, 1, 1)
    with SafeAugmenter(Finite(infinite=True), None, 1, 1) as augmenter:
        assert next(augmenter)["data"].shape == (2,)


def test_a_loader_that_ends_delivers_everything_first() -> None:
    with SafeAugmenter(iter([{"n": n} for n in range(5)]), None, 1, 2, name="five") as augmenter:
        assert [next(augmenter)["n"] for _ in range(5)] == [0, 1, 2, 3, 4]
        for _ in range(2):
            with pytest.raises(
                LoaderFinishedError,
                match=r"the loader of pool 'five' came to its end at ticket 5: .*infinite loaders only.*"
                r"For finite epochs use SafeMultiThreadedAugmenter\.",
            ):
                next(augmenter)
        assert augmenter.report().restarts == 0


# ---- use at the wrong time, in the wrong place ----


def test_next_after_close() -> None:
    augmenter = SafeAugmenter(RandomLoader(), None, 1, 1, name="train")
    next(augmenter)
    augmenter.close()
    for use in (augmenter.next, augmenter._start, augmenter.restart):
        with pytest.raises(ClosedError, match=r"this augmenter \(train\) was closed: make a new one"):
            use()
    assert augmenter.report().batches == 1


def test_close_wakes_a_waiting_next() -> None:
    augmenter = SafeAugmenter(Counting(lambda _: threading.Event().wait()), None, 1, 1)
    caught: list[BaseException] = []

    def wait() -> None:
        try:
            next(augmenter)
        except ClosedError as error:
            caught.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    wait_until(lambda: any(worker.stage == "loading" for worker in augmenter.workers()))
    augmenter.close()
    thread.join(5)
    assert not thread.is_alive()
    assert len(caught) == 1


@pytest.fixture
def forked_child() -> Any:
    """Run a function in a child forked from here; returns its exit code."""

    def run(function: Any) -> int:
        pid = os.fork()
        if pid == 0:
            try:
                os._exit(function())
            finally:
                os._exit(99)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

    return run


def test_use_in_a_forked_child(forked_child: Any) -> None:
    with SafeAugmenter(RandomLoader(), None, 2, 2, seed=7) as undisturbed:
        expected = [fingerprint(next(undisturbed)) for _ in range(20)]
    with SafeAugmenter(RandomLoader(), None, 2, 2, seed=7, name="train") as augmenter:
        batches = [fingerprint(next(augmenter)) for _ in range(10)]
        parent = os.getpid()

        def child() -> int:
            for use in (augmenter.next, augmenter._start, augmenter.restart):
                try:
                    use()
                except ForkedError as error:
                    expected = (
                        f"this augmenter (train) belongs to process {parent}, and this is process {os.getpid()}, "
                        "forked from it: make a new augmenter here."
                    )
                    if str(error) != expected:
                        return 1
                else:
                    return 2
            if augmenter.workers() != () or augmenter.report().seed != 7:
                return 3
            augmenter.close()
            augmenter._finish()
            with SafeAugmenter(RandomLoader(), None, 1, 1, seed=7, start_method="forked") as own:
                return 0 if fingerprint(next(own)) == batches[0] else 4

        assert forked_child(child) == 0
        batches += [fingerprint(next(augmenter)) for _ in range(10)]
        assert augmenter.report().incidents == ()
    assert batches == expected


def test_a_child_forked_while_our_locks_are_held(forked_child: Any) -> None:
    """They stay held in the child for ever: nothing there may wait for them."""
    from safeloader.pool.supervisor import Supervisor

    with SafeAugmenter(RandomLoader(), None, 1, 1) as augmenter:
        next(augmenter)
        assert augmenter._pool is not None
        locked, done = threading.Event(), threading.Event()

        def hold() -> None:
            assert augmenter._pool is not None
            with augmenter._pool.lock, Supervisor._registry:
                locked.set()
                done.wait()

        holder = threading.Thread(target=hold)
        holder.start()
        locked.wait()

        def child() -> int:
            augmenter.report()
            augmenter.workers()
            augmenter.close()
            with SafeAugmenter(RandomLoader(), None, 1, 1, start_method="forked") as own:
                next(own)
            return 0

        result: list[int] = []
        waiter = threading.Thread(target=lambda: result.append(forked_child(child)), daemon=True)
        waiter.start()
        waiter.join(20)
        done.set()
        holder.join()
        assert result == [0]


def test_the_exit_of_a_forked_child_is_silent(tmp_path: Path) -> None:
    source = """
    import multiprocessing

    def task():
        return None

    augmenter = SafeAugmenter(RandomLoader(), None, 2, 2, seed=7)
    batches = [next(augmenter) for _ in range(5)]
    pid = os.fork()
    if pid == 0:
        del augmenter, batches
        sys.exit(0)  # with all that an interpreter does at its end
    assert os.waitpid(pid, 0)[1] == 0
    process = multiprocessing.get_context("fork").Process(target=task)
    process.start()
    process.join()
    assert process.exitcode == 0
    batches += [next(augmenter) for _ in range(20)]
    assert augmenter.report().incidents == ()
    print(len(batches))
    """
    ended = scripts.run(tmp_path, source)
    assert (ended.code, ended.out, ended.err) == (0, "25\n", "")
