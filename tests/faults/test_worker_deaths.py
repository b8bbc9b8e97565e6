"""The fault table, part one: ways for a worker to die × the stage in which it dies.

Each strikes once. The replacement makes the lost batches again, the stream is the same as undisturbed, and the
incident says what happened, to whom, in which stage and on which ticket, and what to do.
"""

from __future__ import annotations

import functools
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from safeloader import SafeAugmenter
from safeloader.errors import BatchNotPicklableError, RestartLimitError, StartError
from safeloader.testing import wait_until
from tests import loaders, scripts
from tests.loaders import Deadly, DeadlyOncePerBatch, DeadlyOnceTold, RandomLoader, Saboteur, fingerprint
from tests.processes import children

pytestmark = pytest.mark.usefixtures("warm_nursery")

BATCHES = 20
WORKERS = 2


@dataclass(frozen=True)
class Death:
    """One way to die: what is done, what the kernel says, and the advice that must come with it."""

    deed: Callable[[], object]
    advice: str
    signal: str | None = None
    exit_code: int | None = None

    @property
    def what(self) -> str:
        return f"was killed by {self.signal}" if self.signal else f"exited with code {self.exit_code}"


def by_signal(number: signal.Signals, advice: str) -> Death:
    return Death(functools.partial(loaders.send_self, int(number)), advice, signal=number.name)


DEATHS = {
    "kill -9": by_signal(signal.SIGKILL, r"SIGKILL: .*OOM-kill counters did not rise, so .* from outside: .*"),
    "a null read": Death(loaders.read_null, r"SIGSEGV: .*read invalid memory.*", signal="SIGSEGV"),
    "a truncated mmap": Death(
        loaders.read_truncated_mmap, r"SIGBUS: .*became shorter.*check the preprocessed files.*",
        signal="SIGBUS",
    ),
    "abort": Death(os.abort, r"SIGABRT: usually native code that gave up.*", signal="SIGABRT"),
    "a double free": Death(loaders.free_twice, r"SIGABRT: .*heap is corrupted.*", signal="SIGABRT"),
    "a polite request": by_signal(signal.SIGTERM, r"SIGTERM: something asked it to end: a scheduler.*"),
    "a CPU limit": by_signal(signal.SIGXCPU, r"SIGXCPU: its CPU time limit is used up.*"),
    "a signal without a name": Death(
        functools.partial(loaders.send_self, signal.SIGRTMIN + 7), "", signal=f"signal {signal.SIGRTMIN + 7}"
    ),
    "an exit": Death(functools.partial(os._exit, 3), r"What to do: something .* called exit.*", exit_code=3),
    "an exit without error": Death(functools.partial(os._exit, 0), "", exit_code=0),
}  # fmt: skip
STAGES = ("starting", "loading", "transforming", "encoding")


@pytest.fixture(scope="module")
def undisturbed(warm_nursery: None) -> list[object]:
    with SafeAugmenter(RandomLoader(), None, 1, 2, seed=7) as augmenter:
        return [fingerprint(next(augmenter)) for _ in range(2 * BATCHES)]


def _sabotaged(deed: Callable[[], object], stage: str, folder: Path, **options: object) -> SafeAugmenter:
    saboteur = Saboteur(deed, stage, folder / "struck")
    return SafeAugmenter(saboteur, Saboteur.transform, WORKERS, 2, seed=7, **options)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", DEATHS)
def test_a_death_costs_no_batch(name: str, stage: str, tmp_path: Path, undisturbed: list[object]) -> None:
    death = DEATHS[name]
    with _sabotaged(death.deed, stage, tmp_path) as augmenter:
        batches = [fingerprint(next(augmenter)) for _ in range(BATCHES)]
        wait_until(lambda: augmenter.report().restarts > 0)
        report = augmenter.report()
    assert batches == undisturbed[:BATCHES]
    assert (tmp_path / "struck").exists()
    assert (report.restarts, report.incident_counts) == (1, {"worker-death": 1})
    (incident,) = report.incidents
    assert (incident.signal, incident.exit_code) == (death.signal, death.exit_code)
    assert (incident.stage, incident.incarnation, incident.pool) == (stage, 0, "loader")
    who = rf"worker loader-{incident.worker} \(pid {incident.pid}\) {re.escape(death.what)}"
    if stage == "starting":
        assert incident.ticket is None
        expected = rf"{who} while starting: replaced at once\."
    else:
        assert incident.ticket is not None
        doing = rf"{stage} the batch of ticket {incident.ticket}( \(case [\w, ]+\))? for \d+\.\d s"
        later = r", the one in hand after 0\.5 s" if death.signal == "SIGBUS" else ""
        expected = rf"{who} while {doing}: replaced at once, tickets? {incident.ticket}(, \d+)? made again{later}\."
    assert re.fullmatch(expected + (f" {death.advice}" if death.advice else ""), incident.message), incident.message


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGTERM])
def test_a_death_while_idle_costs_no_batch(number: signal.Signals, undisturbed: list[object]) -> None:
    """Killed from outside while the ring is full."""
    with SafeAugmenter(RandomLoader(), None, WORKERS, 2, seed=7) as augmenter:
        batches = [fingerprint(next(augmenter)) for _ in range(5)]
        wait_until(lambda: all(worker.state == "ready" for worker in augmenter.workers()))
        wait_until(lambda: augmenter.report().slots == {"free": 0, "filling": 0, "ready": 6, "leased": 0})
        wait_until(lambda: all(worker.stage == "idle" for worker in augmenter.workers()))
        victim = augmenter.workers()[1]
        assert victim.pid is not None
        os.kill(victim.pid, number)
        wait_until(lambda: augmenter.workers()[1].incarnation == 1 and augmenter.workers()[1].state == "ready")
        batches += [fingerprint(next(augmenter)) for _ in range(BATCHES - 5)]
        report = augmenter.report()
    assert batches == undisturbed[:BATCHES]
    (incident,) = report.incidents
    assert (incident.pid, incident.stage, incident.ticket) == (victim.pid, "idle", None)
    assert incident.message.startswith(
        f"worker loader-1 (pid {victim.pid}) was killed by {number.name} while idle: replaced at once. {number.name}: "
    )


# ---- the kernel's own ----


OOM = """
from safeloader.testing import wait_until
from tests.loaders import Saboteur, fingerprint, use_4_gib
from pathlib import Path

cgroup, folder = Path({cgroup!r}), Path({folder!r})
(cgroup / "cgroup.procs").write_text(str(os.getpid()))
with SafeAugmenter(RandomLoader(), None, 1, 2, seed=7) as augmenter:
    undisturbed = [fingerprint(next(augmenter)) for _ in range(20)]
for stage in ("starting", "loading", "transforming", "encoding"):
    saboteur = Saboteur(use_4_gib, stage, folder / stage)
    with SafeAugmenter(saboteur, Saboteur.transform, 2, 2, seed=7, grow_back_s=0.5) as augmenter:
        assert [fingerprint(next(augmenter)) for _ in range(20)] == undisturbed
        # So little memory for two: one begins and is measured, and then there is no other to go on without.
        wait_until(lambda: stage == "starting" or augmenter.report().incident_counts.get("recovery") == 1)
        wait_until(lambda: all(worker.state == "ready" for worker in augmenter.workers()))
        print(stage, *(incident.kind for incident in augmenter.report().incidents))
        print(augmenter.report().incidents[0].message)
        print(augmenter.report().incidents[0].figures["cgroup_limit_nbytes"])
"""


def test_a_real_oom_kill_costs_no_batch(tmp_path: Path, small_memory: Path) -> None:
    """The stream goes on, the same, with one worker less; after a quiet time, with as many as before."""
    source = OOM.format(cgroup=str(small_memory), folder=str(tmp_path))
    ended = scripts.run(tmp_path, source, timeout_s=120)
    assert ended.code == 0, ended.err
    lines = ended.out.splitlines()
    counter = re.escape(str(small_memory / "memory.oom_control"))
    for number, stage in enumerate(STAGES):
        kinds, message, limit = lines[3 * number : 3 * number + 3]
        assert kinds == f"{stage} oom-kill" + (" degrade recovery" if stage != "starting" else "")
        assert re.match(
            rf"worker loader-\d \(pid \d+\) was killed by the kernel's OOM killer \(the OOM-kill counter of its cgroup "
            rf"\({counter}\) rose from {number} to {number + 1}; the limit there is 2\.0+ GiB\) while {stage}.*: (not "
            r"replaced|replaced at once).*\. What to do: give the job more memory",
            message,
        ), message
        assert limit == str(2 << 30)
    assert "1 worker from here on, instead of 2: memory ran out." in ended.err


def test_a_kernel_that_forks_no_more(undisturbed: list[object]) -> None:
    """As with RLIMIT_NPROC: the one worker that there is goes on alone, and the other comes when it can."""
    cgroup = Path("/sys/fs/cgroup/pids") / f"safeloader-test-{os.getpid()}"
    (nursery,) = children("sl-nursery")
    try:
        cgroup.mkdir()
    except OSError as error:
        pytest.skip(f"needs a pids cgroup (v1) that this user may create: {error}")
    try:
        (cgroup / "cgroup.procs").write_text(str(nursery.pid))
        (cgroup / "pids.max").write_text(str(int((cgroup / "pids.current").read_text()) + 1))
        with SafeAugmenter(RandomLoader(), None, 2, 2, seed=7, backoff_max_s=0.1, grow_back_s=1) as augmenter:
            batches = [fingerprint(next(augmenter))]
            wait_until(lambda: augmenter.report().incident_counts.get("degrade") == 1)
            *refusals, degrade = augmenter.report().incidents
            incident = refusals[-1]
            assert len(refusals) >= 5
            assert "1 worker from here on, instead of 2: a worker dies again and again" in degrade.message
            assert (incident.pid, incident.stage, incident.signal, incident.exit_code) == (None, "starting", None, None)
            assert re.fullmatch(
                rf"worker loader-{incident.worker} could not be forked: \[Errno 11\] Resource temporarily unavailable "
                r"while starting: not replaced\. What to do: .* `ulimit -u`, the cgroup's "
                r"pids\.max.*", incident.message,
            )  # fmt: skip
            (cgroup / "pids.max").write_text("max")
            batches += [fingerprint(next(augmenter)) for _ in range(5)]  # it works: one more may be tried
            wait_until(lambda: all(worker.state == "ready" for worker in augmenter.workers()))
            batches += [fingerprint(next(augmenter)) for _ in range(5)]
        assert batches[: 2 * BATCHES] == undisturbed[: len(batches)]
    finally:
        (cgroup.parent / "cgroup.procs").write_text(str(nursery.pid))
        wait_until(lambda: not (cgroup / "cgroup.procs").read_text())
        cgroup.rmdir()


# ---- an exit that is an exception ----


@pytest.mark.parametrize("stage", ["loading", "transforming"])
def test_sys_exit_is_an_exception(stage: str, tmp_path: Path, undisturbed: list[object]) -> None:
    """Which happens once, so the batch is made again."""
    with _sabotaged(functools.partial(sys.exit, "enough"), stage, tmp_path) as augmenter:
        assert [fingerprint(next(augmenter)) for _ in range(BATCHES)] == undisturbed[:BATCHES]
        (incident,) = augmenter.report().incidents
        assert augmenter.report().restarts == 0
    assert (incident.kind, incident.stage, incident.ticket) == ("worker-error", stage, incident.ticket)
    expected = rf"ran into SystemExit: enough while {stage} the batch of ticket \d( \(case .*\))?: made again at once\."
    assert re.search(expected, incident.message)


def test_sys_exit_while_encoding_means_that_the_batch_cannot_be_pickled(tmp_path: Path) -> None:
    with _sabotaged(functools.partial(sys.exit, "enough"), "encoding", tmp_path) as augmenter:
        with pytest.raises(BatchNotPicklableError, match=r"SystemExit: enough\. .* while encoding the batch of ticket"):
            [next(augmenter) for _ in range(BATCHES)]
        assert augmenter.report().restarts == 0


def test_an_exception_at_one_start_is_survived(tmp_path: Path, undisturbed: list[object]) -> None:
    with _sabotaged(functools.partial(sys.exit, "enough"), "starting", tmp_path) as augmenter:
        assert [fingerprint(next(augmenter)) for _ in range(BATCHES)] == undisturbed[:BATCHES]
        wait_until(lambda: augmenter.report().restarts == 1)
        (incident,) = augmenter.report().incidents
    assert "could not start: SystemExit: enough while starting: replaced at once." in incident.message


def test_an_exception_at_every_start_is_raised() -> None:
    started = time.monotonic()
    with (
        SafeAugmenter(Deadly(functools.partial(sys.exit, "enough"), "starting"), None, WORKERS, 2) as augmenter,
        pytest.raises(StartError, match=r"no worker of pool 'loader' can start: SystemExit: enough\."),
    ):
        next(augmenter)
    assert time.monotonic() - started < 5


# ---- several at once, and again ----


def test_all_workers_killed_at_once(undisturbed: list[object]) -> None:
    with SafeAugmenter(RandomLoader(), None, 4, 2, seed=7) as augmenter:
        batches = [fingerprint(next(augmenter)) for _ in range(10)]
        wait_until(lambda: all(worker.state == "ready" for worker in augmenter.workers()))
        killed = {worker.pid for worker in augmenter.workers() if worker.pid is not None}
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        batches += [fingerprint(next(augmenter)) for _ in range(BATCHES - 10)]
        wait_until(lambda: augmenter.report().restarts == 4)
        assert {incident.pid for incident in augmenter.report().incidents} == killed
    assert batches == undisturbed[:BATCHES]


def test_the_replacement_is_killed_as_well(undisturbed: list[object]) -> None:
    with SafeAugmenter(RandomLoader(), None, 1, 2, seed=7, backoff_first_s=0) as augmenter:
        batches = [fingerprint(next(augmenter)) for _ in range(10)]
        for life in range(4):
            wait_until(lambda life=life: augmenter.workers()[0].incarnation == life)  # type: ignore[misc]
            wait_until(lambda: augmenter.workers()[0].pid is not None)
            pid = augmenter.workers()[0].pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        batches += [fingerprint(next(augmenter)) for _ in range(BATCHES - 10)]
        assert [incident.incarnation for incident in augmenter.report().incidents] == [0, 1, 2, 3]
    assert batches == undisturbed[:BATCHES]


@pytest.mark.parametrize("victims", ["workers", "nursery", "both"])
def test_death_during_finish(victims: str) -> None:
    start_method = "clean" if victims == "workers" else "forked"
    augmenter = SafeAugmenter(RandomLoader(), None, 3, 2, start_method=start_method)
    next(augmenter)
    workers = [psutil.Process(worker.pid) for worker in augmenter.workers() if worker.pid is not None]
    nursery = workers[0].parent()
    assert nursery is not None
    for process in {"workers": workers, "nursery": [nursery], "both": [*workers, nursery]}[victims]:
        process.kill()
    started = time.monotonic()
    augmenter._finish()
    assert time.monotonic() - started < 3
    wait_until(lambda: not any(process.is_running() for process in workers), timeout_s=2)


# ---- when to give up ----


def test_a_worker_that_dies_at_every_start_is_given_up_soon() -> None:
    started = time.monotonic()
    with (
        SafeAugmenter(Deadly(loaders.read_null, "starting"), None, WORKERS, 2) as augmenter,
        pytest.raises(RestartLimitError) as caught,
    ):
        next(augmenter)
    assert time.monotonic() - started < 5
    assert re.fullmatch(
        r"pool 'loader' is given up: 13 workers died before any of them was ready, with fewer workers and with each "
        r"way to start them that there is: 13 x SIGSEGV while starting\. Last: worker loader-\d \(pid \d+\) was "
        r"killed by SIGSEGV while starting: not replaced\. SIGSEGV: .*",
        str(caught.value),
    )
    assert [incident.signal for incident in caught.value.incidents] == ["SIGSEGV"] * 13


def test_a_worker_that_dies_on_every_batch_is_given_up() -> None:
    deadly = Deadly(functools.partial(os._exit, 9), "loading")
    with SafeAugmenter(deadly, None, WORKERS, 2, backoff_first_s=0.01) as augmenter:
        with pytest.raises(RestartLimitError) as caught:
            next(augmenter)
        with pytest.raises(RestartLimitError, match=re.escape(str(caught.value))):
            next(augmenter)
        wait_until(lambda: all(worker.pid is None for worker in augmenter.workers()), what="no worker is left")
    assert re.match(
        r"pool 'loader' is given up: 30 workers died without making a batch, with fewer workers and with each way to "
        r"start them that there is: 30 x exit code 9 while loading\. Last: worker loader-\d \(pid \d+\) exited "
        r"with code 9 while loading the "
        r"batch of ticket \d",
        str(caught.value),
    )


def test_a_pool_that_delivers_in_between_is_never_given_up(tmp_path: Path, undisturbed: list[object]) -> None:
    options = {"max_restarts": 8, "backoff_first_s": 0}
    with SafeAugmenter(DeadlyOncePerBatch(tmp_path), None, WORKERS, 2, seed=7, **options) as augmenter:
        assert [fingerprint(next(augmenter)) for _ in range(2 * BATCHES)] == undisturbed
        assert augmenter.report().restarts > 10


def test_batches_that_were_ready_are_delivered_before_the_pool_is_given_up(
    tmp_path: Path, undisturbed: list[object]
) -> None:
    loader = DeadlyOnceTold(tmp_path / "now")
    with SafeAugmenter(loader, None, WORKERS, 2, seed=7, max_restarts=0) as augmenter:
        batches = [fingerprint(next(augmenter))]
        wait_until(lambda: augmenter.report().slots == {"free": 0, "filling": 0, "ready": 6, "leased": 0})
        loader.flag.touch()
        with pytest.raises(
            RestartLimitError, match=r"3 workers died without making a batch.*exit code 5 while loading"
        ):
            batches.extend(fingerprint(next(augmenter)) for _ in range(BATCHES))
    assert len(batches) == 7
    assert batches == undisturbed[: len(batches)]
