"""The job was ended from outside: by its scheduler, by its node, or by a person."""

from __future__ import annotations

from typing import Final

from safeloader.faults.explain.model import Cause, Sign, Weight

_CONTINUE: Final = "Continue from the last checkpoint (written every 50 epochs): `nnUNetv2_train … --c`."
_CANT: Final = "SafeLoader can't help: the job is over. It leaves no processes behind."

CAUSES: Final = (
    Cause(
        key="scheduler-time-limit",
        group="",
        title="The job reached its time limit",
        what=(
            "The scheduler ended the job because the time that it was given was used up. Nothing in the training "
            "failed."
        ),
        remedy=(
            _CONTINUE,
            "Ask for more time (`sbatch --time=2-00:00:00`), or let the job continue itself: `sbatch "
            "--dependency=afterany:JOBID train.sh`, where train.sh uses `--c`.",
        ),
        safeloader=_CANT,
        signs=(
            Sign("DUE TO TIME LIMIT"),
            Sign("TERM_RUNLIMIT"),
            Sign("PBS: job killed: walltime"),
            Sign("walltime", regex=r"walltime \S+ exceeded limit"),
        ),
        sources=("submitit#1708",),
    ),
    Cause(
        key="scheduler-preempted",
        group="",
        title="The job was preempted or requeued",
        what="The scheduler took the machine away for another job. Nothing in the training failed.",
        remedy=(_CONTINUE, "Let Slurm start it again: `#SBATCH --requeue` and `--c` in the job script."),
        safeloader=_CANT,
        signs=(
            Sign("DUE TO PREEMPTION"),
            Sign("DUE TO JOB REQUEUE"),
            Sign("TERM_PREEMPT"),
            Sign("Preempted", regex=r"Pod was|reason: Preempted|status.*Preempted"),
        ),
    ),
    Cause(
        key="node-failed",
        group="R9",
        title="The node failed",
        what="The scheduler lost the machine on which the job ran: it crashed, was restarted, or lost its network.",
        remedy=(_CONTINUE, "Leave that node out: `sbatch --exclude=NODE`, and tell those who run the cluster."),
        safeloader=_CANT,
        signs=(
            Sign("DUE TO NODE FAILURE"),
            Sign("NODE_FAIL"),
            Sign("Node failure on"),
            Sign("Machine check", regex=r"mce:|Hardware Error|kernel"),
            Sign("[Hardware Error]"),
        ),
    ),
    Cause(
        key="scheduler-cancelled",
        group="",
        title="The job was cancelled",
        what="Somebody (or a script) ended the job: `scancel`, `kill`, or an administrator.",
        remedy=("`sacct -j JOBID --format=JobID,State,ExitCode,User,Comment` may tell who.", _CONTINUE),
        safeloader=_CANT,
        signs=(
            Sign("CANCELLED AT", regex=r"CANCELLED AT \S+ (?!DUE TO (?:TIME|PREEMPT|JOB REQ|NODE))"),
            Sign("CANCELLED by"),
            Sign("TERM_OWNER"),
            Sign(
                "Terminated",
                regex=r"^(?:.*: line \d+:\s+\d+ )?Terminated(?:\s{2,}.*)?$",
                sure=False,
                weight=Weight.WEAK,
            ),
            Sign("exit code 143", sure=False, weight=Weight.WEAK),
            Sign("terminated with signal SIGTERM", sure=False, weight=Weight.WEAK),
        ),
        unless=("scheduler-time-limit", "scheduler-preempted", "node-failed", "out-of-memory"),
    ),
    Cause(
        key="interrupted",
        group="",
        title="The training was interrupted (Ctrl-C, SIGINT)",
        what="Somebody pressed Ctrl-C, closed the terminal, or a scheduler asked the training to end.",
        remedy=(
            _CONTINUE,
            "If nobody did: a terminal that is closed ends what runs in it. Use `tmux`, `nohup` or a job.",
        ),
        safeloader="SafeLoader prints one traceback for it, the trainer's.",
        signs=(
            Sign("KeyboardInterrupt", within=r":run_training$|:run_training_entry$", sure=False, weight=Weight.WEAK),
            Sign("received signal SIGHUP", weight=Weight.WEAK),
        ),
        unless=("hang", "thread-limit"),
    ),
)
