"""The pool that validation exports through, without nnU-Net: its processes are killed, stopped, and starved."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from safeloader.errors import ExportError, RemoteTraceback
from safeloader.faults import memory
from safeloader.faults.cpus import CpuBudget
from safeloader.faults.incident import Incident
from safeloader.faults.memory import MemoryBudget
from safeloader.nnunet.export import pool as export_pool
from safeloader.nnunet.export.call import Brief
from safeloader.nnunet.export.pool import Told
from safeloader.nnunet.export.standin import Multiprocessing, Result, SafePool
from safeloader.testing import wait_until
from tests import export_jobs, scripts

SHAPE = (3, 40, 50, 60)
TOTAL = "360000"


class Validation:
    """One pool, what it said, and where its files go."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "validation"
        self.folder.mkdir()
        self.orders = export_jobs.orders(folder)
        self.said: list[str] = []
        self.incidents: list[Incident] = []
        self.exported: list[str] = []
        self.multiprocessing: Any = None

    def pool(self, processes: int = 1, timeout_s: float | None = None) -> SafePool:
        told = Told(self.said.append, self.incidents.append, self._exported)
        self.multiprocessing = Multiprocessing(CpuBudget(2, "the reason"), told, timeout_s)
        pool: SafePool = self.multiprocessing.get_context("spawn").Pool(processes)
        return pool

    def _exported(self, brief: Brief, files: list[Path]) -> None:
        assert [file.name for file in files] == [f"{brief.case}.txt"]
        self.exported.append(brief.case)

    def export(self, pool: SafePool, case: str) -> Result:
        arguments = (torch.ones(SHAPE), {}, self.orders, str(self.folder / case))
        return pool.starmap_async(export_jobs.export, (arguments,))

    @property
    def files(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in sorted(self.folder.iterdir())}

    @property
    def times(self) -> list[tuple[str, float, float]]:
        path = self.orders.folder.parent / "times.jsonl"
        return [tuple(json.loads(line)) for line in path.read_text().splitlines()]


@pytest.fixture
def validation(tmp_path: Path) -> Iterator[Validation]:
    made = Validation(tmp_path)
    yield made
    if made.multiprocessing is not None:
        made.multiprocessing.close()


def _whole(*cases: str) -> dict[str, str]:
    return {f"{case}.txt": TOTAL for case in cases}


def test_a_killed_export_is_done_again_alone(validation: Validation) -> None:
    validation.orders.give("kill", "a")
    pool = validation.pool(processes=2)
    results = [validation.export(pool, case) for case in "abcde"]
    assert len(pool._pool) == 2 and all(seat.is_alive() for seat in pool._pool)
    done = [result.get()[0] for result in results]
    assert all(result.ready() for result in results)
    assert validation.files == _whole(*"abcde"), "and no folder of ours"
    assert all(pid != os.getpid() and threads == 8 for pid, threads in done)
    assert sorted(validation.exported) == list("abcde")
    [(_, began, _)] = [entry for entry in validation.times if entry[0] == "a"]
    assert all(ended < began for case, _, ended in validation.times if case != "a")
    [line] = validation.said
    [incident] = validation.incidents
    assert line == (
        f"SafeLoader: the export of case a: the process (pid {incident.pid}) was killed by SIGKILL after "
        f"{incident.stage_s:.1f} s; it is done again, alone (if memory is short, fewer exports at a time take less of "
        "it (nnUNet_def_n_proc))."
    )
    assert (incident.kind, incident.signal, incident.case) == ("export-death", "SIGKILL", "a")


def test_what_is_killed_twice_is_done_in_the_trainer(validation: Validation) -> None:
    for _ in range(2):
        validation.orders.give("kill", "a")
    pool = validation.pool()
    results = [validation.export(pool, case) for case in "ab"]
    assert results[0].get() == [(os.getpid(), 1)], "with one thread"
    assert results[1].get()[0][0] != os.getpid()
    assert validation.files == _whole("a", "b")
    assert validation.said[1].endswith(
        "that was the second time (if memory is short, fewer exports at a time take less of it (nnUNet_def_n_proc))."
    )
    assert validation.said[2:] == [
        "SafeLoader: the export of case a is done in the training process, with one thread",
    ]


def test_not_in_the_trainer_if_its_memory_does_not_suffice(
    validation: Validation, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget = MemoryBudget(1 << 20, "the cgroup allows 8.0 GiB, of which 8.0 GiB are used")
    monkeypatch.setattr(memory, "available", lambda: budget)
    for _ in range(2):
        validation.orders.give("kill", "a")
    pool = validation.pool()
    results = [validation.export(pool, case) for case in "ab"]
    with pytest.raises(ExportError) as raised:
        results[0].get()
    assert raised.value.cases == ("a",)
    tried = "; then ".join(
        f"its process was killed by SIGKILL after {incident.stage_s:.1f} s" for incident in validation.incidents
    )
    # 3 × 40 × 50 × 60 voxels before resampling, as many after it, 8 bytes each
    assert str(raised.value) == (
        f"1 of 2 jobs of the validation failed: the export of case a: {tried}, and in the training process it would "
        "take at least 5 MiB, but the cgroup allows 8.0 GiB, of which 8.0 GiB are used. Give the job more memory. "
        "What is done is kept: once the cause is gone, run nnUNetv2_train again with --val, which makes only what is "
        "missing"
    )
    assert validation.files == _whole("b")


@pytest.mark.parametrize(
    ("deed", "why"),
    [
        ("stop", "had not finished after 2 s and was ended"),
        ("crash", "was killed by SIGSEGV after"),
    ],
)
def test_what_would_hang_or_crash_the_trainer_is_not_tried_there(deed: str, why: str, validation: Validation) -> None:
    for _ in range(2):
        validation.orders.give(deed, "twice")
    pool = validation.pool(timeout_s=2)
    results = [validation.export(pool, case) for case in ("never", "twice")]
    assert results[0].get()
    with pytest.raises(ExportError, match=f"the export of case twice: its process {why}.*, for the second time"):
        results[1].get()
    assert validation.files == _whole("never")
    assert len(validation.incidents) == 2
    assert all("export_jobs.py" in (incident.stacks or "") for incident in validation.incidents)


def test_an_exception_is_raised_when_all_others_are_done(validation: Validation) -> None:
    validation.orders.give("disk full", "a")
    pool = validation.pool()
    results = [validation.export(pool, case) for case in "abc"]
    with pytest.raises(ExportError) as raised:
        results[0].get()
    assert str(raised.value).startswith(
        "1 of 3 jobs of the validation failed: the export of case a: OSError: [Errno 28] No space left on device. What"
    )
    assert isinstance(raised.value.__cause__, RemoteTraceback)
    assert "in run_out_of_disk" in str(raised.value.__cause__)
    assert validation.files == _whole("b", "c")
    assert not validation.incidents, "nobody died"


def test_what_ran_out_of_memory_is_done_again_alone(validation: Validation) -> None:
    validation.orders.give("no memory", "a")
    pool = validation.pool()
    assert validation.export(pool, "a").get()[0][0] != os.getpid()
    assert validation.files == _whole("a")
    [line] = validation.said
    assert "ran out of memory (MemoryError: Unable to allocate 12.0 GiB); it is done again, alone" in line


def test_a_death_between_two_jobs_is_nobodys_fault(validation: Validation) -> None:
    pool = validation.pool()
    [(pid, _)] = validation.export(pool, "a").get()
    os.kill(pid, signal.SIGKILL)
    [(second, _)] = validation.export(pool, "b").get()
    assert second not in (pid, os.getpid())
    assert validation.files == _whole("a", "b")


def test_without_any_process_the_trainer_does_it(validation: Validation, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(export_pool, "ExportProcess", refuse)
    assert validation.export(validation.pool(), "a").get() == [(os.getpid(), 1)]
    assert validation.files == _whole("a")
    assert validation.said[0] == (
        "SafeLoader: no process for the validation's exports could be started: [Errno 11] Resource temporarily "
        "unavailable"
    )


def test_the_evaluation_goes_on_with_the_same_processes(validation: Validation) -> None:
    pool = validation.pool(processes=12)
    assert validation.said == ["SafeLoader: 2 export processes instead of 12: the reason"]
    [(pid, _)] = validation.export(pool, "a").get()
    with validation.multiprocessing.get_context("spawn").Pool(24) as again:
        assert again.map(export_jobs.pid_of, [1]) == [pid]
        validation.orders.give("kill", "a.txt")
        calls = [(str(validation.folder / "a.txt"), validation.orders)] * 3
        assert again.starmap(export_jobs.evaluate, calls) == [TOTAL] * 3
    assert "the evaluation of a.txt: the process" in validation.said[1]


def test_other_names_are_the_real_modules(validation: Validation) -> None:
    validation.pool()
    assert validation.multiprocessing.cpu_count() == os.cpu_count()


TRAINER = """
from safeloader.faults.cpus import CpuBudget
from safeloader.nnunet.export.pool import Told
from safeloader.nnunet.export.standin import Multiprocessing
from tests import export_jobs

made = Multiprocessing(CpuBudget(1, ""), Told(print, print, print), None)
pool = made.get_context("spawn").Pool(1)
"""


def test_no_process_outlives_the_trainer(tmp_path: Path) -> None:
    mark = tmp_path / "pid"
    script = tmp_path / "validate.py"
    script.write_text(TRAINER + f"pool.map(export_jobs.sleep_for_ever, [{str(mark)!r}])")
    environment = {**os.environ, "PYTHONPATH": str(scripts.ROOT)}
    trainer = subprocess.Popen([sys.executable, str(script)], env=environment)
    try:
        wait_until(lambda: mark.exists() and bool(mark.read_text()), timeout_s=60)
    finally:
        trainer.kill()
        trainer.wait()
    pid = int(mark.read_text())
    wait_until(lambda: not psutil.pid_exists(pid), timeout_s=5)


def test_predictions_do_not_go_through_dev_shm(tmp_path: Path) -> None:
    source = """
import os, torch
assert os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize == 1 << 20
prediction = torch.ones((3, 200, 200, 100))  # 48 MB
folder = __import__("pathlib").Path(__import__("sys").argv[1])
arguments = (prediction, {}, export_jobs.orders(folder), str(folder / "case"))
pool.starmap(export_jobs.export, [arguments])
made.close()
assert os.listdir("/dev/shm") == [] and (folder / "case.txt").read_text() == "12000000"
"""
    in_docker = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$@"', "sh"]
    if subprocess.run([*in_docker, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs a mount namespace of its own (unshare -m)")
    script = tmp_path / "validate.py"
    script.write_text(TRAINER + source)
    environment = {**os.environ, "PYTHONPATH": str(scripts.ROOT)}
    ended = subprocess.run(
        [*in_docker, sys.executable, str(script), str(tmp_path)],
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr


def test_the_pool_can_be_closed_in_the_middle(validation: Validation) -> None:
    validation.orders.give("stop", "a")
    pool = validation.pool()
    results = [validation.export(pool, case) for case in "abc"]
    wait_until(lambda: not any(validation.orders.folder.iterdir()), timeout_s=60)
    [pid] = validation.multiprocessing.export_pool.pids
    validation.multiprocessing.close()
    assert not psutil.pid_exists(pid) and validation.files == {}
    assert results[0].ready(), "and nobody waits for what will not come"
