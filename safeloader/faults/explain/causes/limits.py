"""R5, R8 and the full disk: limits of the system."""

from __future__ import annotations

from typing import Final

from safeloader.faults.explain.model import Cause, Sign, Weight

CAUSES: Final = (
    Cause(
        key="thread-limit",
        group="R5",
        title="No more processes or threads may be started",
        what=(
            "The limit for processes and threads of this user or container is reached. Each worker starts threads of "
            "its own for BLAS and OpenMP if nothing forbids it: 12 workers on 64 cores ask for hundreds."
        ),
        remedy=(
            "Forbid it: `export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1`.",
            "Use fewer workers: `nnUNet_n_proc_DA=4 nnUNetv2_train …`.",
            "Raise the limit: `ulimit -u 65536`; Docker: `--pids-limit=-1`. Look: `ulimit -u`, `cat "
            "/sys/fs/cgroup/pids.max`.",
        ),
        safeloader="SafeLoader's workers are forked from a clean process with one thread each, so it comes far later.",
        signs=(
            Sign("pthread_create failed for thread"),
            Sign("blas_thread_init: pthread_create"),
            Sign("blas_thread_init: RLIMIT_NPROC"),
            Sign("can't start new thread"),
            Sign("Resource temporarily unavailable", regex=r"BlockingIOError|fork:"),
            Sign("Thread creation failed"),
            Sign("Resource unavailable", regex=r"OMP: Error"),
        ),
        sources=("nnUNet#1343",),
    ),
    Cause(
        key="too-many-files",
        group="R8",
        title="The process ran out of file descriptors",
        what=(
            "PyTorch passes every tensor from worker to trainer as a file descriptor, and the limit for open files is "
            'reached. "received 0 items of ancdata" is how it says so.'
        ),
        remedy=(
            "Raise the limit in the shell or job script that starts the training: `ulimit -n 65536` (Docker: `--ulimit "
            "nofile=65536`).",
            "If it is not allowed: fewer workers, `nnUNet_n_proc_DA=4`.",
        ),
        safeloader="SafeLoader survives this: its number of descriptors is small and constant.",
        signs=(
            Sign("Too many open files"),
            Sign("Errno 24]"),
            Sign("items of ancdata"),
        ),
        sources=("nnUNet#130", "pytorch#973"),
    ),
    Cause(
        key="disk-full",
        group="",
        title="A disk is full, or a quota is used up",
        what="Something could not be written: a checkpoint, a log, unpacked data or a prediction.",
        remedy=(
            "Look for the full one: `df -h $nnUNet_results $nnUNet_preprocessed /tmp`, `df -i` (files may run out, "
            "too), and the quota: `quota -s` or your cluster's command.",
            "Make room, then continue with `--c`. If the newest checkpoint was cut off, remove checkpoint_latest.pth: "
            "checkpoint_best.pth is tried next.",
            "Files that were being unpacked are incomplete: `find $nnUNet_preprocessed/DATASET -name '*.npy' -delete` "
            "(only where .npz files exist).",
        ),
        safeloader="SafeLoader writes nothing but its report and can't help. Training goes on if only that fails.",
        signs=(
            Sign("No space left on device", regex=r"^(?!.*(?:torch_\d|/dev/shm|shared memory|failed to log))"),
            Sign("Disk quota exceeded"),
            Sign("requested and", regex=r"\d+ requested and \d+ written"),
            Sign("PytorchStreamWriter failed writing", sure=False),
            Sign("inline_container.cc", regex=r"unexpected pos", sure=False),
            Sign("iostream error", sure=False),
            Sign("failed to log:", weight=Weight.HINT, sure=False),
        ),
        sources=("nnUNet#1768", "nnUNet#441"),
        unless=("shm-full",),
    ),
)
