"""Where the cgroups are, and what their memory files say, from recorded `/proc` and `/sys` files."""

from __future__ import annotations

from pathlib import Path

import pytest

from safeloader.faults.cgroups import (
    Folder,
    Limit,
    Mount,
    folders,
    memory_cgroups,
    parse_counts,
    parse_memberships,
    parse_mounts,
    parse_nbytes,
    read,
)

V1_MOUNTS = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 {root} /sys/fs/cgroup/cpu,cpuacct rw,relatime - cgroup cgroup rw,cpu,cpuacct
33 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
"""
V2_MOUNTS = """\
24 30 0:22 / /proc rw,nosuid,nodev,noexec,relatime shared:13 - proc proc rw
29 23 0:26 {root} /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:4 - cgroup2 cgroup2 rw,nsdelegate
"""


def system(folder: Path, memberships: str, mounts: str) -> Path:
    """A file tree to read instead of the machine's."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/cgroup").write_text(memberships)
    (folder / "proc/self/mountinfo").write_text(mounts)
    return folder


def test_memberships_of_a_hybrid_machine() -> None:
    text = "5:cpu,cpuacct:/docker/1f\n4:memory:/a:b\n1:name=systemd:/\n0::/user.slice\n"
    assert parse_memberships(text) == {
        "cpu": "/docker/1f",
        "cpuacct": "/docker/1f",
        "memory": "/a:b",
        "name=systemd": "/",
        "": "/user.slice",
    }


def test_mounts() -> None:
    text = V1_MOUNTS.format(root="/docker/1f") + V2_MOUNTS.format(root="/") + "a damaged line\n"
    assert parse_mounts(text) == [
        Mount("/sys/fs/cgroup/cpu,cpuacct", "/docker/1f", frozenset({"rw", "cpu", "cpuacct"})),
        Mount("/sys/fs/cgroup/memory", "/docker/1f", frozenset({"rw", "memory"})),
        Mount("/sys/fs/cgroup", "/", None),
    ]


def paths(controller: str, tree: Path) -> list[tuple[str, int, bool]]:
    return [(str(folder.path), folder.version, folder.guessed) for folder in folders(controller, tree)]


def test_slurm_on_v1_from_the_task_upwards(tmp_path: Path) -> None:
    memberships = "11:memory:/slurm/uid_7/job_1/step_0\n4:cpu,cpuacct:/\n1:name=systemd:/system.slice/slurmd.service\n"
    tree = system(tmp_path, memberships, V1_MOUNTS.format(root="/"))
    assert paths("memory", tree) == [
        ("/sys/fs/cgroup/memory/slurm/uid_7/job_1/step_0", 1, False),
        ("/sys/fs/cgroup/memory/slurm/uid_7/job_1", 1, False),
        ("/sys/fs/cgroup/memory/slurm/uid_7", 1, False),
        ("/sys/fs/cgroup/memory/slurm", 1, False),
        ("/sys/fs/cgroup/memory", 1, False),
    ]
    assert paths("cpu", tree) == [("/sys/fs/cgroup/cpu,cpuacct", 1, False)]
    assert paths("pids", tree) == []


def test_slurm_on_v2(tmp_path: Path) -> None:
    tree = system(tmp_path, "0::/system.slice/slurmstepd.scope/job_1\n", V2_MOUNTS.format(root="/"))
    assert paths("memory", tree) == [
        ("/sys/fs/cgroup/system.slice/slurmstepd.scope/job_1", 2, False),
        ("/sys/fs/cgroup/system.slice/slurmstepd.scope", 2, False),
        ("/sys/fs/cgroup/system.slice", 2, False),
        ("/sys/fs/cgroup", 2, False),
    ]


def test_hybrid_has_both_hierarchies(tmp_path: Path) -> None:
    mounts = V1_MOUNTS.format(root="/") + V2_MOUNTS.format(root="/").replace("/sys/fs/cgroup", "/sys/fs/cgroup/unified")
    tree = system(tmp_path, "4:memory:/a\n0::/b\n", mounts)
    assert paths("memory", tree) == [
        ("/sys/fs/cgroup/memory/a", 1, False),
        ("/sys/fs/cgroup/memory", 1, False),
        ("/sys/fs/cgroup/unified/b", 2, False),
        ("/sys/fs/cgroup/unified", 2, False),
    ]


def test_a_container_without_a_cgroup_namespace_sees_its_own_cgroup_as_the_mount(tmp_path: Path) -> None:
    tree = system(tmp_path, "4:memory:/docker/1f/train\n", V1_MOUNTS.format(root="/docker/1f"))
    assert paths("memory", tree) == [("/sys/fs/cgroup/memory/train", 1, False), ("/sys/fs/cgroup/memory", 1, False)]


@pytest.mark.parametrize(
    ("cgroup", "root"),
    [
        ("/host/path/the/mount/does/not/show", "/docker/1f"),
        ("/", "/docker/1f"),
        ("/../../other", "/"),
        ("/", "/.."),
    ],
)
def test_a_cgroup_that_the_mount_does_not_show_is_guessed_to_be_the_mount(
    cgroup: str, root: str, tmp_path: Path
) -> None:
    tree = system(tmp_path, f"0::{cgroup}\n", V2_MOUNTS.format(root=root))
    assert paths("memory", tree) == [("/sys/fs/cgroup", 2, True)]


def test_no_proc_no_folders(tmp_path: Path) -> None:
    assert list(folders("memory", tmp_path)) == []


def test_a_mount_whose_name_is_not_utf8_hides_no_other(tmp_path: Path) -> None:
    tree = system(tmp_path, "0::/\n", "")
    line = b"40 23 0:50 / /mnt/M\xfcller rw - nfs server:/M\xfcller rw\n"
    (tree / "proc/self/mountinfo").write_bytes(line + V2_MOUNTS.format(root="/").encode())
    assert paths("memory", tree) == [("/sys/fs/cgroup", 2, False)]


def test_reading_what_is_not_there_or_no_file_is_empty(tmp_path: Path) -> None:
    assert (read(tmp_path / "none"), read(tmp_path)) == ("", "")


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("4294967296\n", 4 << 30),
        ("0\n", 0),
        ("max\n", None),
        ("", None),
        ("9223372036854771712\n", None),  # v1's "unlimited" with pages of 4 KiB
        ("9223372036854710272\n", None),  # and of 64 KiB
    ],
)
def test_nbytes(text: str, nbytes: int | None) -> None:
    assert parse_nbytes(text) == nbytes


def test_counts() -> None:
    assert parse_counts("low 0\noom_kill 3\nno number\n\n[a b c]\n") == {"low": 0, "oom_kill": 3}


def test_one_shape_for_both_versions(tmp_path: Path) -> None:
    mounts = V1_MOUNTS.format(root="/") + V2_MOUNTS.format(root="/").replace("/sys/fs/cgroup", "/unified")
    tree = system(tmp_path, "4:memory:/a\n0::/b\n", mounts)
    files = {
        "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/a/memory.usage_in_bytes": "900\n",
        "sys/fs/cgroup/memory/a/memory.stat": "inactive_file 1\nhierarchical_memory_limit 4096\n"
        "total_inactive_file 200\ntotal_active_file 300\n",
        "sys/fs/cgroup/memory/a/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
        "unified/b/memory.max": "8192\n",
        "unified/b/memory.high": "max\n",
        "unified/b/memory.current": "800\n",
        "unified/b/memory.stat": "file 700\ninactive_file 20\nactive_file 30\n",
        "unified/b/memory.events": "low 0\nhigh 0\nmax 9\noom 4\noom_kill 3\noom_group_kill 0\n",
    }
    for name, text in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(text)
    v1, v1_root, v2, v2_root = memory_cgroups(tree)
    assert (v1.limit, v1.usage_nbytes, v1.cache_nbytes, v1.kills, v1.room_nbytes) == (
        Limit(4096, "/sys/fs/cgroup/memory/a/memory.stat", inherited=True),
        900,
        500,
        2,
        4096 - 400,
    )
    assert (v2.limit, v2.usage_nbytes, v2.cache_nbytes, v2.kills, v2.room_nbytes) == (
        Limit(8192, "/unified/b/memory.max"),
        800,
        50,
        3,
        8192 - 750,
    )
    assert (v1.kills_file, v2.kills_file) == (
        "/sys/fs/cgroup/memory/a/memory.oom_control",
        "/unified/b/memory.events",
    )
    for root in (v1_root, v2_root):
        assert (root.limit, root.usage_nbytes, root.cache_nbytes, root.kills, root.room_nbytes) == (
            None,
            None,
            0,
            None,
            None,
        )


def test_the_limit_of_a_cgroup_is_its_own_rather_than_the_same_from_above(tmp_path: Path) -> None:
    tree = system(tmp_path, "4:memory:/\n", V1_MOUNTS.format(root="/"))
    folder = tree / "sys/fs/cgroup/memory"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text("4096\n")
    (folder / "memory.stat").write_text("hierarchical_memory_limit 4096\n")
    assert [cgroup.limit for cgroup in memory_cgroups(tree)] == [
        Limit(4096, "/sys/fs/cgroup/memory/memory.limit_in_bytes")
    ]


def test_this_machine() -> None:
    assert all(isinstance(folder, Folder) and str(folder.path).startswith("/") for folder in folders("memory"))
