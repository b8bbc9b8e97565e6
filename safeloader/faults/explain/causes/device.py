"""R1 and R9: a GPU that failed, or that PyTorch can't use."""

from __future__ import annotations

from typing import Final

from safeloader.faults.explain.model import Cause, Sign

_CONTEXT: Final = (
    "SafeLoader can't help: a CUDA context that has failed stays failed until its process ends. Nothing is lost but "
    "the time since the last checkpoint: continue with `--c`."
)

CAUSES: Final = (
    Cause(
        key="gpu-lost",
        group="R9",
        title="The GPU or its driver failed",
        what=(
            "The driver reports an error that a program can't repair: the GPU is gone, its memory is faulty, or a "
            "kernel was stopped. Overheating, power, cabling, the driver and faulty memory are the usual reasons."
        ),
        remedy=(
            "Ask the kernel: `sudo dmesg -T | grep -iE 'xid|nvrm'` (48 and 63: memory; 79: fallen off the bus; 13, 31 "
            "and 43: often a program's fault), and `nvidia-smi -q -d ECC,TEMPERATURE,POWER`.",
            "Restart the machine, or ask for another node: `sbatch --exclude=NODE`. Then continue with `--c`.",
        ),
        safeloader=_CONTEXT,
        signs=(
            Sign("NVRM: Xid"),
            Sign("GPU has fallen off the bus"),
            Sign("uncorrectable ECC error"),
            Sign("uncorrectable NVLink error"),
            Sign("Unable to determine the device handle"),
            Sign("unspecified launch failure", sure=False),
            Sign("an illegal memory access was encountered", sure=False),
            Sign("the launch timed out and was terminated", sure=False),
            Sign("CUDA error: unknown error", sure=False),
            Sign("misaligned address", regex=r"CUDA error", sure=False),
        ),
        sources=("nnUNet#1519", "nnUNet#2145"),
        unless=("label-out-of-range", "device-assert"),
    ),
    Cause(
        key="gpu-setup",
        group="R1",
        title="PyTorch can't use a GPU here",
        what=(
            "The training was to run on a GPU that PyTorch does not find or can't use: driver, PyTorch and GPU must "
            "fit."
        ),
        remedy=(
            "Look: `nvidia-smi`, and `python -c 'import torch; print(torch.__version__, torch.version.cuda, "
            "torch.cuda.is_available(), torch.cuda.get_arch_list())'`.",
            "Install the PyTorch that fits driver and GPU (https://pytorch.org), or update the driver. In Docker: "
            "`--gpus all`; with Slurm: `--gres=gpu:1`. Without a GPU: `nnUNetv2_train … -device cpu`.",
        ),
        safeloader="It fails with SafeLoader as well.",
        signs=(
            Sign("Found no NVIDIA driver"),
            Sign("No CUDA GPUs are available"),
            Sign("no kernel image is available"),
            Sign("device kernel image is invalid"),
            Sign("NVIDIA driver on your system is too old", regex=r"^(?!.*Warning)"),
            Sign("driver version is insufficient"),
            Sign("Torch not compiled with CUDA enabled"),
            Sign("invalid device ordinal"),
            Sign("CUDA-capable device(s) is/are busy"),
            Sign("CUDA-capable devices are busy"),
            Sign("forward compatibility was attempted"),
        ),
        sources=("nnUNet#2243", "nnUNet#1040", "nnUNet#2160", "nnUNet#1635"),
    ),
)
