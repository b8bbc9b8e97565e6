"""Nothing of ours needs `/dev/shm` or more descriptors than at the start."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from safeloader import SafeAugmenter
from safeloader.errors import SafeLoaderError
from safeloader.testing import DEADLY, Killer, wait_until
from tests import scripts
from tests.loaders import RandomLoader

IN_DOCKER = ["unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "$@"', "sh"]
"""Runs a command with Docker's default `/dev/shm` of 64 MiB."""

THREE_D = """
class ThreeD(RandomLoader):
    # 26 MB, as of nnU-Net's 3d_fullres: float32 data and int16 target of 2 patches of 128 x 128 x 128.
    def __next__(self):
        return {
            "data": torch.full((2, 1, 128, 128, 128), float(self.thread_id)),
            "target": torch.full((2, 1, 128, 128, 128), self.thread_id, dtype=torch.int16),
        }

def check(batch):
    assert batch["data"].shape == batch["target"].shape == (2, 1, 128, 128, 128)
    assert (batch["data"] == batch["data"][0, 0, 0, 0, 0]).all()
"""


@pytest.fixture(scope="module")
def docker() -> list[str]:
    tried = subprocess.run([*IN_DOCKER, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"needs a mount namespace of its own (unshare -m): {tried.stderr.strip()}")
    return IN_DOCKER


def _command(docker: list[str], folder: Path, source: str) -> list[str]:
    script = folder / "train.py"
    script.write_text(scripts.HEADER + THREE_D + source)
    return [*docker, sys.executable, str(script)]


def test_large_batches_under_a_small_dev_shm(tmp_path: Path, docker: list[str]) -> None:
    source = """
assert os.statvfs("/dev/shm").f_blocks * os.statvfs("/dev/shm").f_frsize == 64 << 20
from tests.ring import in_use

with SafeAugmenter(ThreeD(), None, 2, 2) as augmenter:
    held = []
    for _ in range(20):
        held = [*held[-1:], next(augmenter)]
        check(held[-1])
        assert os.listdir("/dev/shm") == []
    while augmenter.report().slots["ready"] < 4:
        time.sleep(0.01)
    print(sum(in_use(augmenter).values()), augmenter.report().restarts)
"""
    ended = subprocess.run(
        _command(docker, tmp_path, source), capture_output=True, text=True, timeout=90, check=False,
        env=scripts.environment("shm", tmp_path),
    )  # fmt: skip
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "6 0\n", "")


def test_the_stock_class_hangs_or_fails_there(tmp_path: Path, docker: list[str]) -> None:
    """5 batches of 26 MB are more than 64 MiB."""
    source = """
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter

augmenter = NonDetMultiThreadedAugmenter(ThreeD(), None, 2, 2)
print("begins", flush=True)
held = []
for _ in range(20):
    held = [*held[-1:], next(augmenter)]
    check(held[-1])
print("ends", flush=True)
"""
    process = subprocess.Popen(
        _command(docker, tmp_path, source), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env=scripts.environment("stock-shm", tmp_path),
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "begins\n"
        try:
            code = process.wait(15)  # ours takes less than 2 s for this
        except subprocess.TimeoutExpired:
            code = None
        assert code is None or code != 0
    finally:
        for left in scripts.marked("stock-shm"):
            left.kill()
        out, _ = process.communicate(timeout=30)
    assert "ends" not in out


def test_no_process_of_ours_maps_or_opens_anything_in_dev_shm(tmp_path: Path) -> None:
    source = """
    augmenter = SafeAugmenter(RandomLoader((2, 1, 64, 64, 64)), None, 2, 2)
    batches = [next(augmenter) for _ in range(10)]
    print("in position", flush=True)
    signal.pause()
    """
    with scripts.Trainer(tmp_path, source) as trainer:
        trainer.until("in position")
        processes = trainer.processes()
        assert len(processes) == 4, "trainer, nursery, workers"
        for process in processes:
            assert "/dev/shm" not in Path(f"/proc/{process.pid}/maps").read_text()
            folder = f"/proc/{process.pid}/fd"
            assert not [fd for fd in os.listdir(folder) if "/dev/shm" in os.readlink(f"{folder}/{fd}")]
        assert trainer.traces() == []


# ---- descriptors ----


@pytest.fixture
def few_descriptors() -> Iterator[int]:
    """A limit that leaves room for about 40 more than there are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = [int(fd) for fd in os.listdir("/proc/self/fd")]
    limit = max(max(used) + 1, len(used) + 40)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    yield limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_descriptors_stay_constant_whatever_dies(few_descriptors: int) -> None:
    with SafeAugmenter(RandomLoader((1, 1, 4, 4, 4)), None, 2, 2, seed=7, backoff_first_s=0) as augmenter:
        killer = Killer(augmenter, seed=1, signals=DEADLY)
        counts = []
        for number in range(1000):
            batch = next(augmenter)
            killer.maybe(every=20)
            if number % 100 == 99:
                del batch
                wait_until(lambda: all(worker.state == "ready" for worker in augmenter.workers()))
                wait_until(lambda: augmenter.report().slots == {"free": 0, "filling": 0, "ready": 6, "leased": 0})
                counts.append(_descriptors())
        assert len(killer.kills) > 25
        assert augmenter.report().restarts == len({pid for pid, _ in killer.kills})
    assert set(counts) == {counts[0]}


def test_running_out_of_descriptors_is_said_clearly(few_descriptors: int) -> None:
    with (
        SafeAugmenter(RandomLoader((1, 1, 4, 4, 4)), None, 300, 2) as augmenter,
        pytest.raises(
            SafeLoaderError,
            match=r"pool 'loader' can't go on: \[Errno 24\] Too many open files; all of this process's file "
            r"descriptors are in use\. Raise the limit \(`ulimit -n`\), or lower num_processes and num_cached "
            r"\(nnUNet_n_proc_DA\)\.",
        ),
    ):
        [next(augmenter) for _ in range(700)]  # more than its ring: with so many workers, one begins and is measured
