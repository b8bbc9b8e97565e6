"""What `safeloader doctor` says about machines that we don't have: from facts, with no process started."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from safeloader.cli.doctor import CHECKS, in_words, look
from safeloader.cli.doctor.check import Verdict
from safeloader.cli.doctor.facts import Facts, Folder, Limits, Mounted, _driver
from safeloader.cli.doctor.probing import Probed
from safeloader.cli.doctor.software import runs_on
from safeloader.faults.cpus import CpuBudget
from safeloader.faults.memory import MemoryBudget

GIB = 1 << 30
DISK = Mounted("ext4", 500 * GIB, 400 * GIB)
A100 = {"name": "NVIDIA A100-SXM4-40GB", "capability": [8, 0], "memory_nbytes": 40 * GIB}
TORCH = {
    "version": "2.8.0+cu128",
    "cuda": "12.8",
    "archs": ["sm_70", "sm_80", "sm_90", "compute_90"],
    "gpus": [A100],
    "refused": "",
    "cudnn": 91002,
}
STEPS: dict[str, Any] = {
    "torch": TORCH,
    "blosc2": {"version": "3.5.0"},
    "trainer": {"found": "safeloader.nnunet.trainer.nnUNetTrainerSafeLoader"},
}
GOOD = Facts(
    trainer="nnUNetTrainerSafeLoader",
    deep=False,
    environ={},
    cpus=CpuBudget(64, "the machine has 64 CPUs"),
    memory=MemoryBudget(200 * GIB, "the machine has 200.0 GiB of 256.0 GiB available (/proc/meminfo)"),
    shm=Mounted("tmpfs", 128 * GIB, 128 * GIB),
    private_ipc=False,
    container="",
    limits=Limits(files=1024, processes=None, address_nbytes=None, pids=None),
    versions={"nnunetv2": "2.8.1", "torch": "2.8.0+cu128", "threadpoolctl": "3.6.0", "blosc2": "3.5.0"},
    complaints=[],
    folders={name: Folder(f"/data/{name}", True, "", DISK) for name in ("nnUNet_preprocessed", "nnUNet_results")},
    compiler="/usr/bin/gcc",
    headers=True,
    compile_cache=Folder("/tmp", True, "", DISK),
    driver="570.86.10",
    shim="/venv/variants/safeloader_trainer.py",
    probed=Probed(STEPS),
)


def found(facts: Facts, title: str) -> tuple[Verdict, str, str]:
    finding = dict(look(facts))[title]
    return finding.verdict, finding.evidence, finding.remedy


def torch(**changes: Any) -> dict[str, Any]:
    return {"probed": Probed({**STEPS, "torch": {**TORCH, **changes}})}


def step(name: str, **said: Any) -> dict[str, Any]:
    return {"probed": Probed({**STEPS, name: said})}


def folder(name: str, given: Folder) -> dict[str, Any]:
    return {"folders": {**GOOD.folders, name: given}}


def test_a_good_machine_has_nothing_to_do() -> None:
    findings = look(GOOD)
    assert {finding.verdict for _, finding in findings} == {Verdict.OK}
    assert not any(finding.remedy for _, finding in findings)
    assert in_words(findings).endswith("\nNothing that was looked at will break a training.")


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_check_says_what_it_asks(check: Any) -> None:
    assert check.__doc__ and "?" in check.__doc__.split("\n")[0]
    assert 0 < len(check.title) <= 14


SLOW_DISK = "it took more than 8 s; the machine is busy, or its storage is slow"
TIMED_OUT = Probed({"torch": TORCH}, "it took more than 8 s", late=True)
NOTHING_IN_TIME = Probed({}, "it took more than 8 s", late=True)
CASES: list[tuple[str, dict[str, Any], str, Verdict, str, str]] = [
    (
        "fewer CPUs than workers",
        {
            "cpus": CpuBudget(4, "the cgroup allows 4 of 64 CPUs (/sys/fs/cgroup/cpu.max)"),
            "environ": {"SLURM_JOB_ID": "7"},
        },
        "CPUs",
        Verdict.NOTE,
        "the cgroup allows 4 of 64 CPUs (/sys/fs/cgroup/cpu.max); nnU-Net asks for 12 workers, and SafeLoader starts 4",
        "sbatch --cpus-per-task=12 …, if training waits for batches",
    ),
    (
        "no number of workers",
        {"environ": {"nnUNet_n_proc_DA": "auto"}},
        "CPUs",
        Verdict.BREAKS,
        "nnUNet_n_proc_DA=auto is no number of workers",
        "export nnUNet_n_proc_DA=12",
    ),
    (
        "no workers",
        {"environ": {"nnUNet_n_proc_DA": "0"}},
        "CPUs",
        Verdict.NOTE,
        "nnUNet_n_proc_DA=0: batches are made in the training process itself, which nothing protects",
        "export nnUNet_n_proc_DA=64",
    ),
    (
        "little memory in Docker",
        {
            "memory": MemoryBudget(6 * GIB, "the cgroup allows 8.0 GiB, of which 2.0 GiB are used"),
            "container": "Docker",
        },
        "memory",
        Verdict.WARNING,
        "the cgroup allows 8.0 GiB, of which 2.0 GiB are used: 6.0 GiB are left for the training and its workers. "
        "SafeLoader starts as many workers as fit; the training itself may not fit",
        "docker run --memory=32g …, or export nnUNet_n_proc_DA=4",
    ),
    (
        "Docker's /dev/shm",
        {"shm": Mounted("tmpfs", 64 << 20, 64 << 20), "private_ipc": True, "container": "Docker"},
        "/dev/shm",
        Verdict.NOTE,
        "64 MiB, 64 MiB free, in an IPC namespace of the container's own: too small for stock nnU-Net's batches; "
        "SafeLoader does not use it",
        "for trainings without SafeLoader: docker run --ipc=host … (or --shm-size=8g)",
    ),
    (
        "no /dev/shm",
        {"shm": None},
        "/dev/shm",
        Verdict.NOTE,
        "there is none; SafeLoader needs none, stock nnU-Net does",
        "for trainings without SafeLoader: docker run --ipc=host … (or --shm-size=8g)",
    ),
    (
        "few descriptors",
        {"limits": replace(GOOD.limits, files=256)},
        "open files",
        Verdict.WARNING,
        "only 256 at a time",
        "ulimit -n 4096",
    ),
    (
        "a cgroup with few processes",
        {"limits": replace(GOOD.limits, pids=(90, 100))},
        "processes",
        Verdict.WARNING,
        "the cgroup allows 100 processes and threads, and has 90",
        "docker run --pids-limit=-1 …",
    ),
    (
        "ulimit -v",
        {"limits": replace(GOOD.limits, address_nbytes=64 * GIB)},
        "address space",
        Verdict.WARNING,
        "limited to 64.0 GiB; CUDA reserves as much as the machine and all its cards have, and more",
        "ulimit -v unlimited (limit memory by the cgroup instead)",
    ),
    (
        "a job that did not ask for CPUs",
        {"environ": {"SLURM_JOB_ID": "7", "SLURM_MEM_PER_NODE": "32768"}},
        "Slurm",
        Verdict.NOTE,
        "job 7; MiB per node: 32768; it did not ask for CPUs",
        "sbatch --cpus-per-task=12 …",
    ),
    (
        "no nnU-Net",
        {"versions": {"torch": "2.8.0"}},
        "versions",
        Verdict.BREAKS,
        "nnU-Net is not installed; torch 2.8.0",
        "pip install nnunetv2",
    ),
    (
        "torch 2.9",
        {"versions": {"nnunetv2": "2.6.2", "torch": "2.9.1+cu128"}},
        "versions",
        Verdict.WARNING,
        "torch 2.9.1+cu128 computes 3D convolutions in mixed precision very slowly, and nnU-Net 2.8 refuses it; "
        "nnunetv2 2.6.2, torch 2.9.1+cu128",
        "pip install 'torch!=2.9.*'",
    ),
    (
        "old nnU-Net",
        {"versions": {"nnunetv2": "2.4.2"}},
        "versions",
        Verdict.WARNING,
        "nnunetv2 2.4.2 is older than what SafeLoader works with (2.5); nnunetv2 2.4.2",
        "pip install -U nnunetv2",
    ),
    (
        "old threadpoolctl",
        {"versions": {"nnunetv2": "2.8.1", "threadpoolctl": "2.2.0"}},
        "versions",
        Verdict.WARNING,
        "threadpoolctl 2.2.0 fails on newer BLAS libraries in each stock worker (nnUNet#1406, #2166); "
        "nnunetv2 2.8.1, threadpoolctl 2.2.0",
        "pip install -U threadpoolctl",
    ),
    (
        "versions that don't fit",
        {
            "complaints": [
                "jupyter 1.0 requires notebook, which is not installed.",
                "blosc2 4.0 has requirement numpy>=2.",
            ]
        },
        "dependencies",
        Verdict.WARNING,
        "pip check: blosc2 4.0 has requirement numpy>=2.",
        "pip install -U nnunetv2, in an environment of its own",
    ),
    (
        "no pip",
        {"complaints": None},
        "dependencies",
        Verdict.UNKNOWN,
        "pip gave no answer",
        "python -m pip check",
    ),
    (
        "torch that can't be imported",
        step("torch", error="ImportError: libcudnn.so.9: cannot open shared object file"),
        "torch",
        Verdict.BREAKS,
        "can't be imported: ImportError: libcudnn.so.9: cannot open shared object file",
        "pip install --force-reinstall torch",
    ),
    (
        "a driver that is too old",
        torch(gpus=[], refused="The NVIDIA driver on your system is too old (found version 11040)."),
        "torch",
        Verdict.BREAKS,
        "2.8.0+cu128, built for CUDA 12.8; the driver 570.86.10 is there, and torch finds no GPU: The NVIDIA driver on "
        "your system is too old (found version 11040).",
        "nvidia-smi, and a build of torch that this driver can run: https://pytorch.org",
    ),
    (
        "torch for the CPU beside a GPU",
        torch(cuda="", gpus=[], archs=[]),
        "torch",
        Verdict.BREAKS,
        "2.8.0+cu128, built for the CPU alone, but there is a GPU (driver 570.86.10)",
        "install torch for CUDA: https://pytorch.org/get-started/locally",
    ),
    (
        "a card that is newer than torch",
        torch(archs=["sm_70", "sm_90"], gpus=[{**A100, "name": "NVIDIA RTX 5090", "capability": [12, 0]}]),
        "torch",
        Verdict.BREAKS,
        "2.8.0+cu128, built for CUDA 12.8, cuDNN 91002, driver 570.86.10; NVIDIA RTX 5090 (40.0 GiB): this build has "
        "no code for NVIDIA RTX 5090 (sm_120; it has sm_70, sm_90)",
        "install a build of torch for this card: https://pytorch.org/get-started/locally",
    ),
    (
        "no compiler",
        {"compiler": ""},
        "torch.compile",
        Verdict.WARNING,
        "will fail: no C compiler is on the PATH",
        "apt install gcc, or module load gcc (or export nnUNet_compile=false)",
    ),
    (
        "no headers",
        {"headers": False},
        "torch.compile",
        Verdict.WARNING,
        "will fail: Python.h is missing",
        "apt install python3-dev, or conda install python (or export nnUNet_compile=false)",
    ),
    (
        "a cache that can't be written",
        {"compile_cache": Folder("/tmp", True, "Read-only file system", DISK)},
        "torch.compile",
        Verdict.WARNING,
        "will fail: nothing can be written to /tmp (Read-only file system)",
        "export TORCHINDUCTOR_CACHE_DIR=~/.cache/torchinductor (or export nnUNet_compile=false)",
    ),
    (
        "a card that is too old to compile for",
        torch(archs=["sm_61"], gpus=[{**A100, "name": "GTX 1080 Ti", "capability": [6, 1]}]),
        "torch.compile",
        Verdict.WARNING,
        "does not support GTX 1080 Ti",
        "export nnUNet_compile=false",
    ),
    (
        "a function that could not be compiled",
        step("compile", error="InductorError: CalledProcessError: gcc"),
        "torch.compile",
        Verdict.WARNING,
        "a small function could not be compiled: InductorError: CalledProcessError: gcc",
        "safeloader explain LOG, or export nnUNet_compile=false",
    ),
    (
        "blosc2 and numpy 1",
        step("blosc2", error="AttributeError: module 'numpy' has no attribute 'isdtype'"),
        "blosc2",
        Verdict.BREAKS,
        "can't be imported: AttributeError: module 'numpy' has no attribute 'isdtype'",
        "pip install -U blosc2 numpy",
    ),
    (
        "no folders",
        {"folders": {}},
        "folders",
        Verdict.BREAKS,
        "nnUNet_preprocessed and nnUNet_results not set",
        "export nnUNet_preprocessed=/path/to/nnUNet_preprocessed; export nnUNet_results=/path/to/nnUNet_results",
    ),
    (
        "a folder that is not there",
        folder("nnUNet_preprocessed", Folder("/scratch/p", False)),
        "folders",
        Verdict.BREAKS,
        "nnUNet_preprocessed=/scratch/p is no folder",
        "mkdir -p '/scratch/p'",
    ),
    (
        "results that can't be written",
        folder("nnUNet_results", Folder("/data/r", True, "No space left on device", DISK)),
        "folders",
        Verdict.BREAKS,
        "nothing can be written to nnUNet_results=/data/r: No space left on device",
        "export nnUNet_results=…",
    ),
    (
        "a disk that is nearly full",
        folder("nnUNet_results", Folder("/data/r", True, "", Mounted("ext4", 100 * GIB, 2 * GIB))),
        "folders",
        Verdict.WARNING,
        "only 2.0 GiB are free in nnUNet_results=/data/r",
        "df -h '/data/r'; a fold takes 1 to 5 GiB",
    ),
    (
        "data on a network file system",
        folder("nnUNet_preprocessed", Folder("/nfs/p", True, "", Mounted("nfs4", 100 * GIB, 90 * GIB))),
        "folders",
        Verdict.NOTE,
        "nnUNet_preprocessed=/nfs/p is on nfs4: each wait for storage is a wait for batches",
        "copy it to a local disk of the node before training, for example to $TMPDIR",
    ),
    (
        "no trainer",
        step("trainer", error="RuntimeError: Could not find requested nnunet trainer nnUNetTrainerSafeLoader in …"),
        "trainer",
        Verdict.BREAKS,
        "nnU-Net does not find nnUNetTrainerSafeLoader",
        "safeloader install",
    ),
    (
        "a slow disk",
        {"probed": TIMED_OUT},
        "trainer",
        Verdict.UNKNOWN,
        f"whether nnU-Net finds nnUNetTrainerSafeLoader: {SLOW_DISK}",
        "safeloader doctor --deep has more time",
    ),
    *(
        (
            f"a very slow disk, {library}",
            {"probed": NOTHING_IN_TIME},
            library,
            Verdict.UNKNOWN,
            f"whether {library} can be imported: {SLOW_DISK}",
            "safeloader doctor --deep has more time",
        )
        for library in ("torch", "blosc2")
    ),
    (
        "a disk that is too slow for --deep",
        {"probed": NOTHING_IN_TIME, "deep": True},
        "torch",
        Verdict.UNKNOWN,
        f"whether torch can be imported: {SLOW_DISK}",
        "time python -c 'import torch'",
    ),
    (
        "a slow disk and no shim",
        {"probed": TIMED_OUT, "shim": ""},
        "trainer",
        Verdict.BREAKS,
        "nothing leads nnU-Net to nnUNetTrainerSafeLoader",
        "safeloader install",
    ),
    (
        "nnU-Net that crashes",
        {"probed": Probed({"torch": TORCH}, "the process that tried it was killed by SIGSEGV")},
        "trainer",
        Verdict.BREAKS,
        "nnU-Net can't be imported: the process that tried it was killed by SIGSEGV",
        "pip install --force-reinstall nnunetv2",
    ),
]


@pytest.mark.parametrize(
    ("changes", "title", "verdict", "evidence", "remedy"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_a_machine(changes: dict[str, Any], title: str, verdict: Verdict, evidence: str, remedy: str) -> None:
    assert found(replace(GOOD, **changes), title) == (verdict, evidence, remedy)


def test_the_answer_counts() -> None:
    facts = replace(GOOD, folders={}, headers=False, limits=replace(GOOD.limits, files=64))
    assert in_words(look(facts)).splitlines()[-1] == "1 thing will break a training; 2 things may."
    slow = in_words(look(replace(GOOD, probed=NOTHING_IN_TIME)))
    assert slow.endswith("\nNothing that was looked at will break a training; 3 could not be found out.")
    assert "torch.compile" not in slow  # whether it will be used depends on the GPU


@pytest.mark.parametrize(
    ("archs", "capability", "runs"),
    [
        (["sm_80"], [8, 6], True),
        (["sm_86"], [8, 0], False),
        (["sm_80", "sm_90a"], [9, 0], True),
        (["sm_80", "compute_80"], [12, 0], True),
        (["sm_90", "compute_90"], [8, 0], False),
        (["sm_120"], [12, 0], True),
        (["gfx90a"], [9, 0], True),
    ],
)
def test_which_code_runs_on_which_card(archs: list[str], capability: list[int], runs: bool) -> None:
    assert runs_on(archs, capability) == runs


def test_the_drivers_version_is_read_from_both_kinds_of_driver() -> None:
    closed = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC version: 12"
    opened = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build  (root@build)\n"
    assert [_driver(text) for text in (closed, opened, "")] == ["535.129.03", "570.86.10", ""]
