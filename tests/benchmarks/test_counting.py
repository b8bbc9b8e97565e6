"""What the benchmarks count: memory, each page once; workers up to all cores; who takes part."""

from __future__ import annotations

import ctypes
import mmap
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from benchmarks.common import command
from benchmarks.memory import Used, parsed, shared_files_mb, used
from benchmarks.peers import PEERS, chosen
from benchmarks.scaling import worker_counts

NBYTES = 8 << 20
MB = NBYTES / 1e6

_MAPS_IT = """
import mmap, sys
memory = mmap.mmap(int(sys.argv[1]), int(sys.argv[2]))
memory[:: mmap.PAGESIZE]
print("mapped", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def written() -> Iterator[int]:
    """The descriptor of a memory file whose pages are all there, and that nobody maps."""
    fd = os.memfd_create("test-counting")
    os.write(fd, b"x" * NBYTES)
    yield fd
    os.close(fd)


@pytest.fixture
def another_process(written: int) -> Iterator[int]:
    """The pid of one that has the file open, and has read all of it through a mapping."""
    command = [sys.executable, "-c", _MAPS_IT, str(written), str(NBYTES)]
    process = subprocess.Popen(command, pass_fds=[written], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with process:
        assert process.stdout is not None and process.stdout.readline() == b"mapped\n"
        yield process.pid
        assert process.stdin is not None
        process.stdin.close()


def test_a_rollup_is_read_in_mb_of_a_million_bytes() -> None:
    text = "5-7 ---p 0 00:00 0 [rollup]\nPss: 1000 kB\nPss_Shmem: 250 kB\nPrivate_Clean: 1 kB\nPrivate_Dirty: 2 kB\n"
    assert parsed(text) == Used(pss=1.024, shared=0.256, private=0.003)


def test_a_process_that_has_ended_is_left_out() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert used(process.pid) is None
    assert shared_files_mb([process.pid]) == 0


def test_pages_that_nobody_maps_are_counted(written: int) -> None:
    with_it = shared_files_mb([os.getpid()])
    os.ftruncate(written, 0)
    assert with_it - shared_files_mb([os.getpid()]) == pytest.approx(MB)


def test_pages_that_two_processes_have_are_counted_once(another_process: int) -> None:
    assert shared_files_mb([another_process]) == pytest.approx(MB)
    both, alone = shared_files_mb([os.getpid(), another_process]), shared_files_mb([os.getpid()])
    assert both == pytest.approx(alone)


def test_pss_divides_them(another_process: int, written: int) -> None:
    before = used(another_process)
    with mmap.mmap(written, NBYTES) as memory:
        assert memory[:: mmap.PAGESIZE]
        shared = used(another_process)
    assert before is not None and shared is not None
    assert before.shared - shared.shared == pytest.approx(MB / 2, rel=0.01)


def test_a_mapping_whose_descriptor_is_closed_is_counted() -> None:
    before = shared_files_mb([os.getpid()])
    libc = ctypes.CDLL(None)
    libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 4]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    fd = os.memfd_create("test-counting")
    os.ftruncate(fd, NBYTES)
    address = libc.mmap(None, NBYTES, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED, fd, 0)  # mmap.mmap keeps one
    os.close(fd)
    ctypes.memset(address, 1, NBYTES)
    try:
        assert shared_files_mb([os.getpid()]) - before == pytest.approx(MB)
    finally:
        libc.munmap(address, NBYTES)


@pytest.mark.parametrize(("cores", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])])
def test_workers_are_powers_of_two_and_all_cores(cores: int, counts: list[int]) -> None:
    assert worker_counts(cores) == counts


def test_who_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(PEERS, "Ray Data", raising=False)
    assert chosen("stock,Ray Data,memcpy", "memcpy") == ["stock", "memcpy"]


def test_a_name_that_nobody_has_is_refused() -> None:
    with pytest.raises(ValueError, match="there is no stcok, only stock, safeloader"):
        chosen("stcok,safeloader")


def test_a_command_has_the_sizes_that_are_not_the_usual_ones() -> None:
    full = {"rounds": 5, "contestants": "all", "batches": 7}
    sizes = {"rounds": 5, "contestants": "stock,torch DataLoader", "batches": 8}
    assert command("speed", full, full) == "python -m benchmarks.speed"
    assert command("speed", sizes, full) == (
        "python -m benchmarks.speed --contestants 'stock,torch DataLoader' --batches 8"
    )
