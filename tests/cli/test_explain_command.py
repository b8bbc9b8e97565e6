"""`safeloader explain` as a user runs it: exit codes, stdin, and one line for what can't be read."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from safeloader.cli import main

ROOT = Path(__file__).parents[2]
LOGS = ROOT / "tests" / "unit" / "logs"


@pytest.mark.parametrize(
    ("log", "code", "first_line"),
    [
        ("shm_full", 0, "/dev/shm is too small."),
        ("healthy", 0, "Nothing went wrong: the training finished."),
        ("symptom_only", 1, "I don't know: the log has only the message that follows any failure."),
        ("random_text", 1, "I don't know: there is nothing in this text that I recognise."),
        ("tutorial_traceback", 1, "I don't know the cause: the last thing that went wrong is an exception."),
    ],
)
def test_the_answer_and_the_exit_code(log: str, code: int, first_line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(LOGS / f"{log}.txt")]) == code
    shown = capsys.readouterr()
    assert shown.out.split("\n")[0] == first_line
    assert shown.err == ""


def test_the_whole_answer(capsys: pytest.CaptureFixture[str]) -> None:
    path = LOGS / "transform_bug.txt"
    assert main(["explain", str(path)]) == 0
    assert (
        f"""\
The loader or a transform raised an exception in a worker.
sure: the log says so itself  [loader-bug, R6; {path}, 71 lines]

Evidence
  line 32: RuntimeError: The size of tensor a (24) must match the size of tensor b (20) at non-singleton dimension 3
  raised in a data loading worker, at /data/code/my_trainers.py, line 12, in __call__
  line 71 ("background workers are no longer alive") is only the echo

What happened
"""
        in capsys.readouterr().out
    )


def test_the_page_of_all_that_is_known_is_the_one_in_the_docs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--list"]) == 0
    page = capsys.readouterr().out
    assert page == (ROOT / "docs" / "crashes.md").read_text(), "safeloader explain --list > docs/crashes.md"
    anchors = set(re.findall(r'<a id="([^"]+)">', page))
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) <= anchors and len(anchors) > 40
    assert "| `Too many open files` | [" in page


def test_the_message_that_everybody_knows_is_answered_with_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(LOGS / "symptom_only.txt")]) == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "The cause was printed before, and that part of the output is missing here." in said
    assert "nnU-Net's training_log_*.txt never has it" in said
    assert "`PYTHONUNBUFFERED=1 nnUNetv2_train … > train.log 2>&1`" in said


def test_a_minus_reads_what_is_piped_in() -> None:
    with (LOGS / "slurm_out_of_memory.txt").open("rb") as log:
        done = subprocess.run([sys.executable, "-m", "safeloader", "explain", "-"], stdin=log, capture_output=True)
    assert done.returncode == 0
    assert b"The machine's memory ran out" in done.stdout
    assert b"[out-of-memory, R3; stdin, 6 lines]" in done.stdout
    assert done.stderr == b""


def test_a_terminal_that_knows_no_unicode_gets_question_marks() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "safeloader", "explain", str(LOGS / "compile_old_gcc.txt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert "?for? loop initial declarations" in done.stdout


def test_incidents_of_safeloader(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    incident = {"at": "2025-04-18T10:00:00", "kind": "worker-death", "signal": "SIGBUS", "stage": "loading"}
    path = tmp_path / "safeloader_incidents.jsonl"
    path.write_text(f"{json.dumps(incident)}\n" * 3 + '{"at": ')
    assert main(["explain", str(path)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("3 incidents, most often: worker killed by SIGBUS (3 times).")
    assert "1 line left out" in said


def test_a_first_incident_of_any_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "safeloader_incidents.jsonl"
    path.write_text(json.dumps({"kind": "oom-kill", "stacks": "x\n" * 100_000}) + "\n")
    assert main(["explain", str(path)]) == 0
    assert capsys.readouterr().out.startswith("1 incident, most often: killed by the kernel")


def unreadable(tmp_path: Path) -> Path:
    return tmp_path / "there_is_none.txt"


def folder(tmp_path: Path) -> Path:
    return tmp_path


def empty(tmp_path: Path) -> Path:
    (tmp_path / "empty.txt").touch()
    return tmp_path / "empty.txt"


def binary(tmp_path: Path) -> Path:
    (tmp_path / "model.bin").write_bytes(bytes(range(256)) * 100)
    return tmp_path / "model.bin"


def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "checkpoint_final.pth").write_bytes(b"PK\x03\x04" + bytes(range(256)) * 100)
    return tmp_path / "checkpoint_final.pth"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (unreadable, "can't be read: No such file or directory"),
        (folder, "can't be read: Is a directory"),
        (empty, "is empty: nothing was written into it"),
        (binary, "is not a text file; give the console output, the Slurm output or the training log"),
        (
            checkpoint,
            "is packed, as a zip archive (checkpoints and .npz files are such); name the log inside or beside it",
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_no_log_gets_one_line_and_a_2(
    make: object, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make(tmp_path)  # type: ignore[operator]
    assert main(["explain", str(path)]) == 2
    shown = capsys.readouterr()
    assert shown.err == f"safeloader explain: {path} {said}\n"
    assert shown.out == ""


def test_nothing_piped_in_is_said_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    assert main(["explain", "-"]) == 2
    assert capsys.readouterr().err == "safeloader explain: stdin is empty: nothing was written into it\n"
