"""The answers that are no causes: nothing went wrong, or it is not in the log. Each says what to look at next."""

from __future__ import annotations

from typing import Final

from safeloader.faults.explain.model import Answer, Cause

_WHOLE_OUTPUT: Final = (
    "Keep all of the output: `PYTHONUNBUFFERED=1 nnUNetv2_train … > train.log 2>&1`. With Slurm look into the file of "
    "`--error`, too (without that option both are in slurm-JOBID.out)."
)
_KERNEL: Final = (
    "Ask the kernel on the machine that trained: `sudo dmesg -T | grep -iE 'killed process|out of "
    "memory|segfault|xid'`; with Slurm: `sacct -j JOBID --format=JobID,State,ExitCode,MaxRSS,ReqMem`."
)
_SAFELOADER: Final = (
    "A worker that dies is replaced, and one line names its signal, stage and case: `safeloader install`, then train "
    "with `-tr nnUNetTrainerSafeLoader`."
)

HEALTHY: Final = Cause(
    key="healthy",
    group="",
    title="Nothing went wrong: the training finished",
    what="The log has the end of the training, and no error that stopped it.",
    remedy=(),
    answer=Answer.HEALTHY,
)

SYMPTOM_ONLY: Final = Cause(
    key="unknown-symptom-only",
    group="",
    title="I don't know: the log has only the message that follows any failure",
    what=(
        '"One or more background workers are no longer alive" is printed last after every failure: if a worker '
        "dies, and "
        "also if the training process itself fails (a third of all cases: torch.compile, the GPU, a label). The cause "
        "was printed before, and that part of the output is missing here."
    ),
    remedy=(
        "Look for the first traceback or error above the message, not for the last. nnU-Net's training_log_*.txt never "
        "has it: only what nnU-Net itself logs goes there, so stderr (all tracebacks, messages of gcc, glibc and CUDA) "
        "is in the terminal or the job's output only.",
        _WHOLE_OUTPUT,
        _KERNEL,
        "Two tests that split the causes: `nnUNet_compile=F nnUNetv2_train …` (if it trains, it was torch.compile), "
        "and `df -h /dev/shm` (64M is too small).",
    ),
    safeloader=_SAFELOADER,
    answer=Answer.UNKNOWN,
)

SILENT_DEATH: Final = Cause(
    key="unknown-silent-death",
    group="",
    title="I don't know: a worker ended without a word",
    what=(
        "The training stopped because a worker process was gone. A Python exception in a worker would have been "
        "printed, and this log has the tracebacks of the training process; so the worker was killed by a signal, or "
        "something called exit in it. Which signal, the stock loader does not say. Lack of memory is the most frequent "
        "reason (SIGKILL), then crashes in native code (SIGSEGV) and truncated files or storage (SIGBUS)."
    ),
    remedy=(
        _KERNEL,
        "If it was memory: fewer workers, `nnUNet_n_proc_DA=4 nnUNetv2_train …`, or more memory (Slurm: `--mem`).",
        "If it was a crash: `export OMP_NUM_THREADS=1 PYTHONFAULTHANDLER=1` and run again; the stack is then printed.",
        "If a part of the output is missing here: " + _WHOLE_OUTPUT[0].lower() + _WHOLE_OUTPUT[1:],
    ),
    safeloader=_SAFELOADER,
    answer=Answer.UNKNOWN,
)

CUT_OFF: Final = Cause(
    key="unknown-cut-off",
    group="",
    title="I don't know: the log ends in the middle, without an error",
    what=(
        "The training is still running, or hangs, or its process was killed without a word (SIGKILL, a restart of the "
        "machine), or the error was written elsewhere."
    ),
    remedy=(
        "See whether it still runs: `ps -ef | grep nnUNetv2_train`, `nvidia-smi`, `squeue --me`. If it does and "
        "nothing moves, it hangs: `py-spy dump --pid PID`.",
        _KERNEL,
        "nnU-Net's training_log_*.txt has no tracebacks: they are in the terminal or in the job's output. "
        + _WHOLE_OUTPUT,
        "Continue from the last checkpoint: `nnUNetv2_train … --c`.",
    ),
    safeloader=_SAFELOADER,
    answer=Answer.UNKNOWN,
)

TRAINER_EXCEPTION: Final = Cause(
    key="unknown-exception-in-training",
    group="R1",
    title="I don't know why, but the training process itself raised an exception",
    what=(
        "The quoted exception ended it, and I know no cause for it. It was not the workers: whatever is said about "
        "them afterwards is an echo."
    ),
    remedy=(
        "Read the traceback upwards from the quoted line; the last line of your own code, if there is any, is the "
        "place.",
        "Try without torch.compile, for a shorter traceback: `nnUNet_compile=F nnUNetv2_train …`.",
        "Search https://github.com/MIC-DKFZ/nnUNet/issues for the quoted line.",
    ),
    safeloader="It would be the same with SafeLoader: this is not about loading.",
    answer=Answer.UNKNOWN,
)

POOL_EXCEPTION: Final = Cause(
    key="unknown-exception-in-pool",
    group="",
    title="I don't know why, but a process that preprocesses, predicts or exports raised an exception",
    what=(
        "The quoted exception ended it, and I know no cause for it. That nnU-Net finds its background workers dead "
        "afterwards is an echo."
    ),
    remedy=(
        "Read the traceback upwards from the quoted line; it often names the case above it: look at that case's files.",
        "Search https://github.com/MIC-DKFZ/nnUNet/issues for the quoted line.",
    ),
    safeloader="It would be the same with SafeLoader: this pool is nnU-Net's own.",
    answer=Answer.UNKNOWN,
)

OTHER_EXCEPTION: Final = Cause(
    key="unknown-exception",
    group="",
    title="I don't know the cause: the last thing that went wrong is an exception",
    what=(
        "The quoted exception is none that I know a cause for, and nothing shows that it came from nnU-Net's training."
    ),
    remedy=(
        "Read the traceback upwards from the quoted line; the last line of your own code is the place.",
        "If it was a training with nnU-Net, a part of the output is missing. " + _WHOLE_OUTPUT,
    ),
    answer=Answer.UNKNOWN,
)

NOTHING_KNOWN: Final = Cause(
    key="unknown-text",
    group="",
    title="I don't know: there is nothing in this text that I recognise",
    what="It has neither lines of an nnU-Net training nor an error message that I know.",
    remedy=(
        "Give the console output or the Slurm output of a training, nnU-Net's training_log_*.txt, or "
        "safeloader_incidents.jsonl.",
        _WHOLE_OUTPUT,
    ),
    answer=Answer.UNKNOWN,
)
