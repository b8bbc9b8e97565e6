"""How much memory a training's loaders take: SafeLoader beside the stock class and torch's DataLoader.

    python -m benchmarks.memory [--rounds 3] [--train 12] [--drained 60] [--quiet_s 30] [--data full]

As nnU-Net starts them: 12 train and 6 validation workers. Sampled after the first batch of each, after `drained` more
of train and a fifth as many of validation, when all have made what they may make ahead, and `quiet_s` seconds later.

How it is counted, in MB of 10^6 bytes:

* `workers_pss_mb`: the sum of PSS of all loader processes: workers, and whatever helps them. PSS divides each page by
  the processes that map it, so the sum over all of them and the trainer counts it once.
* `trainer_mb`: the trainer's PSS, less what it was before the loaders existed. It is negative where workers are forked
  from the trainer: they take over a part of its pages in the counting. `trainer_shared_mb` is the part of it that is
  shared memory: batches that the trainer has mapped.
* `shared_files_mb`: what is allocated for batches in memory files and `/dev/shm`, each file once, whoever has it open
  or mapped, also where no process has touched the pages, so that no PSS has them.
* `total_mb`: workers and trainer together, and what of the shared files is in no PSS: what a machine has less because
  of the loaders. Pages of files on disk, which the kernel can drop, are in it as far as they are mapped.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure

from benchmarks import brain
from benchmarks.common import Benchmark, Size, Table, median, times
from benchmarks.peers import chosen
from benchmarks.plots import bars, by_contestant
from benchmarks.processes import below
from benchmarks.training import LOADER_SIZES, TINY_LOADER_SIZES, Pools, start, touch_gpu, wait_until_quiet
from safeloader.faults.memory import parse_kb

_MOMENTS = ("first batches", "drained", "rings full", "quiet")
_SHARED_FILE = re.compile(r"^(/memfd:|/dev/shm/)")


@dataclass(frozen=True)
class Row:
    """One sample; the module says what is counted."""

    contestant: str
    round: int
    moment: str
    processes: int
    workers_pss_mb: float
    workers_private_mb: float
    workers_shared_mb: float
    trainer_mb: float
    trainer_shared_mb: float
    shared_files_mb: float
    total_mb: float


@dataclass(frozen=True)
class Used:
    """What `/proc/PID/smaps_rollup` says, in MB; of several processes, the sums."""

    pss: float = 0.0
    shared: float = 0.0
    private: float = 0.0

    def __add__(self, other: Used) -> Used:
        return Used(self.pss + other.pss, self.shared + other.shared, self.private + other.private)

    def __sub__(self, other: Used) -> Used:
        return Used(self.pss - other.pss, self.shared - other.shared, self.private - other.private)


def parsed(rollup: str) -> Used:
    """The text of an `smaps_rollup`; `shared` is PSS in shared memory."""
    nbytes = parse_kb(rollup)
    private = nbytes["Private_Clean"] + nbytes["Private_Dirty"]
    return Used(*(round(value / 1e6, 3) for value in (nbytes["Pss"], nbytes.get("Pss_Shmem", 0), private)))


def used(pid: int) -> Used | None:
    """Of one process; None if it has ended."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return parsed(text) if text else None


def shared_files_mb(pids: Sequence[int]) -> float:
    """What is allocated for the shared memory that these processes have open or mapped, each file once."""
    allocated: dict[tuple[int, int], int] = {}
    for pid in pids:
        for status in _open_shared_files(pid):
            allocated[status.st_dev, status.st_ino] = status.st_blocks * 512
    # A mapping whose file nobody has open any more: at least what is resident in the process that has most of it.
    inodes = {inode for _, inode in allocated}
    mapped: dict[int, int] = {}
    for pid in pids:
        for inode, resident in _mapped_shared_files(pid).items():
            if inode not in inodes:
                mapped[inode] = max(mapped.get(inode, 0), resident)
    return (sum(allocated.values()) + sum(mapped.values())) / 1e6


def _open_shared_files(pid: int) -> Iterator[os.stat_result]:
    try:
        fds = os.listdir(f"/proc/{pid}/fd")
    except (FileNotFoundError, ProcessLookupError):
        return
    for fd in fds:
        path = f"/proc/{pid}/fd/{fd}"
        try:
            if _SHARED_FILE.match(os.readlink(path)):
                yield os.stat(path)
        except (FileNotFoundError, ProcessLookupError):
            continue


def _mapped_shared_files(pid: int) -> dict[int, int]:
    """Resident bytes by inode."""
    try:
        with open(f"/proc/{pid}/smaps") as file:
            lines = file.read().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    found: dict[int, int] = {}
    inode = None
    for line in lines:
        words = line.split()
        if not words[0].endswith(":"):  # the first line of a mapping: address, mode, offset, device, inode, path
            inode = int(words[4]) if len(words) > 5 and _SHARED_FILE.match(words[5]) else None
        elif words[0] == "Rss:" and inode is not None:
            found[inode] = found.get(inode, 0) + int(words[1]) * 1024
    return found


def sample(contestant: str, number: int, moment: str, baseline: Used) -> Row:
    """All processes below this one, and this one less its baseline."""
    me = os.getpid()
    pids = below()
    living = [found for pid in pids if (found := used(pid)) is not None]
    workers, own = sum(living, Used()), used(me)
    assert own is not None
    trainer = own - baseline
    files_mb = shared_files_mb([me, *pids])
    in_no_pss = max(0.0, files_mb - workers.shared - trainer.shared)
    return Row(
        contestant=contestant,
        round=number,
        moment=moment,
        processes=len(living),
        workers_pss_mb=round(workers.pss, 1),
        workers_private_mb=round(workers.private, 1),
        workers_shared_mb=round(workers.shared, 1),
        trainer_mb=round(trainer.pss, 1),
        trainer_shared_mb=round(trainer.shared, 1),
        shared_files_mb=round(files_mb, 1),
        total_mb=round(workers.pss + trainer.pss + in_no_pss, 1),
    )


class Memory(Benchmark[Row]):
    """See the module."""

    name = "memory"
    row = Row
    full: ClassVar[Mapping[str, Size]] = {
        "rounds": 3,
        "contestants": "stock,safeloader,torch DataLoader",
        "drained": 60,
        "quiet_s": 30,
        **LOADER_SIZES,
    }
    tiny: ClassVar[Mapping[str, Size]] = {
        "rounds": 1,
        "contestants": "stock,safeloader",
        "drained": 5,
        "quiet_s": 1,
        **TINY_LOADER_SIZES,
    }

    def prepare(self, sizes: Mapping[str, Any]) -> None:
        """The dataset."""
        brain.workspace(sizes["data"])

    def cases(self, sizes: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Each contestant once."""
        same = {name: sizes[name] for name in (*LOADER_SIZES, "drained", "quiet_s")}
        return [{"contestant": contestant, **same} for contestant in chosen(sizes["contestants"])]

    def measure(self, number: int, **case: Any) -> list[Row]:
        """Sample at each moment."""
        torch.set_num_threads(1)
        contestant = case["contestant"]
        loader = brain.loader(case["data"], case["configuration"])
        touch_gpu()
        next(loader)  # so that what the trainer loads with its first batch is not put down to the loaders
        baseline = used(os.getpid())
        assert baseline is not None
        pools = start(contestant, loader, case["train"])
        rows = []
        for moment in _MOMENTS:
            _come_to(moment, pools, case)
            rows.append(sample(contestant, number, moment, baseline))
        pools.close()
        return rows

    def tables(self, rows: Sequence[Row]) -> list[Table]:
        """A table for each moment."""
        tables = []
        for moment in _MOMENTS:
            lines = []
            for name in dict.fromkeys(row.contestant for row in rows):
                pss, trainer, files, total, count = (
                    median(rows, column, contestant=name, moment=moment)
                    for column in ("workers_pss_mb", "trainer_mb", "shared_files_mb", "total_mb", "processes")
                )
                of_stock = (
                    times(value, median(rows, column, contestant="stock", moment=moment))
                    for value, column in ((pss, "workers_pss_mb"), (total, "total_mb"))
                )
                pss_of_stock, total_of_stock = of_stock
                amounts = (f"{pss:.0f}", pss_of_stock, f"{trainer:+.0f}", f"{files:.0f}", f"{total:.0f}")
                lines.append((name, f"{count:.0f}", *amounts, total_of_stock))
            header = (
                "",
                "processes",
                "their PSS, MB",
                "of stock",
                "trainer, MB",
                "batches, MB",
                "total, MB",
                "of stock",
            )
            tables.append(Table(f"Memory: {_in_words(moment)} (median)", header, tuple(lines)))
        return tables

    def draw(self, rows: Sequence[Row], figure: Figure) -> None:
        """Totals at each moment."""
        for axes, moment in zip(figure.subplots(2, 2).flat, _MOMENTS, strict=True):
            bars(axes, by_contestant(rows, "total_mb", moment=moment), "total, MB (less is better)")
            axes.set_title(_in_words(moment), fontsize=9)
        figure.suptitle("Memory of all loader processes and what they add to the trainer")


def _come_to(moment: str, pools: Pools, case: Mapping[str, Any]) -> None:
    """Do what leads to a moment from the one before it."""
    if moment == "drained":
        for number in range(case["drained"]):
            next(pools.train)
            if number % 5 == 4:
                next(pools.validation)
    elif moment == "rings full":
        wait_until_quiet()
    elif moment == "quiet":
        time.sleep(case["quiet_s"])


def _in_words(moment: str) -> str:
    return {
        "first batches": "after the first batches",
        "drained": "in the middle of training",
        "rings full": "all made ahead that may be",
        "quiet": "nothing asked for, for a while",
    }[moment]


if __name__ == "__main__":
    sys.exit(Memory().main())
