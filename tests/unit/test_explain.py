"""`faults.explain` over real logs: the primary cause, its evidence, and what to do.

Where each log in `logs/` comes from is in `SOURCES` (paths are neutral, boilerplate is left out):

* made here: a real `nnUNetv2_train` (2.8.1, torch 2.14, batchgenerators 0.25.5, Python 3.11) on the small brain
  dataset, with the fault that is named;
* nnUNet#N and the like: the lines that programs printed there (nnU-Net, torch, glibc, gcc, NCCL), in their order, in a
  frame of ours; cases and paths are invented;
* composed: lines of the former in another order, to see whether they are told apart.
"""

from __future__ import annotations

import re
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

import pytest

from safeloader.faults.explain import explain, explain_text
from safeloader.faults.explain.causes import BY_KEY, CAUSES, ECHOES, unknown
from safeloader.faults.explain.model import Answer, Diagnosis, Line, Place, Weight
from safeloader.faults.explain.reader import read_lines

LOGS = Path(__file__).parent / "logs"
SYMPTOM = "RuntimeError: One or more background workers are no longer alive. Exiting. Please check the print"
ECHO = re.compile(r"(?<!raise )RuntimeError: One or more background|[Aa]bort.event")


@dataclass(frozen=True)
class Row:
    """One log, and what must be said about it."""

    log: str
    cause: str
    evidence: tuple[int, ...]
    remedy: tuple[str, ...]
    sure: bool = True


SOURCES = {
    "compile_no_compiler": "made here: CC=/nonexistent",
    "compile_no_python_headers": "made here: gcc without Python's headers, in the frame of nnUNet#2398",
    "compile_cannot_link": "made here: triton's build without a driver, in the frame of nnUNet#2576",
    "compile_no_libcuda": "nnUNet#2164",
    "pasted_without_indentation": "nnUNet#1533, as it was pasted",
    "compile_no_triton": "nnUNet#2115",
    "compile_old_gcc": "nnUNet#2203",
    "compile_no_cache": "made here: TORCHINDUCTOR_CACHE_DIR names a file",
    "compile_old_gpu": "inductor's own words, in the frame of nnUNet#2115",
    "compile_no_ptxas": "Triton's own words, in the frame of nnUNet#2115",
    "compile_failed_generic": "nnUNet#2330",
    "label_assert_gpu": "nnUNet#1674",
    "label_out_of_range_cpu": "made here: a transform that makes label 5 of 3 classes",
    "device_assert": "nnUNet#1419",
    "gpu_out_of_memory": "nnUNet#1701, in compiled code",
    "colours_and_progress_bars": "composed: ANSI colours, \\r, bytes that are not UTF-8",
    "pinned_memory": "nnUNet#2238",
    "gpu_setup": "nnUNet#2243",
    "cudnn_error": "nnUNet#938",
    "data_truncated_npy": "made here: .npy files cut in half",
    "data_empty_npy": "made here: .npy files of 0 bytes",
    "data_truncated_npz": "made here: .npz files cut in half",
    "data_corrupt_npz": "made here: 4 KiB of zeros in the middle of the .npz files",
    "data_truncated_pkl": "made here: .pkl files cut off after 700 bytes",
    "data_empty_pkl": "made here: .pkl files of 0 bytes",
    "data_truncated_b2nd": "made here: .b2nd files cut off after 40 kB",
    "data_missing": "made here: .pkl files removed",
    "data_permission": "nnUNet#227",
    "data_other_version": "nnUNet#291",
    "storage_failed": "nnUNet#1784: six workers print at once",
    "storage_stale": "composed: errno 116",
    "epochs_printed_after_the_error": "composed: stdout in blocks, stderr at once",
    "bus_error": "bash's words for a SIGBUS",
    "slurm_out_of_memory": "nnUNet#2708",
    "kernel_out_of_memory": "the kernel's words for an OOM kill",
    "trainer_killed": "made here: kill -9 of the trainer, in a script",
    "memory_refused": "made here: a transform that asks for 36 TiB",
    "paging_file": "nnUNet#835",
    "export_worker_died": "made here: kill -9 of an export process",
    "preprocessing_worker_died": "nnUNet#2094",
    "shm_full": "made here: 64 MiB of /dev/shm",
    "shm_full_older_torch": "nnUNet#294",
    "shm_bus_error": "nnUNet#398",
    "openblas_limit": "nnUNet#1343",
    "openblas_at_import": "made here: a pids cgroup of 2",
    "thread_limit_interleaved": "made here: a pids cgroup of 7; two processes print at once",
    "heap_corruption": "made here: a transform that frees twice",
    "threadpoolctl_old": "nnUNet#2166",
    "trainer_segfault": "made here: a null pointer, with PYTHONFAULTHANDLER=1",
    "transform_bug": "made here: shapes that don't fit",
    "transform_bug_stdout_buffered": "made here: the same, into a file",
    "cuda_in_worker": "made here: a transform that calls .cuda()",
    "feeder_cannot_pickle": "composed: an open file in a batch",
    "hang_interrupted": "made here: a transform that sleeps, and Ctrl-C",
    "ddp_timeout": "nnUNet#1516",
    "too_many_files": "made here: ulimit -n 44",
    "gpu_lost": "nnUNet#2145, and the kernel's Xid 79",
    "windows_no_guard": "multiprocessing's own message",
    "disk_full_checkpoint": "made here: results on a tmpfs of 200 kB",
    "quota": "composed: errno 122 where nnU-Net logs",
    "missing_module": "made here: blosc2 hidden from the import",
    "slurm_time_limit": "Slurm's words",
    "slurm_time_limit_after_a_hang": "the same, two days later",
    "slurm_preempted": "Slurm's words",
    "slurm_node_failure": "Slurm's words",
    "slurm_cancelled": "Slurm's words",
    "interrupted": "Ctrl-C in a training step",
    "safeloader_worker_error": "made here: the transform bug, with SafeLoader",
    "safeloader_gave_up": "made here: workers that kill themselves, with SafeLoader",
    "two_causes": "composed: EIO in a worker, then Slurm's oom_kill at the job's end",
    "ddp_timeout_after_worker_error": "composed: rank 0 fails, rank 1 waits 600 s",
    "continued_and_finished": "composed: it failed, was started again and finished",
    "symptom_only": "the message alone",
    "symptom_of_the_thread_only": "composed: nothing but the receiving thread's traceback",
    "worker_vanished": "made here: a worker that kills itself (SIGKILL, SIGSEGV and sys.exit look the same)",
    "cut_off": "composed: the end of the file is missing",
    "exception_in_trainer": "made here: a bug in train_step",
    "launcher_prefixes": "composed: two ranks, as srun and torchrun label them",
    "prediction_worker_error": "nnUNet#1572",
    "tutorial_traceback": "Python's tutorial",
    "random_text": "a letter with the words of many causes",
    "healthy": "made here: a training that finishes",
    "survived_with_safeloader": "composed of SafeLoader's lines",
}

ROWS = [
    # R1: the training process itself
    Row("compile_no_compiler", "compile-no-compiler", (53,), ("nnUNet_compile=F", "build-essential")),
    Row(
        "compile_no_python_headers",
        "compile-no-python-headers",
        (13,),
        ("nnUNet_compile=F", "sudo apt install gcc python3-dev"),
    ),
    Row("compile_cannot_link", "compile-no-libcuda", (13,), ("nnUNet_compile=F", "ldconfig")),
    Row("compile_no_libcuda", "compile-no-libcuda", (20,), ("TRITON_LIBCUDA_PATH",)),
    Row("pasted_without_indentation", "compile-no-libcuda", (11,), ("nnUNet_compile=F",)),
    Row("compile_no_triton", "compile-no-triton", (20,), ("nnUNet_compile=F", "pytorch.org")),
    Row("compile_old_gcc", "compile-old-compiler", (9,), ("module load gcc",)),
    Row("compile_no_cache", "compile-no-cache", (19,), ("TORCHINDUCTOR_CACHE_DIR",)),
    Row("compile_old_gpu", "compile-old-gpu", (17,), ("nnUNet_compile=F", "newer GPU")),
    Row("compile_no_ptxas", "compile-no-ptxas", (17, 19), ("nnUNet_compile=F", "TRITON_PTXAS_PATH")),
    Row("compile_failed_generic", "compile-failed", (22,), ("nnUNet_compile=F",)),
    Row("label_assert_gpu", "label-out-of-range", (8, 10), ("--verify_dataset_integrity",)),
    Row("label_out_of_range_cpu", "label-out-of-range", (49,), ("dataset.json",)),
    Row("device_assert", "device-assert", (14,), ("CUDA_LAUNCH_BLOCKING=1",)),
    Row("gpu_out_of_memory", "gpu-out-of-memory", (28,), ("-gpu_memory_target", "nvidia-smi")),
    Row("colours_and_progress_bars", "gpu-out-of-memory", (2,), ("nvidia-smi",)),
    Row("pinned_memory", "pinned-memory", (15,), ("ulimit -l",)),
    Row("gpu_setup", "gpu-setup", (16,), ("nvidia-smi", "-device cpu")),
    Row("cudnn_error", "cuda-error", (7,), ("CUDA_LAUNCH_BLOCKING=1",), sure=False),
    # R2: data and storage
    Row("data_truncated_npy", "data-corrupt", (30,), ("-name '*.npy' -delete", "nnUNetv2_preprocess")),
    Row("data_empty_npy", "data-corrupt", (26,), ("nnUNetv2_preprocess",)),
    Row("data_truncated_npz", "data-corrupt", (34,), ("nnUNetv2_preprocess",)),
    Row("data_corrupt_npz", "data-corrupt", (36,), ("nnUNetv2_preprocess",)),
    Row("data_truncated_pkl", "data-corrupt", (26,), ("nnUNetv2_preprocess",)),
    Row("data_empty_pkl", "data-corrupt", (26,), ("nnUNetv2_preprocess",)),
    Row("data_truncated_b2nd", "data-corrupt", (30,), ("nnUNetv2_preprocess",), sure=False),
    Row("data_missing", "data-missing", (26, 40), ("ls -l FILE",)),
    Row("data_permission", "data-missing", (5,), ("klist",)),
    Row("data_other_version", "data-other-version", (3,), ("nnUNetv2_plan_and_preprocess",)),
    Row("storage_failed", "storage-failed", (8, 9, 10), ("dmesg", "rsync -a")),
    Row("storage_stale", "storage-failed", (3,), ("dmesg",)),
    Row("epochs_printed_after_the_error", "storage-failed", (12,), ("dmesg",)),
    Row("bus_error", "bus-error", (3,), ("df -h /dev/shm",), sure=False),
    # R3: memory
    Row("slurm_out_of_memory", "out-of-memory", (6,), ("nnUNet_n_proc_DA=4", "--mem=64G")),
    Row("kernel_out_of_memory", "out-of-memory", (4,), ("nnUNet_n_proc_DA=4",)),
    Row("trainer_killed", "trainer-killed", (13, 14), ("killed process", "--c"), sure=False),
    Row("memory_refused", "memory-refused", (26,), ("nnUNet_n_proc_DA=4",)),
    Row("paging_file", "memory-refused", (8,), ("paging file",)),
    Row("export_worker_died", "pool-worker-died", (68,), ("nnUNet_def_n_proc=1", "--val"), sure=False),
    Row("preprocessing_worker_died", "pool-worker-died", (4,), ("-np 2",), sure=False),
    # R4: /dev/shm
    Row("shm_full", "shm-full", (24,), ("--ipc=host", "safeloader install")),
    Row("shm_full_older_torch", "shm-full", (9,), ("--ipc=host",)),
    Row("shm_bus_error", "shm-full", (2,), ("--ipc=host",)),
    # R5: threads, native code
    Row("openblas_limit", "thread-limit", (1,), ("OMP_NUM_THREADS=1", "ulimit -u")),
    Row("openblas_at_import", "thread-limit", (1,), ("OPENBLAS_NUM_THREADS=1",)),
    Row("thread_limit_interleaved", "thread-limit", (18, 38), ("nnUNet_n_proc_DA=4",)),
    Row("heap_corruption", "heap-corruption", (13,), ("OMP_NUM_THREADS=1",)),
    Row("threadpoolctl_old", "threadpoolctl-old", (5,), ("pip install -U threadpoolctl",)),
    Row("trainer_segfault", "native-crash", (34,), ("PYTHONFAULTHANDLER=1",)),
    # R6: loader and transforms
    Row("transform_bug", "loader-bug", (32,), ("nnUNet_n_proc_DA=0",)),
    Row("transform_bug_stdout_buffered", "loader-bug", (24,), ("nnUNet_n_proc_DA=0",)),
    Row("cuda_in_worker", "cuda-in-worker", (28,), ("on the CPU",)),
    Row("feeder_cannot_pickle", "unpicklable-batch", (7,), ("pickled",)),
    # R7: hangs
    Row("hang_interrupted", "hang", (34,), ("py-spy dump",), sure=False),
    Row("ddp_timeout", "ddp-stalled", (1,), ("every rank",), sure=False),
    # R8 to R10
    Row("too_many_files", "too-many-files", (37,), ("ulimit -n 65536",)),
    Row("gpu_lost", "gpu-lost", (14, 27), ("xid",)),
    Row("windows_no_guard", "spawn-platform", (13,), ("__main__",)),
    # what can't be survived
    Row("disk_full_checkpoint", "disk-full", (36, 57), ("df -h",), sure=False),
    Row("quota", "disk-full", (3,), ("quota -s",)),
    Row("missing_module", "missing-module", (16,), ("python -m pip install",)),
    Row("slurm_time_limit", "scheduler-time-limit", (12, 13), ("--c", "sbatch --time")),
    Row("slurm_time_limit_after_a_hang", "scheduler-time-limit", (12,), ("--c",)),
    Row("slurm_preempted", "scheduler-preempted", (2,), ("--requeue",)),
    Row("slurm_node_failure", "node-failed", (2,), ("--exclude=NODE",)),
    Row("slurm_cancelled", "scheduler-cancelled", (2,), ("sacct",)),
    Row("interrupted", "interrupted", (11,), ("tmux",), sure=False),
    # SafeLoader's own errors
    Row("safeloader_worker_error", "loader-bug", (28,), ("nnUNet_n_proc_DA=0",)),
    Row("safeloader_gave_up", "safeloader-gave-up", (40,), ("safeloader explain",)),
    # two causes in one log: the first that is no echo
    Row("two_causes", "storage-failed", (3,), ("rsync -a",)),
    Row("ddp_timeout_after_worker_error", "data-corrupt", (2,), ("nnUNetv2_preprocess",)),
    Row("continued_and_finished", "gpu-out-of-memory", (17,), ("nvidia-smi",)),
]


def diagnose(log: str) -> Diagnosis:
    with (LOGS / f"{log}.txt").open("rb") as file:
        return explain(read_lines(file))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.log)
def test_the_primary_cause_its_evidence_and_the_remedy(row: Row) -> None:
    diagnosis = diagnose(row.log)
    cause = diagnosis.primary.cause
    assert cause.key == row.cause
    assert diagnosis.known
    assert diagnosis.confidence.startswith("sure" if row.sure else "likely")
    quoted = {line.number for line in diagnosis.primary.evidence}
    assert set(row.evidence) <= quoted
    for words in row.remedy:
        assert words in " ".join(cause.remedy)
    assert_quotes_are_in_the_file(row.log, diagnosis)
    assert not [line for line in diagnosis.primary.evidence if ECHO.search(line.text)]
    assert diagnosis.symptom is None or ECHO.search(diagnosis.symptom.text)


def assert_quotes_are_in_the_file(log: str, diagnosis: Diagnosis) -> None:
    raw = (LOGS / f"{log}.txt").read_bytes().decode(errors="replace").split("\n")
    for line in diagnosis.primary.evidence:
        assert line.text in re.sub(r"\x1b\[[\d;]*m", "", raw[line.number - 1])


def test_every_log_is_tested_and_has_a_source() -> None:
    logs = {path.stem for path in LOGS.glob("*.txt")}
    assert {row.log for row in ROWS} | {log for log, _, _ in NOT_KNOWN} | HEALTHY == logs
    assert set(SOURCES) == logs


def test_logs_are_short_and_name_nobody() -> None:
    for path in LOGS.glob("*.txt"):
        text = path.read_bytes().decode(errors="replace")
        assert len(text.splitlines()) <= 80, path
        assert not re.search(r"/home/|/root/|/Users/|/work/|/tmp/xpl", text), path


# ---- what is not known is said to be unknown ----

NOT_KNOWN = [
    ("symptom_only", "unknown-symptom-only", "training_log_*.txt never has it"),
    ("symptom_of_the_thread_only", "unknown-symptom-only", "2>&1"),
    ("worker_vanished", "unknown-silent-death", "killed process"),
    ("cut_off", "unknown-cut-off", "py-spy dump"),
    ("exception_in_trainer", "unknown-exception-in-training", "Read the traceback"),
    ("launcher_prefixes", "unknown-exception-in-training", "Read the traceback"),
    ("prediction_worker_error", "unknown-exception-in-pool", "Read the traceback"),
    ("tutorial_traceback", "unknown-exception", "Read the traceback"),
    ("random_text", "unknown-text", "console output"),
]


@pytest.mark.parametrize(("log", "key", "next_step"), NOT_KNOWN)
def test_what_is_not_known_is_said_to_be_unknown(log: str, key: str, next_step: str) -> None:
    diagnosis = diagnose(log)
    assert diagnosis.primary.cause.key == key
    assert not diagnosis.known
    assert diagnosis.confidence == ""
    assert diagnosis.primary.cause.title.startswith("I don't know")
    assert next_step in " ".join(diagnosis.primary.cause.remedy)


def test_an_unknown_exception_is_named_with_the_users_code() -> None:
    primary = diagnose("exception_in_trainer").primary
    assert [line.text for line in primary.evidence] == ["KeyError: 'dta'"]
    assert primary.place is Place.TRAINER
    assert primary.code == "/data/code/my_trainers.py, line 84, in train_step"


def test_a_tutorial_traceback_is_the_last_thing_that_went_wrong() -> None:
    assert [line.text for line in diagnose("tutorial_traceback").primary.evidence] == [
        "ZeroDivisionError: division by zero"
    ]


def test_a_worker_that_vanished_is_told_from_output_that_is_missing() -> None:
    assert "killed by a signal" in diagnose("worker_vanished").primary.cause.what
    assert "that part of the output is missing" in diagnose("symptom_only").primary.cause.what


def test_a_known_signs_in_prose_are_no_sign() -> None:
    assert diagnose("random_text").primary.evidence == ()


# ---- healthy ----

HEALTHY = {"healthy", "survived_with_safeloader"}


@pytest.mark.parametrize("log", sorted(HEALTHY))
def test_a_finished_training_has_no_cause(log: str) -> None:
    diagnosis = diagnose(log)
    assert diagnosis.primary.cause is unknown.HEALTHY
    assert diagnosis.known
    assert diagnosis.further == ()


def test_what_safeloader_replaced_is_noted() -> None:
    (note,) = diagnose("survived_with_safeloader").notes
    assert note.startswith("SafeLoader replaced 1 worker meanwhile")


FELL_BACK = (
    "2025-11-23 12:11:33.650000: SafeLoader: torch.compile found no C or C++ compiler (InvalidCxxCompiler: No working "
    "C++ compiler found). The same batch was computed again without it, and training goes on without it\n"
)


@pytest.mark.parametrize("log", ["healthy", "gpu_out_of_memory", "trainer_segfault", "exception_in_trainer"])
def test_a_failure_of_torch_compile_that_safeloader_trained_on_after_is_no_cause(log: str) -> None:
    text = (LOGS / f"{log}.txt").read_text()
    without, epoch = explain_text(text), re.search(r"^.*: Epoch 0\n", text, re.MULTILINE)
    assert epoch is not None
    diagnosis = explain_text(text[: epoch.end()] + FELL_BACK + text[epoch.end() :])
    assert diagnosis.primary.cause is without.primary.cause
    assert not any(finding.cause.key.startswith("compile-") for finding in diagnosis.further)
    assert [note for note in diagnosis.notes if note not in without.notes] == [
        f"torch.compile failed (line {text[: epoch.end()].count(chr(10)) + 1}), and SafeLoader trained on without it."
    ]


def test_a_training_cut_off_in_validation_is_not_called_finished() -> None:
    text = (LOGS / "healthy.txt").read_text().partition("Validation complete")[0]
    diagnosis = explain_text(text)
    assert diagnosis.primary.cause is unknown.CUT_OFF
    assert "in validation, at case brain_000" in " ".join(diagnosis.notes)


# ---- precedence ----


def test_the_other_cause_is_mentioned() -> None:
    assert [finding.cause.key for finding in diagnose("two_causes").further] == ["out-of-memory"]
    assert [finding.cause.key for finding in diagnose("ddp_timeout_after_worker_error").further] == ["ddp-stalled"]


def test_a_consequence_is_not_mentioned() -> None:
    assert diagnose("label_assert_gpu").further == ()  # CUDA errors and an abort followed
    assert diagnose("trainer_killed").further == ()


def test_the_last_run_that_failed_counts() -> None:
    (note,) = diagnose("continued_and_finished").notes
    assert note == "The log holds 2 starts of nnU-Net; this is about start 1; a later one finished."


def test_what_the_training_went_on_after_did_not_end_it() -> None:
    epochs = [f"2024-04-18 09:0{n}:31.000103: Epoch time: 50.0 s" for n in range(3)]
    lines = ["Please cite the following paper when using nnU-Net:", "OSError: [Errno 5] Input/output error: '/d/a.pkl'"]
    survived = explain_text("\n".join([*lines, *epochs]))
    assert survived.primary.cause is unknown.CUT_OFF
    assert "Line 2 is a sign of storage-failed, but the training went on after it." in survived.notes
    died_later = explain_text("\n".join([*lines, *epochs, "Killed"]))
    assert died_later.primary.cause.key == "trainer-killed"


def test_one_more_epoch_may_follow_what_ended_it() -> None:
    text = "OSError: [Errno 5] Input/output error: '/d/a.pkl'\n2024-04-18 09:02:31.000103: Epoch time: 50.0 s\n"
    assert explain_text(text + SYMPTOM).primary.cause.key == "storage-failed"


def test_a_silence_before_the_time_limit_is_noted() -> None:
    (note,) = diagnose("slurm_time_limit_after_a_hang").notes
    assert "nothing was logged for 2 days" in note
    assert diagnose("slurm_time_limit").notes == ()


def test_where_it_was_raised_is_said() -> None:
    bug = diagnose("transform_bug").primary
    assert bug.place is Place.WORKER
    assert bug.code == "/data/code/my_trainers.py, line 12, in __call__"
    assert diagnose("pinned_memory").primary.place is Place.RECEIVER
    assert diagnose("shm_full").primary.place is Place.FEEDER


def test_what_a_worker_said_on_stdout_alone_is_enough() -> None:
    primary = explain_text(f"Exception in background worker 3:\n 'bone'\n{SYMPTOM}").primary
    assert primary.cause.key == "loader-bug"
    assert [line.text for line in primary.evidence] == [" 'bone'"]


def test_code_in_a_traceback_is_no_evidence() -> None:
    text = (
        'Traceback (most recent call last):\n  File "/usr/lib/python3.11/zipfile.py", line 973, in _update_crc\n'
        '    raise BadZipFile("Bad CRC-32 for file %r" % self.name)\nKeyError: 1\n'
    )
    assert explain_text(text).primary.cause.key == "unknown-exception"


def test_the_first_of_a_chain_is_named() -> None:
    trainer = '  File "/x/run_training.py", line 1, in run_training\n'
    text = (
        f"Traceback (most recent call last):\n{trainer}ValueError: first\n\nDuring handling of the above exception, "
        f"another exception occurred:\n\nTraceback (most recent call last):\n{trainer}TypeError: second\n"
    )
    assert explain_text(text).primary.evidence[0].text == "ValueError: first"


# ---- the table of causes ----


def test_a_cause_says_what_to_do() -> None:
    without_command = {cause.key for cause in CAUSES if "`" not in " ".join(cause.remedy)}
    assert without_command == {"cuda-in-worker", "unpicklable-batch", "safeloader-start", "safeloader-unpicklable"}
    for cause in CAUSES:
        assert cause.remedy, cause.key
        assert not cause.title.endswith("."), cause.key
        for text in (cause.what, *cause.remedy):
            assert text.endswith((".", ".)", '."')), text
        for text in (cause.what, cause.safeloader, *cause.remedy):
            assert text.count("`") % 2 == 0, text
        assert set(cause.unless) <= set(BY_KEY), cause.key


def test_keys_are_unique_and_every_known_cause_is_tested() -> None:
    assert len(BY_KEY) == len(CAUSES)
    untested = set(BY_KEY) - {row.cause for row in ROWS}
    assert untested == {
        "safeloader-storage",
        "safeloader-start",
        "safeloader-finite-loader",
        "safeloader-unpicklable",
        "safeloader-export",
        "safeloader-bug",
    }


@pytest.mark.parametrize(
    ("error", "key"),
    [
        ("safeloader.errors.OutageError: pool 'train' is given up: its data could not be read", "safeloader-storage"),
        ("safeloader.errors.QuarantineLimitError: case a of pool 'train' failed twice", "safeloader-storage"),
        ("safeloader.errors.StartError: no worker of pool 'train' can start: ValueError: x", "safeloader-start"),
        (
            "safeloader.errors.LoaderFinishedError: the loader of pool 'train' came to its end",
            "safeloader-finite-loader",
        ),
        ("safeloader.errors.BatchNotPicklableError: batch['f'] can't be sent to the trainer", "safeloader-unpicklable"),
        ("safeloader.errors.ExportError: 1 of 12 jobs of the validation failed: the export", "safeloader-export"),
        ("safeloader.errors.InternalError: the supervisor failed", "safeloader-bug"),
        ("safeloader.errors.RestartLimitError: pool 'train' is given up: 4 x OOM kill while loading", "out-of-memory"),
    ],
)
def test_safeloaders_own_errors(error: str, key: str) -> None:
    assert explain_text(error).primary.cause.key == key


def test_r1_to_r10_are_known() -> None:
    assert {cause.group for cause in CAUSES} >= {f"R{number}" for number in range(1, 11)}


def test_a_sign_is_found_by_its_literal() -> None:
    """The literal decides whether a line is looked at, so an empty one would match all lines."""
    for owner in (*CAUSES, *ECHOES):
        for sign in owner.signs:
            assert len(sign.text) >= 5
            assert re.compile(sign.regex) and re.compile(sign.within)


# ---- any text at all ----


def test_no_line_is_an_answer_either() -> None:
    assert explain([]).primary.cause is unknown.NOTHING_KNOWN


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_a_log_cut_anywhere_is_read(cut: int) -> None:
    lines = (LOGS / "compile_no_compiler.txt").read_text().split("\n")
    diagnosis = explain_text("\n".join(lines[:cut]))
    known = diagnosis.primary.cause.answer is Answer.KNOWN
    assert known == (cut > 52)
    assert explain_text("\n".join(lines[cut:])).primary.cause.key == (
        "compile-no-compiler" if cut < 53 else "unknown-symptom-only"
    )


def test_memory_is_bounded_by_the_signs_and_not_by_the_log() -> None:
    lines = (LOGS / "shm_full.txt").read_text().split("\n")
    numbered = (Line(n, lines[n % len(lines)].replace("1495214150", str(n))) for n in range(1, 100_000))
    tracemalloc.start()
    try:
        diagnosis = explain(numbered)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert diagnosis.primary.cause.key == "shm-full"
    assert diagnosis.primary.weight is Weight.DECISIVE
    assert peak < 4 << 20
