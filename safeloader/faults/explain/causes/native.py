"""R5: native code."""

from __future__ import annotations

from typing import Final

from safeloader.faults.explain.model import Cause, Sign, Weight

_REPLACED: Final = (
    "SafeLoader replaces the worker, makes its batch again, and names the signal, the stage and the case."
)

CAUSES: Final = (
    Cause(
        key="heap-corruption",
        group="R5",
        title="Native code corrupted its memory, and glibc ended the process",
        what=(
            "A C or C++ library wrote where it must not. Known reasons: workers forked while BLAS or OpenMP threads "
            "were running, two versions of one library in one process (conda and pip), and bad RAM."
        ),
        remedy=(
            "`export OMP_NUM_THREADS=1` before the training starts, and update: `pip install -U threadpoolctl blosc2 "
            "numpy batchgenerators`.",
            "If it stays, install nnU-Net in a new environment, all of it with pip (no conda packages of numpy, MKL or "
            "blosc2).",
            "If other programs crash on this machine too: test its memory (`memtester 4G 1`).",
        ),
        safeloader=f"{_REPLACED} Its workers are forked from a clean process without threads.",
        signs=(
            Sign("double free or corruption"),
            Sign("corrupted size vs. prev_size"),
            Sign("corrupted unsorted chunks"),
            Sign("corrupted double-linked list"),
            Sign("free(): invalid"),
            Sign("munmap_chunk(): invalid"),
            Sign(
                "malloc(): ", regex=r"malloc\(\): (?:invalid|corrupt|memory corruption|unaligned|mismatching|unsorted)"
            ),
            Sign("malloc_consolidate(): "),
            Sign("realloc(): invalid"),
            Sign("*** stack smashing detected"),
        ),
        sources=("nnUNet#2557", "nnUNet#2599", "nnUNet#2523", "batchgenerators#138"),
    ),
    Cause(
        key="threadpoolctl-old",
        group="R5",
        title="threadpoolctl is too old for the BLAS library here",
        what="Each worker asks threadpoolctl to use one thread only, and that version fails to ask this BLAS library.",
        remedy=("`pip install -U threadpoolctl` (3.1 or later).",),
        safeloader="SafeLoader's workers need no threadpoolctl.",
        signs=(Sign("'NoneType' object has no attribute 'split'", within=r"threadpoolctl"),),
        sources=("nnUNet#2166", "nnUNet#1505", "nnUNet#1406"),
    ),
    Cause(
        key="native-crash",
        group="R5",
        title="A process crashed in native code",
        what=(
            "A compiled library accessed invalid memory or executed an invalid instruction. Which one, the log does "
            "not "
            'say; with a stack dump, the topmost frames of the "Current thread" do.'
        ),
        remedy=(
            "Have the stack printed: `PYTHONFAULTHANDLER=1 nnUNetv2_train …`; the kernel's view: `sudo dmesg -T | grep "
            "-i segfault`.",
            "If it crashes at the first use of the GPU, PyTorch and driver don't fit. Else update the library that the "
            "stack names, or install nnU-Net in a new environment.",
        ),
        safeloader=f"If it was a worker: {_REPLACED[0].lower() + _REPLACED[1:]} If it was the trainer, it can't help.",
        signs=(
            Sign("Segmentation fault", weight=Weight.WEAK),
            Sign("Fatal Python error:", weight=Weight.WEAK),
            Sign("Illegal instruction", weight=Weight.WEAK),
            Sign("(core dumped)", weight=Weight.WEAK),
            Sign("exit code 139", weight=Weight.WEAK),
            Sign("terminated with signal SIGSEGV", weight=Weight.WEAK),
            Sign("terminated with signal SIGABRT", weight=Weight.WEAK, sure=False),
            Sign("terminate called", weight=Weight.HINT, sure=False),
            Sign("SIGSEGV", regex=r"^(?!.*SafeLoader)", weight=Weight.WEAK, sure=False),
        ),
        sources=("nnUNet#3051", "nnUNet#1963"),
        unless=("heap-corruption", "device-assert", "label-out-of-range", "bus-error", "cuda-error", "ddp-stalled"),
    ),
)
