"""A Python exception in a worker is the trainer's exception, at its place in the stream, with the real traceback."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from safeloader import SafeAugmenter
from safeloader.errors import RemoteTraceback, SafeLoaderError, StartError, WorkerError
from safeloader.testing import wait_until
from tests import scripts
from tests.loaders import RandomLoader, fingerprint

pytestmark = pytest.mark.usefixtures("warm_nursery")

AT = 7
"""The ticket that fails."""


class HalfReadError(Exception):
    """An exception with attributes, that pickles."""

    def __init__(self, path: str, missing_nbytes: int) -> None:
        super().__init__(path, missing_nbytes)
        self.path, self.missing_nbytes = path, missing_nbytes


class NoReduceError(Exception):
    def __reduce__(self) -> Any:
        raise RuntimeError("not me")


class NoUnpickleError(Exception):
    """Pickles, but its constructor takes other arguments than `args` holds."""

    def __init__(self, path: str, line: int) -> None:
        super().__init__(f"{path}:{line}")


class NoStrError(Exception):
    def __str__(self) -> str:
        raise RuntimeError("not me")


class RudeStrError(Exception):
    def __str__(self) -> str:
        raise SystemExit("not me")


class NotAnErrorError(BaseException):
    pass


def half_read() -> None:
    raise HalfReadError("case_012.b2nd", 4096)


def chained() -> None:
    try:
        raise KeyError("case_012.b2nd")
    except KeyError as error:
        raise ValueError("can't read the case\nsecond line") from error


def no_reduce() -> None:
    raise NoReduceError("first")


def no_unpickle() -> None:
    raise NoUnpickleError("file", 3)


def no_str() -> None:
    raise NoStrError


def rude_str() -> None:
    raise RudeStrError


def large() -> None:
    raise ValueError("begins here " + 50 * 2**20 * "x" + " ends here")


def system_exit() -> None:
    raise SystemExit(3)


def keyboard_interrupt() -> None:
    raise KeyboardInterrupt


def not_an_error() -> None:
    raise NotAnErrorError("base")


def stop_iteration() -> None:
    raise StopIteration


def deep() -> None:
    deep()


def of_workers_only() -> None:
    class LocalError(Exception):
        pass

    raise LocalError("local")


class FailingLoader(RandomLoader):
    """Fails at ticket `AT` (told by its draw) in the given stage."""

    def __init__(self, fail: Callable[[], None], stage: str, draw: float) -> None:
        super().__init__()
        self.fail, self.stage, self.draw = fail, stage, draw

    def set_thread_id(self, thread_id: int) -> None:
        super().set_thread_id(thread_id)
        if self.stage == "starting":
            self.fail()

    def __next__(self) -> dict[str, Any]:
        batch = super().__next__()
        if self.stage == "loading" and batch["draw"] == self.draw:
            self.fail()
        return batch

    def transform(self, **batch: Any) -> dict[str, Any]:
        if self.stage == "transforming" and batch["draw"] == self.draw:
            self.fail()
        return batch


@pytest.fixture(scope="module")
def undisturbed(warm_nursery: None) -> list[tuple[bytes, bytes, float, tuple[str, ...]]]:
    with SafeAugmenter(RandomLoader(), None, 1, 2, seed=7) as augmenter:
        return [fingerprint(next(augmenter)) for _ in range(AT + 1)]


def _failing(fail: Callable[[], None], stage: str, undisturbed: list[Any], **options: Any) -> SafeAugmenter:
    loader = FailingLoader(fail, stage, undisturbed[AT][2])
    return SafeAugmenter(loader, loader.transform, 3, 2, seed=7, **options)


def _first_error(augmenter: SafeAugmenter, undisturbed: list[Any]) -> WorkerError:
    """Batches of earlier tickets come first; then the error."""
    assert [fingerprint(next(augmenter)) for _ in range(AT)] == undisturbed[:AT]
    with pytest.raises(WorkerError) as caught:
        next(augmenter)
    return caught.value


@pytest.mark.parametrize("stage", ["loading", "transforming"])
@pytest.mark.parametrize("method", ["clean", "forked"])
def test_an_exception_comes_at_its_place_with_its_evidence(stage: str, method: str, undisturbed: list[Any]) -> None:
    with _failing(half_read, stage, undisturbed, start_method=method) as augmenter:
        workers = {worker.worker: worker.pid for worker in augmenter.workers()}
        error = _first_error(augmenter, undisturbed)
        workers = {error.worker: error.pid} | workers
    assert (error.ticket, error.stage, error.incarnation) == (AT, stage, 0)
    assert error.exception_type.endswith("test_exceptions.HalfReadError")
    assert isinstance(error.exception, HalfReadError), "the very class"
    assert (error.exception.path, error.exception.missing_nbytes) == ("case_012.b2nd", 4096)
    assert error.pid not in (os.getpid(), None) and error.worker in (0, 1, 2)
    case = ", ".join(undisturbed[AT][3]) if stage == "transforming" else None
    assert error.case == case
    assert str(error) == (
        f"{error.exception_type}: ('case_012.b2nd', 4096), raised in worker loader-{error.worker} (pid {error.pid}) "
        f"while {stage} the batch of ticket {AT}{f' (case {case})' if case else ''}."
    )
    assert isinstance(error.__cause__, RemoteTraceback)
    assert "in half_read\n" in error.__cause__.text
    assert error.__cause__.text.startswith("Traceback (most recent call last):\n")
    assert error.__cause__.text.rstrip().endswith("HalfReadError: ('case_012.b2nd', 4096)")


def test_the_remote_traceback_has_its_own_causes(undisturbed: list[Any]) -> None:
    with _failing(chained, "loading", undisturbed) as augmenter:
        error = _first_error(augmenter, undisturbed)
    assert "KeyError: 'case_012.b2nd'" in str(error.__cause__)
    assert "was the direct cause of the following exception" in str(error.__cause__)
    assert str(error).startswith("ValueError: can't read the case, raised in worker")


@pytest.mark.parametrize(
    ("fail", "message", "exception"),
    [
        (no_reduce, r"NoReduceError: first, raised in", None),
        (no_unpickle, r"NoUnpickleError: file:3, raised in", None),
        (no_str, r"NoStrError: \(its __str__ raised RuntimeError\), raised in", NoStrError),
        (rude_str, r"RudeStrError: \(its __str__ raised SystemExit\), raised in", RudeStrError),
        (system_exit, r"SystemExit: 3, raised in", SystemExit),
        (keyboard_interrupt, r"KeyboardInterrupt, raised in", KeyboardInterrupt),
        (not_an_error, r"NotAnErrorError: base, raised in", NotAnErrorError),
        (deep, r"RecursionError: maximum recursion depth exceeded.*, raised in", RecursionError),
        (of_workers_only, r"LocalError: local, raised in", None),
    ],
)
@pytest.mark.parametrize("stage", ["loading", "transforming"])
def test_awkward_exceptions(
    fail: Callable[[], None], message: str, exception: type | None, stage: str, undisturbed: list[Any]
) -> None:
    with _failing(fail, stage, undisturbed) as augmenter:
        error = _first_error(augmenter, undisturbed)
        report = augmenter.report()
    with pytest.raises(WorkerError, match=message):
        raise error
    assert type(error.exception) is exception if exception else error.exception is None or fail is of_workers_only
    assert f"in {fail.__name__}\n" in str(error.__cause__)
    assert (report.restarts, report.incident_counts.get("worker-death", 0)) == (0, 0)


def test_a_huge_exception_is_shortened_but_keeps_its_frames(undisturbed: list[Any]) -> None:
    with _failing(large, "loading", undisturbed) as augmenter:
        error = _first_error(augmenter, undisturbed)
    assert str(error).startswith("ValueError: begins here xxx")
    assert len(str(error)) < 2000
    assert "in large\n" in str(error.__cause__)
    assert len(str(error.__cause__)) < 100_000
    assert error.exception is None, "described, not sent"


def test_a_stop_iteration_of_the_transform_is_a_bug_not_an_end(undisturbed: list[Any]) -> None:
    with _failing(stop_iteration, "transforming", undisturbed) as augmenter:
        error = _first_error(augmenter, undisturbed)
    assert str(error).startswith("StopIteration, raised in worker")


def test_every_further_next_raises_the_same_and_close_leaves_nothing(undisturbed: list[Any]) -> None:
    augmenter = _failing(half_read, "loading", undisturbed)
    with augmenter:
        error = _first_error(augmenter, undisturbed)
        workers = [worker.pid for worker in augmenter.workers()]
        frames = []
        for _ in range(3):
            with pytest.raises(WorkerError) as again:
                next(augmenter)
            assert again.value is error
            frames.append(len(again.traceback))
        assert frames[0] == frames[2], "the traceback does not grow"
        wait_until(lambda: augmenter.workers() == () or all(worker.pid is None for worker in augmenter.workers()))
        report = augmenter.report()
        assert (report.batches, report.next_ticket) == (AT, AT + 1), "what failed was raised, not delivered"
    assert not any(psutil.pid_exists(pid) for pid in workers if pid is not None)


def test_after_an_exception_the_stream_can_be_restarted(undisturbed: list[Any]) -> None:
    with SafeAugmenter(RandomLoader(), None, 1, 2, seed=7) as augmenter:
        expected = [fingerprint(next(augmenter)) for _ in range(AT + 3)]
    with _failing(half_read, "loading", undisturbed) as augmenter:
        _first_error(augmenter, undisturbed)
        augmenter._finish()
        assert [fingerprint(next(augmenter)) for _ in range(2)] == expected[AT + 1 :]


@pytest.mark.parametrize("method", ["clean", "forked"])
def test_an_exception_at_the_start(method: str, undisturbed: list[Any]) -> None:
    with _failing(half_read, "starting", undisturbed, start_method=method) as augmenter:
        with pytest.raises(StartError) as caught:
            next(augmenter)
        with pytest.raises(StartError):
            next(augmenter)
    assert str(caught.value).startswith("no worker of pool 'loader' can start: ")
    assert "HalfReadError: ('case_012.b2nd', 4096). The loader or one of its parts raised this" in str(caught.value)
    assert "in half_read\n" in str(caught.value.__cause__)
    assert "in set_thread_id\n" in str(caught.value.__cause__)


class NotLoadable(RandomLoader):
    def __setstate__(self, state: object) -> None:
        raise ValueError("only in the trainer")


def test_a_loader_that_is_not_loadable_is_said_so_where_forking_is_forbidden() -> None:
    with (
        SafeAugmenter(NotLoadable(), None, 1, 1, start_method="clean") as augmenter,
        pytest.raises(StartError, match=r"can start: ValueError: only in the trainer\.") as caught,
    ):
        next(augmenter)
    assert "in __setstate__\n" in str(caught.value.__cause__)


def test_our_errors_survive_pickling(undisturbed: list[Any]) -> None:
    """Under DDP, errors travel between processes."""
    with _failing(half_read, "loading", undisturbed) as augmenter:
        error = _first_error(augmenter, undisturbed)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is WorkerError and str(again) == str(error) and again.ticket == AT


def test_what_a_user_sees(tmp_path: Path) -> None:
    source = """
    class Loader(RandomLoader):
        def __next__(self):
            return self.read(super().__next__())

        def read(self, batch):
            raise KeyError("case_012 has no label file")

    try:
        for batch in SafeAugmenter(Loader(), None, 2, 2):
            pass
    finally:
        print("cleaned up", file=sys.stderr)
    """
    ended = scripts.run(tmp_path, source)
    assert ended.code == 1
    lines = ended.err.rstrip().splitlines()
    assert lines[0] == "cleaned up"
    assert lines[-1].startswith(
        "safeloader.errors.WorkerError: KeyError: 'case_012 has no label file', raised in worker"
    )
    assert lines[-1].endswith("while loading the batch of ticket 0.")
    assert ended.err.count("Traceback (most recent call last):") == 2, "the worker's, then the trainer's"
    remote, _, local = ended.err.partition("The above exception was the direct cause of the following exception:")
    assert 'raise KeyError("case_012 has no label file")' in remote
    assert "in read\n" in remote
    assert "for batch in SafeAugmenter(Loader(), None, 2, 2):" in local
    assert issubclass(WorkerError, SafeLoaderError) and issubclass(WorkerError, RuntimeError)
