"""R3 and R4: the machine's memory, and /dev/shm."""

from __future__ import annotations

from typing import Final

from safeloader.faults.explain.model import Cause, Sign, Weight

_FEWER: Final = (
    "Use fewer workers: `nnUNet_n_proc_DA=4 nnUNetv2_train …` (default 12; each takes 1 to 4 GB). For validation and "
    "export: `nnUNet_def_n_proc=2`."
)
_MORE: Final = "Or ask for more memory: Slurm `--mem=64G`, Docker `--memory=64g`, Kubernetes `resources.limits.memory`."
_SAFELOADER: Final = (
    "SafeLoader survives the kill of a worker: it goes on with one worker less, and makes the kernel take a worker "
    "rather than the trainer. It can't survive the kill of the trainer."
)

CAUSES: Final = (
    Cause(
        key="out-of-memory",
        group="R3",
        title="The machine's memory ran out, and the kernel killed a process",
        what=(
            "The memory of the job (or the machine) was used up, and the kernel's OOM killer killed one of its "
            "processes: a worker, a process that exports predictions, or the trainer itself. This is not the GPU's "
            "memory."
        ),
        remedy=(
            _FEWER,
            _MORE,
            "See what was used: `sacct -j JOBID --format=JobID,State,ExitCode,MaxRSS,ReqMem`, or `sudo dmesg -T | grep "
            "-i 'killed process'`.",
        ),
        safeloader=_SAFELOADER,
        signs=(
            Sign("oom_kill event"),
            Sign("oom-kill", regex=r"oom-kill(?:er)?[: ]|oom-kill event"),
            Sign("Out of memory: Kill"),
            Sign("Memory cgroup out of memory"),
            Sign("OOM Killed"),
            Sign("OOMKilled"),
            Sign("OUT_OF_MEMORY"),
            Sign(": Out Of Memory", regex=r"srun: error"),
            Sign("Exceeded job memory limit"),
            Sign("exceeded memory limit", regex=r"slurmstepd|Job|Step"),
            Sign("TERM_MEMLIMIT"),
            Sign("OOM kill", regex=r"RestartLimitError"),
        ),
        sources=("nnUNet#2708", "nnUNet#2863", "nnUNet#2239"),
    ),
    Cause(
        key="trainer-killed",
        group="R3",
        title="The training process was killed from outside (SIGKILL)",
        what=(
            "It got the signal SIGKILL, which leaves it no time for a message. Most often the kernel sends it because "
            "memory ran out; a scheduler or a person may do so, too. The log does not say who it was."
        ),
        remedy=(
            "Find out who sent it: `sudo dmesg -T | grep -i 'killed process'` (the kernel), `sacct -j JOBID "
            "--format=JobID,State,ExitCode,MaxRSS,ReqMem` (Slurm).",
            f"If it was memory: {_FEWER[0].lower()}{_FEWER[1:]}",
            _MORE,
            "What was printed last may be missing: Python keeps up to 8 KiB back when it writes into a file "
            "(`PYTHONUNBUFFERED=1` prevents that). Continue with `--c`.",
        ),
        safeloader=_SAFELOADER,
        signs=(
            Sign("Killed", regex=r"^(?:.*: line \d+:\s+\d+ )?Killed(?:\s{2,}.*|\s*\(core dumped\))?$", sure=False),
            Sign("exit code 137", sure=False),
            Sign("exit code: 137", sure=False),
            Sign("Exited (137)", sure=False),
            Sign("interrupted by signal 9", sure=False),
            Sign("terminated with signal SIGKILL", sure=False),
            Sign("exitcode  : -9", sure=False),
        ),
        sources=("nnUNet#469", "nnUNet#187", "nnUNet#818"),
        unless=("out-of-memory", "scheduler-time-limit", "scheduler-preempted", "scheduler-cancelled", "node-failed"),
    ),
    Cause(
        key="memory-refused",
        group="R3",
        title="A process was refused memory (MemoryError)",
        what=(
            "The system did not give a process the memory that it asked for. Either memory, its limit or the paging "
            "file is used up, or it asked for an absurd amount because a file or a number is wrong: look at the quoted "
            "size."
        ),
        remedy=(
            _FEWER,
            _MORE,
            "Look at the limits: `free -g`, `ulimit -v`. On Windows: make the paging file larger (System, Performance, "
            "Virtual memory).",
        ),
        safeloader=(
            "SafeLoader makes the batch again; if it is refused again, it ends with the exception and names the case."
        ),
        signs=(
            Sign("MemoryError", regex=r"(?:^|[\s.]|Array)MemoryError(?::|$)"),
            Sign("Unable to allocate", regex=r"Unable to allocate [\d.]+ [KMGTP]iB for an array"),
            Sign("can't allocate memory"),
            Sign("Cannot allocate memory"),
            Sign("std::bad_alloc"),
            Sign("paging file is too small"),
            Sign("WinError 1455"),
        ),
        sources=("nnUNet#1761", "nnUNet#835"),
        unless=("out-of-memory", "shm-full"),
    ),
    Cause(
        key="shm-full",
        group="R4",
        title="/dev/shm is too small",
        what=(
            "The stock loader sends batches through shared memory in /dev/shm, which is full. Docker gives a container "
            "64 MiB of it; one batch is often more. Depending on where it hits, the training dies, loses batches, or "
            "hangs for ever."
        ),
        remedy=(
            "Docker: `docker run --ipc=host …` or `--shm-size=16g`. Kubernetes: mount an emptyDir with `medium: "
            "Memory` at /dev/shm. Look: `df -h /dev/shm`.",
            "Where that can't be changed: SafeLoader needs no /dev/shm (`safeloader install`, then `-tr "
            "nnUNetTrainerSafeLoader`).",
            "If /dev/shm is large, remove what dead processes left there: `ls -l /dev/shm`, `rm /dev/shm/torch_*` "
            "while no training runs.",
        ),
        safeloader="SafeLoader survives this: it uses memory files and nothing of /dev/shm.",
        signs=(
            Sign("unable to allocate shared memory(shm)"),
            Sign("unable to write to file </torch_"),
            Sign("unable to open shared memory object"),
            Sign("insufficient shared memory"),
            Sign("out of shared memory"),
            Sign("No space left on device", regex=r"/dev/shm"),
            Sign(
                "No space left on device",
                within=r":_feed$|:_share_|shared_memory\.py|multiprocessing[/\\]heap\.py|reductions\.py",
            ),
        ),
        sources=("nnUNet#2162", "nnUNet#1411", "nnUNet#398", "nnUNet#294", "nnUNet#1910"),
    ),
    Cause(
        key="pool-worker-died",
        group="R3",
        title="A process that preprocesses, predicts or exports was killed",
        what=(
            "nnU-Net found that a process of its pool is gone. That process printed no error, so it was killed or "
            "crashed; mostly memory ran out, since whole images with all classes are held there. It is not the loader."
        ),
        remedy=(
            "Use fewer of them: `nnUNet_def_n_proc=1 nnUNetv2_train DATASET CONFIG FOLD --val` only repeats the "
            "validation, the training is kept. Preprocessing: `-np 2`. Prediction: `-npp 1 -nps 1`.",
            "See whether it was memory: `sudo dmesg -T | grep -i 'killed process'`, or `sacct -j JOBID "
            "--format=State,MaxRSS,ReqMem`.",
            _MORE,
        ),
        safeloader="SafeLoader makes training batches only; this pool is nnU-Net's own.",
        signs=(
            Sign("Some background workers are no longer alive", sure=False, weight=Weight.WEAK),
            Sign("Some background worker is 6 feet under", sure=False, weight=Weight.WEAK),
            Sign("Background workers died", sure=False, weight=Weight.WEAK),
        ),
        sources=("nnUNet#2182", "nnUNet#2607", "nnUNet#2412", "nnUNet#2398", "nnUNet#2094"),
    ),
)
