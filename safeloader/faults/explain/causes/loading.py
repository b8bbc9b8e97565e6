"""R6 and R7: what goes wrong in loading itself."""

from __future__ import annotations

from typing import Final

from safeloader.faults.explain.model import ANY_ERROR, Cause, Sign, Weight

_WAITING: Final = r"__get_next_item|consumer\.py:(?:take|_wait_for)$"

LOADER_BUG: Final = Cause(
    key="loader-bug",
    group="R6",
    title="The loader or a transform raised an exception in a worker",
    what=(
        "A worker ended with the quoted exception, and with it the training. It comes from the code that loads and "
        "augments the batches (its traceback is in the log), or from the data that it was given."
    ),
    remedy=(
        "Read the traceback upwards from the quoted line: the last line of your own code is the place.",
        "To see it in a debugger, without workers: `nnUNet_n_proc_DA=0 nnUNet_compile=F nnUNetv2_train …`.",
        "If there is no code of your own in it: preprocess again with the installed version, and search nnU-Net's "
        "issues for the quoted line.",
    ),
    safeloader=(
        "SafeLoader makes the batch again. If the exception comes again it is raised (or its case quarantined), with "
        "ticket, stage and case."
    ),
    sources=("nnUNet#2480", "nnUNet#1437"),
)

CAUSES: Final = (
    LOADER_BUG,
    Cause(
        key="unpicklable-batch",
        group="R6",
        title="A batch could not be sent from a worker to the trainer",
        what=(
            "The thread that sends a worker's batches failed. The stock loader does not notice: the batch is lost, and "
            "a training of which all batches are lost waits for ever."
        ),
        remedy=(
            "The quoted exception names what can't be pickled: let the loader and the transforms return tensors, "
            "arrays, numbers and strings.",
        ),
        safeloader="SafeLoader raises BatchNotPicklableError at that batch's place and names the part of the batch.",
        signs=(Sign("Error", regex=ANY_ERROR, within=r"queues\.py:_feed$", weight=Weight.WEAK),),
        unless=("shm-full", "too-many-files", "disk-full", "memory-refused", "thread-limit"),
    ),
    Cause(
        key="hang",
        group="R7",
        title="The training waited for a batch that did not come",
        what=(
            "It was interrupted while it waited for its workers, without an error from them: a hang. Usually storage "
            "that stalls, a full /dev/shm, or a worker that died while it held a lock."
        ),
        remedy=(
            "When it hangs again, look at the workers before you end it: `pip install py-spy`, `py-spy dump --pid PID` "
            "for each `nnUNetv2_train` of `ps -ef` (state D in `ps` is storage: `ls` the data folder).",
            "Look at /dev/shm: `df -h /dev/shm`, and at the data's file system: `sudo dmesg -T | tail`.",
        ),
        safeloader="SafeLoader survives this: a worker without progress is replaced, and its stacks are recorded.",
        signs=(Sign("KeyboardInterrupt", within=_WAITING, sure=False),),
        sources=("nnUNet#976", "nnUNet#1892", "nnUNet#696"),
        unless=("shm-full", "storage-failed", "data-corrupt"),
    ),
    Cause(
        key="ddp-stalled",
        group="R7",
        title="One rank of the distributed training stalled, and the others gave up",
        what=(
            "NCCL ends all ranks when one has not taken part for 600 s (or has died). The message comes from a rank "
            "that waited; what held up the other one is not in this log."
        ),
        remedy=(
            "Look at the output of every rank for the one that did not print a timeout, or failed before it.",
            "If it is in validation: `--val` on one GPU. If a rank was loading: the loader hung, see `df -h /dev/shm` "
            "and the storage.",
            "For more of NCCL's own view: `NCCL_DEBUG=INFO TORCH_DISTRIBUTED_DEBUG=DETAIL`.",
        ),
        safeloader="SafeLoader replaces a worker that hangs after at most 240 s under DDP, long before NCCL gives up.",
        signs=(
            Sign("Watchdog caught collective operation timeout", sure=False, weight=Weight.WEAK),
            Sign("Timeout at NCCL work", sure=False, weight=Weight.WEAK),
            Sign("NCCL communicator was aborted", sure=False, weight=Weight.WEAK),
            Sign("NCCL error", sure=False, weight=Weight.WEAK),
            Sign("DistBackendError", sure=False, weight=Weight.WEAK),
            Sign("ncclRemoteError", sure=False, weight=Weight.WEAK),
            Sign("Connection closed by peer", sure=False, weight=Weight.WEAK),
        ),
        sources=("nnUNet#1516", "nnUNet#1771"),
    ),
)
