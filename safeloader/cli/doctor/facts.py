"""What `safeloader doctor` knows of a machine: gathered once, then only read.

What may hang or crash (importing torch and nnU-Net) is done by another process, `safeloader.nnunet.probe`, within a
time limit. All else is read from `/proc`, `/sys` and the environment.
"""

from __future__ import annotations

import os
import resource
import shutil
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

from safeloader.cli.doctor.probing import Probed, pip_complaints, probe
from safeloader.errors import SafeLoaderError
from safeloader.faults.cgroups import folders, parse_nbytes, read
from safeloader.faults.cpus import CpuBudget, available_cpus
from safeloader.faults.memory import MemoryBudget, available
from safeloader.nnunet.install import SHIM_NAME, variants_folder
from safeloader.report.versions import versions_of

PACKAGES: Final = (
    "safeloader",
    "nnunetv2",
    "batchgenerators",
    "batchgeneratorsv2",
    "threadpoolctl",
    "blosc2",
    "torch",
    "triton",
    "numpy",
)
"""Whose versions matter."""

NNUNET_FOLDERS: Final = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")
_FIRST_IPC_NAMESPACE: Final = "ipc:[4026531839]"
"""The machine's own; the kernel fixes its number (PROC_IPC_INIT_INO in include/linux/proc_ns.h)."""


@dataclass(frozen=True)
class Mounted:
    """A file system: its type as `/proc/mounts` names it, its size and what is free, in bytes."""

    kind: str
    size_nbytes: int
    free_nbytes: int


@dataclass(frozen=True)
class Folder:
    """One of nnU-Net's folders, or another that is written to.

    Attributes:
        path: Where.
        exists: Whether it is a folder.
        refused: Why nothing can be written there, in the system's words; "" if it can.
        mounted: Its file system, if it exists.
    """

    path: str
    exists: bool
    refused: str = ""
    mounted: Mounted | None = None


@dataclass(frozen=True)
class Limits:
    """What the system allows this process; None is no limit.

    Attributes:
        files: Open descriptors (`ulimit -n`).
        processes: Processes and threads of this user (`ulimit -u`).
        address_nbytes: Address space (`ulimit -v`).
        pids: Processes and threads of the cgroup: (now, at most), or None.
    """

    files: int | None
    processes: int | None
    address_nbytes: int | None
    pids: tuple[int, int] | None


@dataclass(frozen=True)
class Facts:
    """One machine at one moment.

    Attributes:
        trainer: The trainer class that nnU-Net is asked for.
        deep: Whether there was time for slow imports, and to compile a small function.
        environ: The environment variables.
        cpus: Those that this process may use.
        memory: What it may still take.
        shm: `/dev/shm`, or None if there is none.
        private_ipc: Whether the IPC namespace is a container's own; None if it can't be told.
        container: What kind of container this is in, or "".
        limits: Of descriptors, processes and memory.
        versions: Installed packages that matter, by name.
        complaints: What `pip check` says about them; None if it said nothing, or not in time.
        folders: nnU-Net's folders whose variables are set, by variable.
        compiler: The path of the C compiler that torch.compile would call, or "".
        headers: Whether Python.h is there.
        compile_cache: Where torch.compile keeps what it has compiled.
        driver: The version of NVIDIA's kernel driver, or "".
        shim: Where the file lies that leads nnU-Net to our trainer, or "".
        probed: What importing torch and nnU-Net showed.
    """

    trainer: str
    deep: bool
    environ: Mapping[str, str]
    cpus: CpuBudget
    memory: MemoryBudget | None
    shm: Mounted | None
    private_ipc: bool | None
    container: str
    limits: Limits
    versions: Mapping[str, str]
    complaints: Sequence[str] | None
    folders: Mapping[str, Folder]
    compiler: str
    headers: bool
    compile_cache: Folder
    driver: str
    shim: str
    probed: Probed = field(default_factory=Probed)

    @classmethod
    def gather(cls, *, trainer: str, deep: bool, timeout_s: float, system: Path = Path("/")) -> Facts:
        """Find out all of it.

        Args:
            trainer: The trainer class that nnU-Net is asked for.
            deep: Also compile a small function.
            timeout_s: Longest time for the imports.
            system: Where `proc`, `sys` and `dev` are found; tests give a recorded tree.
        """
        environ = dict(os.environ)
        with ThreadPoolExecutor() as others:
            probed = others.submit(probe, trainer, deep=deep, timeout_s=timeout_s)
            complaints = others.submit(pip_complaints, timeout_s)
        compilers = [environ["CC"]] if environ.get("CC") else ["gcc", "cc", "clang"]
        return cls(
            trainer=trainer,
            deep=deep,
            environ=environ,
            cpus=available_cpus(system),
            memory=available(system),
            shm=_mounted(system / "dev/shm") if (system / "dev/shm").is_dir() else None,
            private_ipc=_private_ipc(system),
            container=_container(environ, system),
            limits=_limits(system),
            versions=versions_of(*PACKAGES),
            complaints=complaints.result(),
            folders={name: _folder(environ[name]) for name in NNUNET_FOLDERS if environ.get(name)},
            compiler=next(filter(None, map(shutil.which, compilers)), ""),
            headers=(Path(sysconfig.get_paths()["include"]) / "Python.h").is_file(),
            compile_cache=_folder(environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir()),
            driver=_driver(read(system / "proc/driver/nvidia/version")),
            shim=_shim(environ),
            probed=probed.result(),
        )


def _shim(environ: Mapping[str, str]) -> str:
    named = [Path(folder) for folder in environ.get("nnUNet_extTrainer", "").split(os.pathsep) if folder.strip()]
    with suppress(SafeLoaderError):
        named.append(variants_folder())
    return next((str(folder / SHIM_NAME) for folder in named if (folder / SHIM_NAME).is_file()), "")


def _mounted(path: Path) -> Mounted | None:
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return None
    return Mounted(_kind(path), usage.total, usage.free)


def _kind(path: Path) -> str:
    """The type of the file system that `path` is on: of the mounts above it, the nearest; of two there, the later."""
    where = str(path.resolve())
    above = [
        (len(mount.mountpoint), number, mount.fstype)
        for number, mount in enumerate(psutil.disk_partitions(all=True))
        if Path(where).is_relative_to(mount.mountpoint)
    ]
    return max(above, default=(0, 0, "unknown"))[2]


def _folder(name: str) -> Folder:
    path = Path(name).expanduser()
    if not path.is_dir():
        return Folder(name, exists=False)
    try:
        # A name that nobody sees, gone when it is closed: to ask for permission would not show a full disk.
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(4096))
            file.flush()
    except OSError as error:
        return Folder(name, exists=True, refused=error.strerror or str(error), mounted=_mounted(path))
    return Folder(name, exists=True, mounted=_mounted(path))


def _limits(system: Path) -> Limits:
    return Limits(
        files=_soft(resource.RLIMIT_NOFILE),
        processes=_soft(resource.RLIMIT_NPROC),
        address_nbytes=_soft(resource.RLIMIT_AS),
        pids=_pids(system),
    )


def _soft(number: int) -> int | None:
    soft, _ = resource.getrlimit(number)
    return None if soft == resource.RLIM_INFINITY else soft


def _pids(system: Path) -> tuple[int, int] | None:
    """Of all cgroups from the process's own upwards, the one with the least room."""
    found = []
    for folder in folders("pids", system):
        most = parse_nbytes(folder.read("pids.max", system))
        now = parse_nbytes(folder.read("pids.current", system))
        if most is not None and now is not None:
            found.append((now, most))
    return min(found, key=lambda pair: pair[1] - pair[0], default=None)


def _private_ipc(system: Path) -> bool | None:
    try:
        return os.readlink(system / "proc/self/ns/ipc") != _FIRST_IPC_NAMESPACE
    except OSError:
        return None


def _container(environ: Mapping[str, str], system: Path) -> str:
    if "KUBERNETES_SERVICE_HOST" in environ:
        return "Kubernetes"
    if "APPTAINER_CONTAINER" in environ or "SINGULARITY_CONTAINER" in environ:
        return "Apptainer"
    if (system / ".dockerenv").exists():
        return "Docker"
    if (system / "run/.containerenv").exists():
        return "Podman"
    return ""


def _driver(text: str) -> str:
    """The version in `/proc/driver/nvidia/version`, `NVRM version: … Kernel Module  550.54.15  …`."""
    words = text.partition("\n")[0].split()
    return next((word for word in words if word[0].isdigit() and word.count(".") >= 1), "")
