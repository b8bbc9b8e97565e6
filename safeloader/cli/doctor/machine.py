"""What the machine, a container or the scheduler allows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from safeloader.cli.doctor.check import Check, Finding, breaks, note, ok, unknown, warning
from safeloader.cli.doctor.facts import Facts
from safeloader.faults.memory import gib

_DEFAULT_WORKERS: Final = 12
"""nnU-Net's number of training workers, if `nnUNet_n_proc_DA` is not set; 8 to 32 for some cards."""

_FEW_GIB: Final = 16
_STOCK_SHM_NBYTES: Final = 2 << 30
"""12 + 6 workers with batches of 26 MB, as nnU-Net caches them: about 36 lie in /dev/shm, and as much again while they
are passed on."""
_FEW_FILES: Final = 512
"""12 + 6 workers and their slots take 150 to 210; nnU-Net's files that stay open, up to a quarter of the limit."""
_FEW_PROCESSES: Final = 256


class Cpus(Check):
    """Are there CPUs for the workers that nnU-Net asks for: by affinity and cgroup, not by what the machine has?"""

    title = "CPUs"

    def look(self, facts: Facts) -> Finding | None:
        """Compare `nnUNet_n_proc_DA` with the CPUs there are."""
        asked = facts.environ.get("nnUNet_n_proc_DA", "")
        if asked and not asked.strip().isdecimal():
            return breaks(f"nnUNet_n_proc_DA={asked} is no number of workers", "export nnUNet_n_proc_DA=12")
        workers = int(asked) if asked else _DEFAULT_WORKERS
        cpus, reason = facts.cpus.cpus, facts.cpus.reason
        if workers == 0:
            what = "nnUNet_n_proc_DA=0: batches are made in the training process itself, which nothing protects"
            return note(what, f"export nnUNet_n_proc_DA={cpus}")
        source = "nnUNet_n_proc_DA asks" if asked else "nnU-Net asks"
        if workers <= cpus:
            return ok(f"{reason}; {source} for {workers} workers")
        lowered = f"{reason}; {source} for {workers} workers, and SafeLoader starts {cpus}"
        return note(lowered, _more_cpus(facts.environ))


def _more_cpus(environ: Mapping[str, str]) -> str:
    if "SLURM_JOB_ID" in environ:
        return f"sbatch --cpus-per-task={_DEFAULT_WORKERS} …, if training waits for batches"
    return ""


class Memory(Check):
    """Is there memory for a training and its workers, in the cgroup and on the machine?"""

    title = "memory"

    def look(self, facts: Facts) -> Finding | None:
        """Less than 16 GiB may not suffice."""
        if facts.memory is None:
            return unknown("neither a limit nor the machine's memory can be read")
        if facts.memory.nbytes >= _FEW_GIB << 30:
            return ok(facts.memory.reason)
        left = f"{gib(facts.memory.nbytes)} are left for the training and its workers"
        return warning(
            f"{facts.memory.reason}: {left}. SafeLoader starts as many workers as fit; the training itself may not fit",
            _more_memory(facts) + "export nnUNet_n_proc_DA=4",
        )


def _more_memory(facts: Facts) -> str:
    if "SLURM_JOB_ID" in facts.environ:
        return "sbatch --mem=32G …, or "
    return "docker run --memory=32g …, or " if facts.container in ("Docker", "Podman") else ""


class SharedMemory(Check):
    """Is `/dev/shm` large enough for stock nnU-Net? SafeLoader does not use it."""

    title = "/dev/shm"

    def look(self, facts: Facts) -> Finding | None:
        """Docker gives 64 MiB, unless it is asked for more."""
        remedy = "for trainings without SafeLoader: docker run --ipc=host … (or --shm-size=8g)"
        if facts.shm is None:
            return note("there is none; SafeLoader needs none, stock nnU-Net does", remedy)
        size = f"{gib(facts.shm.size_nbytes)}, {gib(facts.shm.free_nbytes)} free"
        if facts.private_ipc:
            size += ", in an IPC namespace of the container's own"
        if facts.shm.free_nbytes >= _STOCK_SHM_NBYTES:
            return ok(f"{size}; SafeLoader does not use it")
        return note(f"{size}: too small for stock nnU-Net's batches; SafeLoader does not use it", remedy)


class OpenFiles(Check):
    """How many files may be open (`ulimit -n`)?"""

    title = "open files"

    def look(self, facts: Facts) -> Finding | None:
        """SafeLoader's number is constant, but not small."""
        files = facts.limits.files
        if files is None or files >= _FEW_FILES:
            return ok("no limit" if files is None else f"{files} at a time")
        return warning(f"only {files} at a time", "ulimit -n 4096")


class Processes(Check):
    """How many processes and threads may there be (`ulimit -u`, the cgroup's `pids.max`)?"""

    title = "processes"

    def look(self, facts: Facts) -> Finding | None:
        """Threads count as well: torch starts dozens."""
        limits = facts.limits
        if limits.pids is not None and limits.pids[1] - limits.pids[0] < _FEW_PROCESSES:
            now, most = limits.pids
            return warning(
                f"the cgroup allows {most} processes and threads, and has {now}", "docker run --pids-limit=-1 …"
            )
        if limits.processes is not None and limits.processes < _FEW_PROCESSES:
            return warning(f"only {limits.processes} processes and threads of this user", "ulimit -u 4096")
        counts = [str(limits.processes)] if limits.processes is not None else []
        counts += [f"{limits.pids[1]} in the cgroup"] if limits.pids is not None else []
        return ok(f"{', '.join(counts) or 'no limit'}")


class AddressSpace(Check):
    """Is the address space limited (`ulimit -v`)? CUDA reserves far more than it uses."""

    title = "address space"

    def look(self, facts: Facts) -> Finding | None:
        """Some clusters set it in place of a memory limit."""
        limit = facts.limits.address_nbytes
        if limit is None:
            return None
        what = f"limited to {gib(limit)}; CUDA reserves as much as the machine and all its cards have, and more"
        return warning(what, "ulimit -v unlimited (limit memory by the cgroup instead)")


class Container(Check):
    """In which container is this?"""

    title = "container"

    def look(self, facts: Facts) -> Finding | None:
        """Only evidence: what it limits has checks of its own."""
        return ok(facts.container) if facts.container else None


class Slurm(Check):
    """What did Slurm give this job?"""

    title = "Slurm"

    def look(self, facts: Facts) -> Finding | None:
        """A job that asked for no CPUs has one."""
        job = facts.environ.get("SLURM_JOB_ID")
        if job is None:
            return None
        given = [
            f"{what} {facts.environ[name]}"
            for name, what in (
                ("SLURM_CPUS_PER_TASK", "CPUs per task:"),
                ("SLURM_MEM_PER_NODE", "MiB per node:"),
                ("SLURM_JOB_GPUS", "GPUs:"),
            )
            if name in facts.environ
        ]
        said = f"job {job}{'; ' if given else ''}{', '.join(given)}"
        if "SLURM_CPUS_PER_TASK" not in facts.environ:
            return note(f"{said}; it did not ask for CPUs", "sbatch --cpus-per-task=12 …")
        return ok(said)
