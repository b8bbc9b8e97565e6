"""Memory limits and OOM kills: from recorded `/proc` and `/sys` files, and from the kernel's own where it lets us."""

from __future__ import annotations

import json
import mmap
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from subprocess import PIPE

import psutil
import pytest

from safeloader.faults import memory
from safeloader.faults.memory import MemoryBudget, OomCounters
from safeloader.testing import wait_until

MIB, GIB = 2**20, 2**30

V1_UNLIMITED = "9223372036854771712\n"
V1_MOUNTS = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
33 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
"""
V2_MOUNTS = "29 23 0:26 / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
MEMINFO = """\
MemTotal:       65853012 kB
MemFree:         1853352 kB
MemAvailable:   {available_kb} kB
Buffers:            9508 kB
HugePages_Total:       0
"""
VMSTAT = "nr_free_pages 463338\npgmajfault 371\ndrop_pagecache 0\noom_kill {kills}\nunevictable_pgs_culled 0\n"

SLURM_V1 = "/slurm/uid_1000/job_1/step_0/task_0"
SLURM_V2 = "/system.slice/slurmstepd.scope/job_1/step_0/user/task_0"

Files = dict[str, str]


def v1(
    cgroup: str,
    *,
    limit: int | None = None,
    usage: int = 0,
    cache: tuple[int, int] = (0, 0),
    above: int | None = None,
    kills: int | None = 0,
) -> Files:
    """A v1 cgroup's files; `cache` is inactive and active, `above` the smallest limit further up; in bytes."""
    folder = f"sys/fs/cgroup/memory{cgroup}"
    lowest = min([n for n in (limit, above) if n is not None], default=int(V1_UNLIMITED))
    control = "oom_kill_disable 0\nunder_oom 0\n" + ("" if kills is None else f"oom_kill {kills}\n")
    return {
        f"{folder}/memory.limit_in_bytes": V1_UNLIMITED if limit is None else f"{limit}\n",
        f"{folder}/memory.usage_in_bytes": f"{usage}\n",
        f"{folder}/memory.oom_control": control,
        f"{folder}/memory.stat": "cache 9203712\nrss 7593984\ninactive_file 12288\nactive_file 122880\n"
        f"hierarchical_memory_limit {lowest}\nhierarchical_memsw_limit {V1_UNLIMITED}"
        f"total_cache {sum(cache)}\ntotal_rss 13631488\ntotal_inactive_file {cache[0]}\ntotal_active_file {cache[1]}\n",
    }


def v2(
    cgroup: str,
    *,
    limit: int | None = None,
    high: int | None = None,
    usage: int = 0,
    cache: tuple[int, int] = (0, 0),
    kills: int = 0,
) -> Files:
    """A v2 cgroup's files, as `v1` does."""
    folder = f"sys/fs/cgroup{cgroup}"
    return {
        f"{folder}/memory.max": "max\n" if limit is None else f"{limit}\n",
        f"{folder}/memory.high": "max\n" if high is None else f"{high}\n",
        f"{folder}/memory.current": f"{usage}\n",
        f"{folder}/memory.stat": f"anon 13631488\nfile {sum(cache)}\nkernel 5844992\nshmem 9068544\n"
        f"inactive_file {cache[0]}\nactive_file {cache[1]}\nunevictable 0\n",
        f"{folder}/memory.events": f"low 0\nhigh 0\nmax 17\noom {kills}\noom_kill {kills}\noom_group_kill 0\n",
        f"{folder}/memory.events.local": "low 0\nhigh 0\nmax 0\noom 0\noom_kill 0\noom_group_kill 0\n",
    }


def in_v1(cgroup: str, root: str = "/") -> Files:
    lines = f"12:pids:/user.slice\n11:memory:{cgroup}\n1:name=systemd:/system.slice/slurmd.service\n"
    return {"proc/self/cgroup": lines, "proc/self/mountinfo": V1_MOUNTS.format(root=root)}


def in_v2(cgroup: str) -> Files:
    return {"proc/self/cgroup": f"0::{cgroup}\n", "proc/self/mountinfo": V2_MOUNTS}


def machine(*, available: int = 48 * GIB, kills: int = 3) -> Files:
    meminfo = MEMINFO.format(available_kb=available // 1024)
    return {"proc/meminfo": meminfo, "proc/vmstat": VMSTAT.format(kills=kills)}


@pytest.fixture
def system() -> Iterator[Callable[..., Path]]:
    """Makes a file tree to read instead of the machine's; of two texts for one file the later counts."""
    with tempfile.TemporaryDirectory() as folder:

        def make(*files: Files) -> Path:
            root = Path(tempfile.mkdtemp(dir=folder))
            for name, text in {name: text for some in files for name, text in some.items()}.items():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                (root / name).write_text(text)
            return root

        yield make


System = Callable[..., Path]


# ---- OOM kills ----


def rise(before: Path, after: Path) -> str | None:
    return OomCounters.read(after).risen_since(OomCounters.read(before))


def test_a_kill_in_docker_on_v1_without_a_cgroup_namespace(system: System) -> None:
    here = in_v1("/docker/1f", root="/docker/1f")
    assert rise(
        system(here, v1("", limit=4 * GIB, kills=0), machine(kills=3)),
        system(here, v1("", limit=4 * GIB, kills=1), machine(kills=4)),
    ) == (
        "the OOM-kill counter of its cgroup (/sys/fs/cgroup/memory/memory.oom_control) rose from 0 to 1; "
        "the limit there is 4.0 GiB"
    )


def test_a_kill_in_slurm_on_v1_counts_at_the_task_and_names_the_limit_of_the_job(system: System) -> None:
    job = v1("/slurm/uid_1000/job_1", limit=4 * GIB, usage=4 * GIB)
    around = [in_v1(SLURM_V1), v1("", kills=2), v1("/slurm"), v1("/slurm/uid_1000"), job, machine()]
    around.append(v1("/slurm/uid_1000/job_1/step_0", above=4 * GIB))
    assert rise(
        system(*around, v1(SLURM_V1, above=4 * GIB, kills=0)), system(*around, v1(SLURM_V1, above=4 * GIB, kills=2))
    ) == (
        f"the OOM-kill counter of its cgroup (/sys/fs/cgroup/memory{SLURM_V1}/memory.oom_control) rose from 0 to 2; "
        "the smallest limit on it is 4.0 GiB (/sys/fs/cgroup/memory/slurm/uid_1000/job_1/memory.limit_in_bytes)"
    )


def test_a_limit_that_a_container_cannot_see_is_named(system: System) -> None:
    here = in_v1("/")
    assert rise(system(here, v1("", above=GIB)), system(here, v1("", above=GIB, kills=1))) == (
        "the OOM-kill counter of its cgroup (/sys/fs/cgroup/memory/memory.oom_control) rose from 0 to 1; "
        "the smallest limit on it is 1.0 GiB (/sys/fs/cgroup/memory/memory.stat)"
    )


def test_a_kill_in_kubernetes_on_v2(system: System) -> None:
    here = [in_v2("/"), machine()]
    assert rise(system(*here, v2("", limit=512 * MIB)), system(*here, v2("", limit=512 * MIB, kills=1))) == (
        "the OOM-kill counter of its cgroup (/sys/fs/cgroup/memory.events) rose from 0 to 1; the limit there is 512 MiB"
    )


def test_the_memory_of_a_v2_leaf_without_the_controller_is_charged_above_it(system: System) -> None:
    step = SLURM_V2.removesuffix("/user/task_0")
    here = [in_v2(SLURM_V2), {f"sys/fs/cgroup{SLURM_V2}/cgroup.procs": "1\n"}, machine()]
    assert rise(system(*here, v2(step, limit=8 * GIB)), system(*here, v2(step, limit=8 * GIB, kills=1))) == (
        f"the OOM-kill counter of its cgroup (/sys/fs/cgroup{step}/memory.events) rose from 0 to 1; "
        "the limit there is 8.0 GiB"
    )


def test_a_kill_that_counts_only_above_the_own_cgroup_may_be_anothers(system: System) -> None:
    here = [in_v2("/pod/a"), v2("/pod/a"), machine()]
    before, after = v2("/pod", limit=2 * GIB, kills=5), v2("/pod", limit=2 * GIB, kills=6)
    assert rise(system(*here, before), system(*here, after)) == (
        "the OOM-kill counter of a cgroup around it (/sys/fs/cgroup/pod/memory.events) rose from 5 to 6; "
        "the limit there is 2.0 GiB, but that of its own cgroup (/sys/fs/cgroup/pod/a/memory.events) did not, "
        "so it may have been another process"
    )


def test_a_kill_that_counts_everywhere_is_told_of_the_own_cgroup(system: System) -> None:
    here = in_v2("/pod/a")
    found = rise(
        system(here, v2("/pod/a"), v2("/pod"), machine(kills=3)),
        system(here, v2("/pod/a", kills=1), v2("/pod", kills=1), machine(kills=4)),
    )
    assert found == "the OOM-kill counter of its cgroup (/sys/fs/cgroup/pod/a/memory.events) rose from 0 to 1"


def test_a_kill_of_which_only_the_machine_tells(system: System) -> None:
    here = in_v2("/")  # the true root of v2 has no memory.events
    assert (
        rise(system(here, machine(kills=3)), system(here, machine(kills=4)))
        == "the machine's OOM-kill counter (/proc/vmstat) rose from 3 to 4"
    )


def test_a_kill_elsewhere_on_the_machine(system: System) -> None:
    here = [in_v1("/job"), v1("/job", limit=GIB), v1("")]
    assert rise(system(*here, machine(kills=3)), system(*here, machine(kills=4))) == (
        "the machine's OOM-kill counter (/proc/vmstat) rose from 3 to 4, but that of its own cgroup "
        "(/sys/fs/cgroup/memory/job/memory.oom_control) did not, so it may have been another process"
    )


def test_a_cgroup_that_was_guessed_is_not_called_its_own(system: System) -> None:
    here = [in_v1("/somewhere/else", root="/docker/1f"), machine()]
    before, after = OomCounters.read(system(*here, v1(""))), OomCounters.read(system(*here, v1("", kills=1)))
    assert after.risen_since(before) == (
        "the OOM-kill counter of a cgroup around it (/sys/fs/cgroup/memory/memory.oom_control) rose from 0 to 1"
    )


def test_nothing_rose(system: System) -> None:
    tree = system(in_v1("/job"), v1("/job", kills=7), v1("", kills=1), machine(kills=9))
    counters = OomCounters.read(tree)
    assert counters.readable and counters.risen_since(counters) is None


def test_what_could_not_be_read_was_not_zero(system: System) -> None:
    """A kernel before 4.13, whose files have no counts, and then one whose have: nothing can be said of a rise."""
    here = in_v1("/job")
    old = OomCounters.read(system(here, v1("/job", kills=None), {"proc/vmstat": "pgmajfault 371\n"}))
    new = OomCounters.read(system(here, v1("/job", kills=4), machine(kills=4)))
    assert (old.cgroups, old.machine, old.readable) == ((), None, False)
    assert new.readable
    assert old.risen_since(old) is None
    assert new.risen_since(old) is None
    assert old.risen_since(new) is None


def test_a_process_that_was_moved_compares_nothing(system: System) -> None:
    before = OomCounters.read(system(in_v1("/a"), v1("/a", kills=0)))
    after = OomCounters.read(system(in_v1("/b"), v1("/b", kills=5)))
    assert after.risen_since(before) is None


def test_without_any_file_nothing_is_readable(tmp_path: Path) -> None:
    assert OomCounters.read(tmp_path) == OomCounters(cgroups=(), machine=None, limit=None)
    assert not OomCounters.read(tmp_path).readable


# ---- how much there is ----


def test_room_in_docker_on_v1(system: System) -> None:
    own = v1("", limit=16 * GIB, usage=12 * GIB, cache=(2 * GIB, 1 * GIB))
    assert memory.available(system(in_v1("/docker/1f", root="/docker/1f"), own, machine())) == MemoryBudget(
        7 * GIB,
        "the cgroup allows 16.0 GiB, of which 9.0 GiB are used, file cache not counted "
        "(/sys/fs/cgroup/memory/memory.limit_in_bytes)",
    )


def test_v1_without_a_limit_leaves_the_machines(system: System) -> None:
    tree = system(in_v1("/a"), v1("/a", usage=60 * GIB), v1("", usage=61 * GIB), machine(available=5 * GIB))
    assert memory.available(tree) == MemoryBudget(
        5 * GIB, "the machine has 5.0 GiB of 62.8 GiB available (/proc/meminfo)"
    )


def test_slurm_on_v1_where_the_job_has_more_processes_than_ours(system: System) -> None:
    job, step = "/slurm/uid_1000/job_1", "/slurm/uid_1000/job_1/step_0"
    tree = system(
        in_v1(SLURM_V1),
        v1(SLURM_V1, usage=2 * GIB, above=30 * GIB),
        v1(step, limit=32 * GIB, usage=3 * GIB, above=30 * GIB),
        v1(job, limit=30 * GIB, usage=20 * GIB),
        machine(),
    )
    assert memory.available(tree) == MemoryBudget(
        10 * GIB,
        "the cgroup allows 30.0 GiB, of which 20.0 GiB are used, file cache not counted "
        f"(/sys/fs/cgroup/memory{job}/memory.limit_in_bytes)",
    )


def test_a_limit_above_what_a_v1_container_sees(system: System) -> None:
    tree = system(in_v1("/"), v1("", limit=8 * GIB, usage=GIB, above=2 * GIB), machine())
    assert memory.available(tree) == MemoryBudget(
        GIB,
        "the cgroup allows 2.0 GiB, of which 1.0 GiB are used, file cache not counted "
        "(/sys/fs/cgroup/memory/memory.stat)",
    )


def test_of_two_cgroups_with_the_same_room_the_one_that_has_the_limit_is_named(system: System) -> None:
    tree = system(in_v1("/job/task"), v1("/job/task", usage=GIB, above=4 * GIB), v1("/job", limit=4 * GIB, usage=GIB))
    budget = memory.available(tree)
    assert budget is not None and budget.reason.endswith("(/sys/fs/cgroup/memory/job/memory.limit_in_bytes)")


def test_slurm_on_v2(system: System) -> None:
    job = SLURM_V2.removesuffix("/step_0/user/task_0")
    tree = system(
        in_v2(SLURM_V2),
        v2(SLURM_V2, usage=4 * GIB),
        v2(job, limit=8 * GIB, usage=6 * GIB, cache=(GIB, 0)),
        machine(),
    )
    assert memory.available(tree) == MemoryBudget(
        3 * GIB,
        "the cgroup allows 8.0 GiB, of which 5.0 GiB are used, file cache not counted "
        f"(/sys/fs/cgroup{job}/memory.max)",
    )


def test_high_below_max_counts(system: System) -> None:
    tree = system(in_v2("/a"), v2("/a", limit=8 * GIB, high=6 * GIB, usage=5 * GIB), machine())
    assert memory.available(tree) == MemoryBudget(
        GIB,
        "the cgroup allows 6.0 GiB, of which 5.0 GiB are used, file cache not counted (/sys/fs/cgroup/a/memory.high)",
    )


def test_a_hybrid_machine_whose_memory_is_on_v1(system: System) -> None:
    mounts = V1_MOUNTS.format(root="/") + V2_MOUNTS.replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
    both = {"proc/self/cgroup": "4:memory:/a\n0::/a\n", "proc/self/mountinfo": mounts}
    empty = {"sys/fs/cgroup/unified/a/cgroup.procs": "1\n"}
    budget = memory.available(system(both, empty, v1("/a", limit=2 * GIB, usage=GIB), machine()))
    assert budget is not None and budget.nbytes == GIB


def test_the_file_cache_of_a_second_epoch_is_active_and_yet_free(system: System) -> None:
    tree = system(in_v2("/a"), v2("/a", limit=64 * GIB, usage=64 * GIB, cache=(GIB, 40 * GIB)), machine())
    budget = memory.available(tree)
    assert budget is not None and budget.nbytes == 41 * GIB


def test_a_cgroup_over_its_limit_has_no_room(system: System) -> None:
    budget = memory.available(system(in_v2("/a"), v2("/a", high=GIB, usage=2 * GIB), machine()))
    assert budget is not None and budget.nbytes == 0


def test_a_limit_without_a_usage_says_nothing(system: System) -> None:
    tree = system(in_v2("/a"), {"sys/fs/cgroup/a/memory.max": f"{GIB}\n"}, machine(available=3 * GIB))
    budget = memory.available(tree)
    assert budget is not None and budget.nbytes == 3 * GIB


def test_nothing_readable_no_budget(tmp_path: Path) -> None:
    assert memory.available(tmp_path) is None


# ---- what a worker costs ----

SMAPS = """\
55d0c2a00000-55d0c2c00000 rw-p 00000000 00:00 0                          [heap]
Rss:                2048 kB
Shared_Clean:          0 kB
Shared_Dirty:       1024 kB
Private_Clean:        24 kB
Private_Dirty:      1000 kB
Private_Hugetlb:       8 kB
VmFlags: rd wr mr mw me ac sd
7f12a0000000-7f12a6400000 rw-s 00000000 00:01 1034                       /memfd:safeloader-3 (deleted)
Rss:              102400 kB
Private_Clean:         0 kB
Private_Dirty:    102400 kB
VmFlags: rd wr sh mr mw me ms sd
7f12b0000000-7f12b0400000 r-xp 00000000 fe:00 4711                       /opt/my lib: a/libtorch.so
Rss:                4096 kB
Shared_Clean:       4064 kB
Private_Clean:        32 kB
Private_Dirty:         0 kB
"""
STATUS = "Name:\tpython\nState:\tS (sleeping)\nVmHWM:\t  700000 kB\nVmRSS:\t  600000 kB\nThreads:\t1\n"


def test_a_worker_costs_its_private_memory_at_its_peak_without_the_ring(system: System) -> None:
    tree = system({"proc/7/smaps": SMAPS, "proc/7/status": STATUS})
    assert memory.worker_nbytes(7, tree) == (24 + 1000 + 8 + 32 + 100_000) * 1024


def test_a_zombie_costs_nothing_that_can_be_told(system: System) -> None:
    status = "Name:\tpython\nState:\tZ (zombie)\nThreads:\t1\n"
    tree = system({"proc/7/smaps": "", "proc/7/status": status, "proc/7/statm": "0 0 0 0 0 0 0\n"})
    assert memory.worker_nbytes(7, tree) is None


@pytest.mark.parametrize(
    ("budget", "each", "ring", "wanted", "fitting"),
    [
        (100, 10, 0, 20, 9),  # a tenth stays free
        (100, 10, 0, 5, 5),
        (100, 10, 25, 20, 6),
        (100, 1000, 0, 20, 1),
        (100, 10, 500, 20, 1),
        (0, 10, 0, 20, 1),
        (100, 0, 0, 20, 20),
    ],
)
def test_workers_that_fit(budget: int, each: int, ring: int, wanted: int, fitting: int) -> None:
    assert memory.workers_that_fit(budget, each, ring, wanted) == fitting


def test_more_workers_fit_with_less_headroom() -> None:
    assert memory.workers_that_fit(100, 10, 0, 20, headroom=0) == 10


# ---- figures ----


def test_figures_are_those_of_the_cgroup_with_the_least_room(system: System) -> None:
    tree = system(
        in_v2("/job/task"),
        v2("/job/task", usage=GIB),
        v2("/job", limit=4 * GIB, usage=3 * GIB, cache=(GIB // 2, 0)),
        machine(available=48 * GIB),
    )
    found = memory.figures(tree).to_dict()
    assert json.loads(json.dumps(found)) == {
        "mem_available_nbytes": 48 * GIB,
        "cgroup": "/sys/fs/cgroup/job",
        "cgroup_usage_nbytes": 3 * GIB,
        "cgroup_cache_nbytes": GIB // 2,
        "cgroup_limit_nbytes": 4 * GIB,
        "free_descriptors": None,
    }


def test_figures_without_a_limit_are_those_of_the_own_cgroup(system: System) -> None:
    found = memory.figures(system(in_v1("/a"), v1("/a", usage=GIB), v1("", usage=2 * GIB)))
    assert (found.cgroup, found.cgroup_usage_nbytes, found.cgroup_limit_nbytes) == (
        "/sys/fs/cgroup/memory/a",
        GIB,
        None,
    )


def test_figures_where_nothing_can_be_read(tmp_path: Path) -> None:
    assert set(memory.figures(tmp_path).to_dict().values()) == {None}


def test_open_files_are_not_free(tmp_path: Path) -> None:
    before = memory.figures().free_descriptors
    files = [(tmp_path / str(number)).open("w") for number in range(10)]
    during = memory.figures().free_descriptors
    for file in files:
        file.close()
    assert before is not None and during == before - 10


# ---- the kernel's own ----

FORK = multiprocessing.get_context("fork")
LOOSE = 16 * MIB
"""How far a measurement may be off: the interpreter's own pages, and those that the kernel counts in batches."""


@contextmanager
def child(work: Callable[[Connection], None], *, ends: int = 0) -> Iterator[tuple[int, Connection]]:
    """A forked process that talks with the test in turns, and ends when `work` does, with exit code `ends`."""
    here, there = FORK.Pipe()
    process = FORK.Process(target=lambda: (here.close(), work(there)))
    process.start()
    there.close()
    assert process.pid is not None
    try:
        yield process.pid, here
        process.join(timeout=30)
        assert process.exitcode == ends
    finally:
        here.close()
        if process.is_alive():
            process.kill()
        process.join()
        process.close()


def take(nbytes: int) -> mmap.mmap:
    """Private memory, touched; given back to the kernel when it is closed."""
    taken = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, nbytes, mmap.PAGESIZE):
        taken[page] = 1
    return taken


@pytest.fixture
def cgroup() -> Iterator[Path]:
    """A memory cgroup (v1) of 128 MiB, with one cgroup in it, `inner`."""
    outer = Path("/sys/fs/cgroup/memory") / f"safeloader-test-memory-{os.getpid()}"
    made = []
    try:
        for folder in (outer, outer / "inner"):
            folder.mkdir()
            made.append(folder)
        (outer / "memory.limit_in_bytes").write_text(str(128 * MIB))
    except OSError as error:
        for folder in reversed(made):
            folder.rmdir()
        pytest.skip(f"needs a memory cgroup (v1) that this user may create: {error}")
    yield outer
    for folder in (outer / "inner", outer):
        wait_until(lambda folder=folder: not (folder / "cgroup.procs").read_text(), what=f"the end of all in {folder}")
        folder.rmdir()


def join(cgroup: Path) -> None:
    (cgroup / "cgroup.procs").write_text(str(os.getpid()))


@pytest.mark.parametrize("where", ["limit at its own cgroup", "limit at the cgroup above"])
def test_a_real_oom_kill(where: str, cgroup: Path) -> None:
    home = cgroup if where == "limit at its own cgroup" else cgroup / "inner"

    def witness(test: Connection) -> None:
        join(home)
        before = OomCounters.read()
        victim = os.fork()
        if victim == 0:
            Path("/proc/self/oom_score_adj").write_text("1000")
            take(400 * MIB)
            os._exit(0)
        _, status = os.waitpid(victim, 0)
        after = OomCounters.read()
        test.send((os.waitstatus_to_exitcode(status), after.readable, after.risen_since(before)))

    with child(witness) as (_, talk):
        exit_code, readable, found = talk.recv()
    assert (exit_code, readable) == (-signal.SIGKILL, True)
    limit = "the limit there is 128 MiB"
    if home != cgroup:
        limit = f"the smallest limit on it is 128 MiB ({cgroup}/memory.limit_in_bytes)"
    assert found == f"the OOM-kill counter of its cgroup ({home}/memory.oom_control) rose from 0 to 1; {limit}"


def test_a_real_oom_kill_in_another_cgroup_is_only_the_machines(cgroup: Path) -> None:
    def victim(_: Connection) -> None:
        join(cgroup)
        Path("/proc/self/oom_score_adj").write_text("1000")
        take(400 * MIB)

    before = OomCounters.read()
    with child(victim, ends=-signal.SIGKILL):
        pass
    found = OomCounters.read().risen_since(before)
    assert found is not None and found.startswith("the machine's OOM-kill counter (/proc/vmstat) rose from ")
    assert found.endswith(" did not, so it may have been another process")


def test_room_shrinks_as_a_child_takes_memory(cgroup: Path) -> None:
    """The limit is above the process's own cgroup, and so is the usage that counts."""

    def worker(test: Connection) -> None:
        join(cgroup / "inner")
        test.send(memory.available())
        taken = take(64 * MIB)
        test.send(memory.available())
        taken.close()
        test.send(memory.available())

    with child(worker) as (_, talk):
        first, less, again = talk.recv(), talk.recv(), talk.recv()
    assert first.nbytes - less.nbytes == pytest.approx(64 * MIB, abs=LOOSE)
    assert first.nbytes == pytest.approx(again.nbytes, abs=LOOSE)
    assert less.reason.startswith("the cgroup allows 128 MiB, of which ")
    assert less.reason.endswith(f"({cgroup}/memory.limit_in_bytes)")


def test_file_cache_that_was_read_twice_does_not_shrink_the_room(cgroup: Path, tmp_path: Path) -> None:
    def worker(test: Connection) -> None:
        join(cgroup)
        test.send(memory.available())
        with (tmp_path / "data").open("wb+") as file:
            for _ in range(64):
                file.write(bytes(MIB))
            file.flush()
            os.fsync(file.fileno())
            for _ in range(3):
                file.seek(0)
                while file.read(MIB):
                    pass
        test.send((memory.available(), memory.figures()))

    with child(worker) as (_, talk):
        first, (after, figures) = talk.recv(), talk.recv()
    if figures.cgroup_cache_nbytes < 48 * MIB:
        pytest.skip("the temporary folder is not on a disk, or its file system caches elsewhere")
    assert figures.cgroup_usage_nbytes > 60 * MIB
    assert figures.cgroup_limit_nbytes == 128 * MIB
    assert first.nbytes == pytest.approx(after.nbytes, abs=LOOSE)


NURSERY = """
import ctypes, mmap, os

MIB = 2**20
PR_SET_THP_DISABLE = 41

def take(nbytes):
    taken = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in range(0, nbytes, mmap.PAGESIZE):
        taken[page] = 1
    return taken

def measured():
    print(os.getpid(), flush=True)
    input()

assert ctypes.CDLL(None).prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0
shared = take(200 * MIB)
worker = os.fork()
if worker:
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]))
measured()
private = take(100 * MIB)
measured()
take(80 * MIB).close()
measured()
slot = os.memfd_create("safeloader-test-slot")
os.truncate(slot, 60 * MIB)
mapped = mmap.mmap(slot, 60 * MIB)
mapped[:] = bytes(60 * MIB)
measured()
"""
"""A small process that forks another: nothing but what it takes here counts.

Forked from the tests' own process, whose heap numpy has marked for huge pages, the kernel's khugepaged may join what
the two share, and make 16 MiB of it private in one turn. Hence also the prctl.
"""


def test_a_worker_costs_what_it_does_not_share_and_its_peak() -> None:
    with subprocess.Popen([sys.executable, "-c", NURSERY], stdin=PIPE, stdout=PIPE, text=True) as nursery:
        assert nursery.stdin and nursery.stdout
        costs, resident = [], []
        for _ in range(4):
            pid = int(nursery.stdout.readline())
            costs.append(memory.worker_nbytes(pid))
            resident.append(psutil.Process(pid).memory_info().rss)
            nursery.stdin.write("go on\n")
            nursery.stdin.flush()
    assert nursery.returncode == 0
    base, now, peak, filled = (nbytes or 0 for nbytes in costs)
    assert now - base == pytest.approx(100 * MIB, abs=LOOSE)
    assert now == pytest.approx(100 * MIB, abs=2 * LOOSE)
    assert resident[1] > 300 * MIB and resident[1] - resident[0] == pytest.approx(100 * MIB, abs=LOOSE)
    assert peak - now == pytest.approx(80 * MIB, abs=LOOSE)
    assert resident[2] == pytest.approx(resident[1], abs=LOOSE)
    assert resident[3] - resident[2] > 50 * MIB
    assert filled < peak + LOOSE, "a slot is not its worker's"


def test_a_process_that_is_gone_costs_nothing_that_can_be_told() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert memory.worker_nbytes(pid) is None  # a zombie
    os.waitpid(pid, 0)
    assert memory.worker_nbytes(pid) is None


def test_this_machine() -> None:
    budget, figures = memory.available(), memory.figures()
    assert budget is not None and figures.mem_available_nbytes is not None
    assert 0 < budget.nbytes <= figures.mem_available_nbytes * 1.1
