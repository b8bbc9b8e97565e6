"""The fault table, part five: what can't even start fails soon, with its own error, and never hangs."""

from __future__ import annotations

import functools
import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from safeloader import SafeAugmenter
from safeloader.errors import ConfigError, RestartLimitError, SafeLoaderError, StartError
from safeloader.testing import wait_until
from tests import loaders, scripts
from tests.loaders import Deadly, RandomLoader, fingerprint

BATCHES = 10


@pytest.fixture(scope="module")
def undisturbed(warm_nursery: None) -> list[object]:
    with SafeAugmenter(RandomLoader(), None, 1, 2, seed=7) as augmenter:
        return [fingerprint(next(augmenter)) for _ in range(BATCHES)]


@pytest.fixture
def running_nursery(warm_nursery: None) -> None:
    """The shared clean nursery, started again if a test before has ended it: its start takes none of a test's limit."""
    with SafeAugmenter(RandomLoader(), None, 1, 1) as augmenter:
        next(augmenter)


class OnlyAtHome(RandomLoader):
    """Does its deed wherever it is unpickled."""

    def __init__(self, deed: Callable[[], object]) -> None:
        super().__init__()
        self.deed = deed

    def __setstate__(self, state: dict[str, Any]) -> None:
        state["deed"]()


class Unpicklable(RandomLoader):
    def __reduce__(self) -> Any:
        raise TypeError("not for travel")


def fail() -> None:
    raise ValueError("no start")


def import_what_is_not_there() -> None:
    import module_of_the_trainer_only  # type: ignore[import-not-found] # noqa: F401


@pytest.mark.usefixtures("warm_nursery")
@pytest.mark.parametrize(
    ("loader", "options", "error", "message"),
    [
        (Deadly(loaders.read_null, "starting"), {}, RestartLimitError, r"x SIGSEGV while starting\. Last: .*SIGSEGV:"),
        (Deadly(fail, "starting"), {}, StartError, r"no worker .* can start: ValueError: no start"),
        (Deadly(functools.partial(os._exit, 3), "starting"), {}, RestartLimitError, r"x exit code 3 while starting"),
        (Unpicklable(), {"start_method": "clean"}, ConfigError, r"can't be sent .* because .*not for travel"),
        (OnlyAtHome(fail), {"start_method": "clean"}, StartError, r"can start: ValueError: no start"),
        (
            OnlyAtHome(import_what_is_not_there),
            {"start_method": "clean"},
            StartError,
            r"ModuleNotFoundError: .*'module_of",
        ),
    ],
    ids=["segfault", "exception", "exit", "unpicklable", "unpickling raises", "module not found"],
)
def test_what_cannot_start_fails_within_5_s(
    loader: RandomLoader, options: dict[str, Any], error: type[SafeLoaderError], message: str
) -> None:
    started = time.monotonic()
    with SafeAugmenter(loader, None, 2, 2, **options) as augmenter, pytest.raises(error, match=message):
        next(augmenter)
    assert time.monotonic() - started < 5


@pytest.mark.usefixtures("warm_nursery")
@pytest.mark.parametrize("deed", [fail, import_what_is_not_there, functools.partial(os._exit, 3)])
def test_what_cannot_be_unpickled_elsewhere_is_forked_from_the_trainer(
    deed: Callable[[], object], undisturbed: list[object]
) -> None:
    with SafeAugmenter(OnlyAtHome(deed), None, 1, 2, seed=7, backoff_first_s=0, backoff_max_s=0) as augmenter:
        assert [fingerprint(next(augmenter)) for _ in range(BATCHES)] == undisturbed
        assert augmenter.report().start_method == "forked"


def test_unpickling_that_kills_the_clean_nursery_ends_with_an_error_that_says_so() -> None:
    loader = OnlyAtHome(functools.partial(loaders.send_self, int(signal.SIGSEGV)))
    with SafeAugmenter(loader, None, 1, 2, start_method="clean", backoff_max_s=0) as augmenter:
        with pytest.raises(RestartLimitError, match=r"was killed by SIGSEGV while it unpickled the loader"):
            next(augmenter)
        assert augmenter.report().incident_counts["nursery-death"] >= 2


# ---- hangs ----


@pytest.mark.usefixtures("running_nursery")
def test_unpickling_that_hangs_is_survived_by_forking_from_the_trainer(undisturbed: list[object]) -> None:
    started = time.monotonic()
    with SafeAugmenter(OnlyAtHome(loaders.sleep_for_ever), None, 2, 2, seed=7, hang_timeout_first_s=4) as augmenter:
        assert [fingerprint(next(augmenter)) for _ in range(BATCHES)] == undisturbed
        incident = augmenter.report().incidents[0]
        assert augmenter.report().start_method == "forked"
    assert time.monotonic() - started < 30
    assert incident.kind == "nursery-death"
    assert re.search(r"the nursery .* did not answer for 4\.\d s and was killed while it unpickled", incident.message)
    assert incident.stderr_tail is not None and "in sleep_for_ever" in incident.stderr_tail


@pytest.mark.usefixtures("running_nursery")
def test_unpickling_that_hangs_in_a_clean_process_alone_is_an_error_with_its_stack() -> None:
    started = time.monotonic()
    options = {"hang_timeout_first_s": 12, "start_method": "clean"}  # the second nursery's imports take seconds
    with (
        SafeAugmenter(OnlyAtHome(loaders.sleep_for_ever), None, 2, 2, **options) as augmenter,
        pytest.raises(StartError, match=r"nursery did not answer for 12\.\d s and was killed .*, twice") as caught,
    ):
        next(augmenter)
    assert "in sleep_for_ever" in str(caught.value.__cause__)
    assert time.monotonic() - started < 40


IMPORT_HANGS = """
import pathlib, tempfile
folder = tempfile.mkdtemp(dir=os.environ["TMPDIR"])
with open(folder + "/torch.py", "w") as file:
    file.write("import time\\ntime.sleep(3600)\\n")
sys.path.insert(0, folder)
started = time.monotonic()
options = dict(hang_timeout_first_s=4, max_restarts=0, backoff_max_s=0)
with SafeAugmenter(RandomLoader(), None, 1, 2, seed=7, **options) as augmenter:
    print(next(augmenter)["draw"])
    print(augmenter.report().start_method, augmenter.report().incidents[0].message)
import shutil; shutil.rmtree(folder)
"""


def test_a_nursery_that_hangs_in_its_imports(tmp_path: Path, undisturbed: list[Any]) -> None:
    ended = scripts.run(tmp_path, IMPORT_HANGS, timeout_s=60)
    assert ended.code == 0, ended.err
    draw, told = ended.out.splitlines()
    assert float(draw) == undisturbed[0][2]
    assert re.match(r"forked the nursery .* did not answer for 4\.\d s and was killed", told), told
    assert "/torch.py" in ended.err, "its stacks are on the screen"


STOPPED = """
import psutil
from safeloader.testing import wait_until
for workers, method in [(1, "clean"), (2, "clean"), (1, "forked"), (2, "forked")]:
    with SafeAugmenter(RandomLoader(), None, workers, 2, seed=7, start_method=method) as augmenter:
        draws = [next(augmenter)["draw"]]
        wait_until(lambda: all(worker.state == "ready" and worker.pid for worker in augmenter.workers()))
        pids = [worker.pid for worker in augmenter.workers()]
        psutil.Process(pids[0]).parent().suspend()
        started = time.monotonic()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        wait_until(lambda: augmenter.report().incident_counts.get("nursery-death") == 1)
        seconds = time.monotonic() - started
        draws += [next(augmenter)["draw"] for _ in range(9)]
        print(workers, method, seconds, draws, sep="|")
"""


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[float, str]]:
    """How long it took until a stopped nursery was given up, and what was drawn; with each number and method."""
    ended = scripts.run(tmp_path_factory.mktemp("stopped"), STOPPED, timeout_s=120)
    assert ended.code == 0, ended.err
    told = [line.split("|") for line in ended.out.splitlines()]
    return {(workers, method): (float(seconds), draws) for workers, method, seconds, draws in told}


@pytest.mark.parametrize("method", ["clean", "forked"])
@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_stopped_nursery_is_replaced_soon(
    workers: str, method: str, stopped: dict[tuple[str, str], tuple[float, str]], undisturbed: list[Any]
) -> None:
    seconds, draws = stopped[workers, method]
    assert draws == str([batch[2] for batch in undisturbed])
    assert seconds < 2.5


def block_forks() -> None:
    os.register_at_fork(before=loaders.sleep_for_ever)


class BlocksForks(RandomLoader):
    """Its unpickling leaves a handler behind that makes every later fork of that process hang."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        block_forks()


@pytest.mark.usefixtures("running_nursery")
def test_a_fork_that_blocks_is_survived_by_forking_from_the_trainer(undisturbed: list[object]) -> None:
    options = {"hang_timeout_first_s": 4, "max_restarts": 0, "backoff_max_s": 0}
    with SafeAugmenter(BlocksForks(), None, 1, 2, seed=7, **options) as augmenter:
        assert [fingerprint(next(augmenter)) for _ in range(BATCHES)] == undisturbed
        assert "did not answer for 4." in augmenter.report().incidents[0].message


def test_the_nursery_dies_while_several_workers_hang(undisturbed: list[object], tmp_path: Path) -> None:
    loader = HangsOnce(tmp_path)
    with SafeAugmenter(loader, None, 3, 2, seed=7, start_method="forked") as augmenter:
        augmenter._start()
        wait_until(lambda: len(list(tmp_path.iterdir())) == 3)
        worker = augmenter.workers()[0].pid
        assert worker is not None
        nursery = psutil.Process(worker).parent()
        assert nursery is not None
        nursery.kill()
        started = time.monotonic()
        assert [fingerprint(next(augmenter)) for _ in range(BATCHES)] == undisturbed
        assert time.monotonic() - started < 5
        assert augmenter.report().incident_counts["nursery-death"] == 1


class HangsOnce(RandomLoader):
    """The first three to make a batch hang."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def __next__(self) -> dict[str, object]:
        for number in range(3):
            try:
                (self.folder / str(number)).touch(exist_ok=False)
            except FileExistsError:
                continue
            loaders.sleep_for_ever()
        return super().__next__()


# ---- limits ----

NO_DESCRIPTORS = """
import gc, resource
from safeloader.errors import SafeLoaderError
from safeloader.testing import wait_until
used = max(int(fd) for fd in os.listdir("/proc/self/fd")) + 1
for more in range(1, 40):
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + more, 4096))
    started = time.monotonic()
    try:
        with SafeAugmenter(RandomLoader(), None, 2, 2, seed=7, start_method="forked") as augmenter:
            for _ in range(10):
                next(augmenter)
    except (SafeLoaderError, OSError) as error:
        assert "Too many open files" in str(error) or "Errno 24" in str(error), error
    else:
        print("enough:", more)
        break
    assert time.monotonic() - started < 10, (more, time.monotonic() - started)
    augmenter = None
    # The supervisor's thread has descriptors until it ends; one that looks how much memory a worker takes, the pool.
    wait_until(lambda: not any(thread.name.startswith("safeloader-") for thread in threading.enumerate()))
    gc.collect()
    left = len(os.listdir("/proc/self/fd"))
    print(more, left)
"""


def test_no_descriptors_left_is_an_error_and_never_a_hang(tmp_path: Path) -> None:
    ended = scripts.run(tmp_path, NO_DESCRIPTORS, timeout_s=240)
    assert ended.code == 0, ended.out + ended.err
    *failures, last = ended.out.splitlines()
    assert last.startswith("enough: ")
    assert failures
    left = [line.split()[1] for line in failures]
    assert len(set(left)) == 1, f"descriptors are lost: {left}"


NO_PROCESSES = """
import resource
from safeloader.errors import SafeLoaderError
import safeloader.pool.nursery  # while the interpreter can still be read
os.setgid(54321)
os.setuid(54321)
resource.setrlimit(resource.RLIMIT_NPROC, ({limit}, {limit}))
started = time.monotonic()
try:
    with SafeAugmenter(RandomLoader(), None, 3, 2, seed=7, backoff_max_s=0.05, start_method={method!r}) as augmenter:
        print([next(augmenter)["draw"] for _ in range(10)])
        print(sorted(augmenter.report().incident_counts))
except Exception as error:
    print(type(error).__name__, error)
print(time.monotonic() - started)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become a user who has no other process")
@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("method", ["forked"])  # a clean one needs an interpreter that everybody may run
def test_no_processes_left(limit: int, method: str, tmp_path: Path, undisturbed: list[Any]) -> None:
    """RLIMIT_NPROC counts threads, too: the trainer, the supervisor, the nursery, and then the workers."""
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    with scripts.Trainer(tmp_path, NO_PROCESSES.format(limit=limit, method=method)) as trainer:
        trainer.temp.chmod(0o777)
        ended = trainer.end(timeout_s=90)
    assert ended.code == 0, ended.err
    first, *_, seconds = ended.out.splitlines()
    assert first != str([batch[2] for batch in undisturbed])
    assert re.search(r"can't start new thread|Resource temporarily unavailable", ended.out), ended.out
    assert float(seconds) < 30
