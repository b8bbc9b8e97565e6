"""What a log may be made of, and SafeLoader's own files: `faults.explain.reader`, `incidents`, `incident_files`."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections.abc import Mapping
from typing import Any

import pytest

from safeloader.errors import ConfigError
from safeloader.faults.explain import explain
from safeloader.faults.explain.incident_files import is_incidents, summarize
from safeloader.faults.explain.incidents import Summary
from safeloader.faults.explain.model import Line
from safeloader.faults.explain.reader import read_lines
from safeloader.faults.explain.words import WIDTH, in_words, summary_in_words

OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.05 GiB."


def lines(content: bytes) -> list[Line]:
    return list(read_lines(io.BytesIO(content)))


# ---- the text ----


@pytest.mark.parametrize(
    "content",
    [
        f"first\n{OOM}\n".encode(),
        f"first\r\n{OOM}\r\n".encode(),
        f"first\n{OOM}".encode(),
        f"\x1b[1mfirst\x1b[0m\n\x1b[31m{OOM}\x1b[0m\x1b[K\n".encode(),
        f"first\n{OOM}\n".encode("utf-16"),
        f"first \xff\xfe\n{OOM}\n".encode("latin-1"),
        b"first\0\0\0\0\n\0\0" + OOM.encode() + b"\n",
        b"bar 1%\rbar 2%\rfirst\n 99%\r" + OOM.encode() + b"\n",
    ],
    ids=["unix", "dos", "no end", "colours", "utf-16", "latin-1", "holes", "progress bar"],
)
def test_a_line_is_found_whatever_is_around_it(content: bytes) -> None:
    diagnosis = explain(lines(content))
    assert diagnosis.primary.cause.key == "gpu-out-of-memory"
    assert diagnosis.primary.evidence == (Line(2, OOM),)
    assert diagnosis.lines == 2


def test_a_progress_bar_is_one_line_for_grep_and_many_for_us() -> None:
    assert lines(b"a\rb\rc\nd\n") == [Line(1, "a"), Line(1, "b"), Line(1, "c"), Line(2, "d")]


def test_a_line_without_end_takes_no_memory() -> None:
    class Endless(io.RawIOBase):
        left = 64

        def read(self, size: int = -1) -> bytes:
            self.left -= 1
            return b" 17%|#   | it/s" * (size // 16) if self.left > 0 else b""

    tracemalloc.start()
    try:
        pieces = sum(1 for _ in read_lines(Endless()))  # type: ignore[arg-type]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert pieces > 1000
    assert peak < 8 << 20


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty: nothing was written into it"),
        (b"\n\n \n", "has nothing but blanks in it"),
        (b"\0" * 5000, "has nothing but blanks in it"),
        (b"\x1f\x8b\x08" + b"x" * 100, "zcat FILE | safeloader explain -"),
        (b"PK\x03\x04" + b"x" * 100, "a zip archive"),
        (b"\x7fELF" + bytes(range(256)) * 20, "is not a text file"),
    ],
    ids=["empty", "blank", "zeros", "gzip", "zip", "binary"],
)
def test_what_is_no_log_is_refused_in_one_line(content: bytes, said: str) -> None:
    with pytest.raises(ConfigError) as refused:
        lines(content)
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


# ---- incidents ----


def record(n: int, **values: Any) -> dict[str, Any]:
    return {
        "at": f"2025-04-18T10:{n:02}:00+02:00",
        "pool": "train",
        "kind": "worker-death",
        "worker": n % 4,
        "pid": 4000 + n,
        "stage": "loading",
        "message": f"worker train-{n % 4} (pid {4000 + n}) was killed",
        **values,
    }


RECORDS = [
    record(1, signal="SIGKILL", case="brain_001, brain_004"),
    record(2, signal="SIGKILL", case="brain_004, brain_002"),
    record(3, kind="worker-error", cause="ValueError: mmap length is greater than file size", case="brain_007"),
    record(4, signal="SIGKILL", case="brain_004", stage="transforming", advice="lower nnUNet_n_proc_DA"),
    record(5, kind="quarantine", case="brain_007"),
    record(6, kind="degrade"),
]


def jsonl(records: list[Mapping[str, Any]] | list[dict[str, Any]], end: bytes = b"") -> bytes:
    return b"".join(json.dumps(one).encode() + b"\n" for one in records) + end


def summary(content: bytes) -> Summary:
    assert is_incidents(content[: 1 << 16])
    return summarize(io.BytesIO(content), content[: 1 << 16])


def test_incidents_are_counted_by_cause_most_frequent_first() -> None:
    found = summary(jsonl(RECORDS))
    assert [(group.title, group.count) for group in found.groups] == [
        ("worker killed by SIGKILL", 3),
        ("an exception in a worker: ValueError", 1),
    ]
    top = found.groups[0]
    assert top.cases.most_common(1) == [("brain_004", 3)]
    assert top.stages == {"loading": 2, "transforming": 1}
    assert (found.first, found.last) == ("2025-04-18T10:01:00+02:00", "2025-04-18T10:06:00+02:00")
    assert found.reactions == {"quarantine": 1, "degrade": 1}
    assert found.skipped == 0


def test_the_most_frequent_is_told_in_full() -> None:
    said = summary_in_words(summary(jsonl(RECORDS)), "incidents.jsonl")
    assert said.startswith("4 incidents, most often: worker killed by SIGKILL (3 times).")
    assert "worker train-0 (pid 4004) was killed" in said  # the one with the most evidence
    assert "Lower nnUNet_n_proc_DA." in said
    assert "stage: loading (2 times), transforming (once)" in said


def test_a_last_line_that_a_crash_cut_off_is_left_out_and_counted() -> None:
    found = summary(jsonl(RECORDS, b'{"at": "2025-04-18T10:07:00+02:00", "ki'))
    assert found.total == 4
    assert found.skipped == 1
    assert "1 line left out: cut off by a crash, or not JSON." in summary_in_words(found, "x")


def test_what_the_process_wrote_tells_the_cause() -> None:
    tail = "warning\n\x1b[31mdouble free or corruption (!prev)\x1b[0m"
    said = summary_in_words(summary(jsonl([record(1, signal="SIGABRT", stderr_tail=tail)])), "x")
    assert "double free or corruption (!prev)\n" in said
    assert "Native code corrupted its memory" in said
    assert "OMP_NUM_THREADS=1" in said
    assert "\x1b" not in said


@pytest.mark.parametrize(
    ("kind", "title", "remedy"),
    [
        ("oom-kill", "killed by the kernel, because memory ran out", "nnUNet_n_proc_DA=4"),
        ("worker-hang", "no progress, replaced by the watchdog", "py-spy dump"),
        ("outage", "many cases could not be read at once", "rsync -a"),
    ],
)
def test_kinds_have_remedies_of_their_own(kind: str, title: str, remedy: str) -> None:
    found = summary(jsonl([record(1, kind=kind)]))
    assert found.groups[0].title == title
    assert remedy in " ".join(found.groups[0].todo)


@pytest.mark.parametrize(
    "odd",
    [
        {"kind": "something-new", "figures": {"memory": 3}},
        {"message": "only this"},
        {"kind": "worker-death", "stderr_tail": ["a", "b"], "stacks": {"MainThread": "x"}, "case": 17, "at": 12},
        {"kind": None, "message": None, "signal": "SIGNONSENSE", "exit_code": "three"},
        {"kind": "worker-death", "exit_code": 3},
        {"kind": "nursery-death", "cause": "could not be forked: errno 11"},
        {"kind": "worker-death", "message": "half of a character: \ud83d"},
    ],
)
def test_any_keys_are_taken(odd: dict[str, Any]) -> None:
    found = summary(jsonl([odd]))
    assert found.total == 1
    summary_in_words(found, "x").encode()


def test_a_report_is_read_with_its_outcome() -> None:
    report = {
        "trainer": "nnUNetTrainerSafeLoader",
        "outcome": "finished",
        "loaders": {"train": {"batches": 500, "incidents": RECORDS[:2]}, "val": {"incidents": []}},
    }
    for indent in (None, 2):
        found = summary(json.dumps(report, indent=indent).encode())
        assert [(group.title, group.count) for group in found.groups] == [("worker killed by SIGKILL", 2)]
        assert found.outcome == "finished"


def test_a_report_without_incidents_says_that_nothing_went_wrong() -> None:
    found = summary(json.dumps({"outcome": "finished", "loaders": {"train": {"incidents": []}}}, indent=2).encode())
    assert "nothing went wrong" in summary_in_words(found, "x")


def test_a_report_cut_off_is_refused() -> None:
    content = json.dumps({"loaders": {"train": {"incidents": RECORDS}}}, indent=2).encode()[:-40]
    with pytest.raises(ConfigError, match="not a whole one"):
        summary(content)


def test_a_log_is_not_taken_for_incidents() -> None:
    assert not is_incidents(b"{'dataset_name': 'Dataset001', 'kind': 3}\nTraceback\n")
    assert not is_incidents(OOM.encode())


def test_incidents_are_not_kept() -> None:
    many = jsonl([record(n % 60, signal="SIGKILL", case=f"case_{n % 500}") for n in range(20_000)])
    tracemalloc.start()
    try:
        found = summary(many)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.total == 20_000
    assert peak < 4 << 20


# ---- words ----


def test_prose_is_wrapped_and_commands_are_not() -> None:
    said = in_words(explain([Line(1, OOM)]), "train.log").split("\n")
    assert said[0] == "The GPU's memory was not enough for the network."
    assert said[1] == "sure: the log says so itself  [gpu-out-of-memory, R1; train.log, 1 line]"
    assert f"  line 1: {OOM}" in said
    command = "`nnUNetv2_plan_experiment -d DATASET -gpu_memory_target 8 -overwrite_plans_name nnUNetPlans_8G`"
    assert any(command in line for line in said)
    assert all(len(line) <= WIDTH for line in said if "`" not in line and "line 1" not in line)


def test_a_long_line_is_quoted_in_part() -> None:
    said = in_words(explain([Line(1, f"{OOM} {'x' * 5000}")]), "train.log")
    assert "x […]" in said
    assert max(len(line) for line in said.split("\n")) < 400
