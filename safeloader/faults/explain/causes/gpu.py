"""R1, second half, and R9: what fails on the GPU, in the training process."""

from __future__ import annotations

from typing import Final

from safeloader.faults.explain.model import ANY_ERROR, Cause, Sign, Weight

_CONTEXT: Final = (
    "SafeLoader can't help: a CUDA context that has failed stays failed until its process ends. Nothing is lost but "
    "the time since the last checkpoint: continue with `--c`."
)
_PINNING: Final = r"pin_memory|_pin_memory_recursive"

CAUSES: Final = (
    Cause(
        key="label-out-of-range",
        group="R1",
        title="A label in the training data is outside of what dataset.json declares",
        what=(
            "The loss was given a label that is not among the classes: a value in a segmentation file that "
            "dataset.json does not have, or a gap in its numbering. On a GPU this shows as a device-side assert."
        ),
        remedy=(
            "Check the labels: `nnUNetv2_plan_and_preprocess -d DATASET --verify_dataset_integrity`; labels in "
            "dataset.json must be 0, 1, 2, … without a gap. Correct the files and preprocess again.",
            "If they are right, the preprocessed data may be older than dataset.json: delete "
            "`$nnUNet_preprocessed/DATASET` and preprocess again. A transform of your own may also make such labels.",
        ),
        safeloader="SafeLoader can't survive it: the data is wrong, and the GPU's context is gone.",
        signs=(
            Sign("n_classes", regex=r"Assertion .?(?:t|cur_target) >= 0 && (?:t|cur_target) < n_classes"),
            Sign("idx_dim >= 0 && idx_dim < index_size"),
            Sign("out of bounds", regex=r"IndexError: Target -?\d+ is out of bounds"),
            Sign("out of bounds", regex=r"index -?\d+ is out of bounds for dimension 1 with size", within=r"loss[/\\]"),
        ),
        sources=("nnUNet#139", "nnUNet#1674", "nnUNet#1088"),
    ),
    Cause(
        key="device-assert",
        group="R1",
        title="A check in GPU code failed (device-side assert)",
        what=(
            "A CUDA kernel stopped at an assertion. In nnU-Net that is mostly a label outside of the declared classes; "
            "the line that names the assertion is not in this log."
        ),
        remedy=(
            "Run again with `CUDA_LAUNCH_BLOCKING=1 nnUNet_compile=F nnUNetv2_train …`: the traceback then ends at the "
            "operation that failed.",
            "Check the labels: `nnUNetv2_plan_and_preprocess -d DATASET --verify_dataset_integrity`.",
            "If it happens at another epoch each time and the labels are right, suspect the GPU: nnUNet#1419.",
        ),
        safeloader=_CONTEXT,
        signs=(Sign("device-side assert triggered"),),
        sources=("nnUNet#1419", "nnUNet#144"),
        unless=("label-out-of-range",),
    ),
    Cause(
        key="gpu-out-of-memory",
        group="R1",
        title="The GPU's memory was not enough for the network",
        what="The training process asked for more GPU memory than was free. The workers use none of it.",
        remedy=(
            "See who else uses the GPU: `nvidia-smi`. Processes of an earlier training that was killed may still hold "
            "it.",
            "Plan for a smaller GPU: `nnUNetv2_plan_experiment -d DATASET -gpu_memory_target 8 -overwrite_plans_name "
            "nnUNetPlans_8G`, preprocess, and train with `-p nnUNetPlans_8G`.",
            "If it comes after hours, or differs between runs: `export "
            "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True`.",
        ),
        safeloader=(
            "SafeLoader can't help: the model's own memory is not the loader's. Its workers never touch the GPU."
        ),
        signs=(
            Sign("CUDA out of memory"),
            Sign("CUDA error: out of memory"),
            Sign("OutOfMemoryError", regex=r"cuda\.OutOfMemoryError|torch\.OutOfMemoryError"),
            Sign("CUBLAS_STATUS_ALLOC_FAILED"),
            Sign("HIP out of memory"),
            Sign("cuda runtime error", regex=r"out of memory"),
        ),
        sources=("nnUNet#1701", "nnUNet#2814"),
    ),
    Cause(
        key="pinned-memory",
        group="R1",
        title="The thread that copies batches into pinned memory failed",
        what=(
            "Each batch is copied into page-locked memory for the GPU, in a thread of the training process. CUDA "
            "refused: the GPU's context is broken, or this machine may lock no more memory. The workers are not to "
            "blame."
        ),
        remedy=(
            "Look at the limit for locked memory: `ulimit -l` (unlimited is best; Docker: `--ulimit memlock=-1`).",
            'Look whether the GPU works at all: `nvidia-smi`, and `python -c "import torch; '
            'torch.zeros(1).pin_memory().cuda()"`.',
        ),
        safeloader="It fails with SafeLoader as well: pinning needs a GPU that works.",
        signs=(Sign("Error", regex=ANY_ERROR, within=_PINNING),),
        sources=("nnUNet#2238",),
        unless=("label-out-of-range", "device-assert", "gpu-setup", "gpu-lost", "gpu-out-of-memory", "too-many-files"),
    ),
    Cause(
        key="cuda-error",
        group="R1",
        title="A CUDA operation failed in the training process",
        what=(
            "The log names the failed operation, but not why it failed. CUDA often reports an error later than it "
            "happens."
        ),
        remedy=(
            "Run again with `CUDA_LAUNCH_BLOCKING=1 nnUNet_compile=F nnUNetv2_train …`, so that the traceback ends at "
            "the right place, and read `sudo dmesg -T | grep -iE 'xid|nvrm'`.",
            "cuDNN errors often mean that GPU memory ran out, or that PyTorch and driver don't fit: `nvidia-smi`.",
        ),
        safeloader=_CONTEXT,
        signs=(
            Sign("CUDA error:", sure=False, weight=Weight.WEAK),
            Sign("cuDNN error:", sure=False, weight=Weight.WEAK),
            Sign("CUBLAS_STATUS_", sure=False, weight=Weight.WEAK),
            Sign("cuda runtime error", sure=False, weight=Weight.WEAK),
        ),
        sources=("nnUNet#938", "nnUNet#548"),
        unless=("label-out-of-range", "device-assert", "gpu-out-of-memory", "gpu-lost", "gpu-setup", "pinned-memory"),
    ),
    Cause(
        key="cuda-in-worker",
        group="R6",
        title="A transform or loader uses the GPU inside a worker",
        what="Workers are forked, and a forked process can't use CUDA. Something that runs in them called `.cuda()`.",
        remedy=(
            "Keep transforms and loader on the CPU: the line of your code below the traceback's last frames names the "
            "call. The training step moves each batch to the GPU.",
        ),
        safeloader=(
            "SafeLoader's workers are forked too (from a clean process): it raises the same error, with the case."
        ),
        signs=(Sign("Cannot re-initialize CUDA in forked subprocess"),),
        sources=("pytorch#40403",),
    ),
)
