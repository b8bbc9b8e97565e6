"""What SafeLoader's own errors mean."""

from __future__ import annotations

from typing import Final

from safeloader.faults.explain.model import Cause, Sign, Weight

CAUSES: Final = (
    Cause(
        key="safeloader-gave-up",
        group="",
        title="SafeLoader gave a pool of workers up",
        what=(
            "Workers died again and again without one batch in between, so that a restart made no sense any more. The "
            "quoted message counts the causes, the most frequent first, and has the last death in full."
        ),
        remedy=(
            "SIGKILL: mostly memory. `sudo dmesg -T | grep -i 'killed process'`, then `nnUNet_n_proc_DA=4` or more "
            "memory.",
            "SIGBUS: storage or a truncated file. SIGSEGV, SIGABRT: native code; `PYTHONFAULTHANDLER=1` prints the "
            "stack.",
            "`safeloader explain` on safeloader_incidents.jsonl in the training's folder tells more.",
        ),
        safeloader="",
        signs=(Sign("RestartLimitError: "),),
        unless=("out-of-memory",),
    ),
    Cause(
        key="safeloader-storage",
        group="R2",
        title="SafeLoader gave up on data that could not be read",
        what="Cases stayed unreadable for longer, or were more, than SafeLoader may pass over.",
        remedy=(
            "Look whether the files that the message names can be read: `cat FILE > /dev/null`, `sudo dmesg -T | "
            "tail`.",
            "`safeloader explain` on safeloader_incidents.jsonl in the training's folder lists the cases.",
        ),
        signs=(Sign("QuarantineLimitError: "), Sign("OutageError: "), Sign("BadCaseError: ")),
    ),
    Cause(
        key="safeloader-start",
        group="R6",
        title="No worker could start with this loader",
        what="The loader, or a part of it, raised an exception in every worker before the first batch.",
        remedy=("The traceback above the message is the worker's: its last line says what failed.",),
        signs=(Sign("errors.StartError: ", weight=Weight.WEAK), Sign("no worker of pool", weight=Weight.WEAK)),
    ),
    Cause(
        key="safeloader-finite-loader",
        group="R6",
        title="The loader came to its end",
        what="SafeAugmenter takes loaders that go on for ever; this one raised StopIteration.",
        remedy=("`DataLoader(…, infinite=True)` in batchgenerators; for finite epochs SafeMultiThreadedAugmenter.",),
        signs=(Sign("LoaderFinishedError: "),),
    ),
    Cause(
        key="safeloader-unpicklable",
        group="R6",
        title="A batch holds something that can't be sent to the trainer",
        what="What the loader or a transform returned can't be pickled; the message names the place in the batch.",
        remedy=("Return tensors, arrays, numbers and strings there.",),
        signs=(Sign("BatchNotPicklableError: "),),
    ),
    Cause(
        key="safeloader-export",
        group="R3",
        title="Not all predictions of the validation could be exported",
        what=(
            "Each was tried up to three times, and all others are done and kept. The quoted message says for each case "
            "what its process died of, or which exception it raised."
        ),
        remedy=(
            "Killed or out of memory: more memory, or fewer exports at a time (`nnUNet_def_n_proc=2`).",
            "An exception: the traceback above the message is that of the first one.",
            "Then the same command with `--val`: it makes only what is missing.",
        ),
        signs=(Sign("errors.ExportError: ", weight=Weight.WEAK),),
    ),
    Cause(
        key="safeloader-bug",
        group="",
        title="SafeLoader itself failed",
        what="Its supervisor ended with an error: a bug of SafeLoader.",
        remedy=(
            "Train with the stock loader meanwhile: leave out `-tr nnUNetTrainerSafeLoader`.",
            "Report it with the whole traceback.",
        ),
        signs=(Sign("errors.InternalError: "),),
    ),
)
