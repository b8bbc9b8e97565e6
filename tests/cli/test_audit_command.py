"""`safeloader audit` as a user runs it: what it says, its exit codes, and one line for what can't be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from safeloader.cli import main

SUM = "{:032x}".format


def header(**more: Any) -> dict[str, Any]:
    return {"audit": 1, "pool": "train", "seed": 7, "stream": 0, "first_ticket": 0, "torch": "2.14.1", **more}


def batch(ticket: int, data: int = 0, cases: tuple[str, ...] = ("brain_004", "brain_002")) -> dict[str, Any]:
    parts = {"data": SUM(data), "target": SUM(1), "keys": SUM(2)}
    return {"ticket": ticket, "cases": cases, "checksum": SUM(data), "parts": parts}


def write(path: Path, *content: dict[str, Any] | str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in content))
    return path


@pytest.fixture
def said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Compares two files of these lines: the exit code, and what is printed without the paths of both."""

    def compare(a: list[Any], b: list[Any]) -> tuple[int, list[str]]:
        one, other = write(tmp_path / "a.jsonl", *a), write(tmp_path / "b.jsonl", *b)
        code = main(["audit", str(one), str(other)])
        out = capsys.readouterr().out
        return code, out.replace(f"{tmp_path}/", "").splitlines()

    return compare


def test_the_same_is_one_line(said: Any) -> None:
    lines = [header(), *(batch(ticket, ticket) for ticket in range(500))]
    assert said(lines, lines) == (0, ["train: the same: 500 tickets, 0 to 499 (seed 7, stream 0)."])
    assert said(lines[:2], lines[:2]) == (0, ["train: the same: 1 ticket, 0 (seed 7, stream 0)."])
    assert said(lines[:1], lines[:1]) == (0, ["train: no batch was delivered in either (seed 7, stream 0)."])


def test_other_content(said: Any) -> None:
    code, lines = said([header(), batch(0), batch(1), batch(2)], [header(), batch(0), batch(1, 9), batch(2, 9)])
    assert code == 1
    assert lines == [
        "train: ticket 1 is the first that differs; the one before it is the same.",
        "  the same cases (brain_004, brain_002), other content: data differs, target, keys are the same",
        lines[2],
        "  All in all, 2 of the 3 tickets in both differ.",
        "  A: a.jsonl (seed 7, stream 0, 3 tickets)",
        "  B: b.jsonl (seed 7, stream 0, 3 tickets)",
    ]
    assert "the worker's number (thread_id)" in lines[2] and "`safeloader check` finds such things" in lines[2]


def test_other_cases(said: Any) -> None:
    code, lines = said([header(), batch(0)], [header(), batch(0, 9, ("brain_004", "brain_007"))])
    assert code == 1
    assert lines[:4] == [
        "train: ticket 0 is the first that differs; none before it is the same in both.",
        "  not the same cases:",
        "    A: brain_004, brain_002",
        "    B: brain_004, brain_007",
    ]
    assert "quarantined" in lines[4]


@pytest.mark.parametrize(
    ("there", "ticket", "words"),
    [
        ([0, 1], 2, "missing in B, which ends at ticket 1: that training was ended or killed sooner, or is running"),
        ([2, 3], 0, "missing in B, which begins at ticket 2: an earlier part of it lies elsewhere"),
        ([0, 3], 1, "missing in B, which goes on after it: lines were removed, or lost when a process was killed"),
        ([], 0, "missing in B, which has none"),
    ],
)
def test_a_missing_ticket(said: Any, there: list[int], ticket: int, words: str) -> None:
    code, lines = said([header(), *map(batch, range(4))], [header(), *map(batch, there)])
    assert code == 1
    assert lines[0].startswith(f"train: ticket {ticket} is the first that differs; ")
    assert lines[1] == f"  {words}"


def test_different_streams_come_first(said: Any) -> None:
    code, lines = said([header(), batch(0)], [header(seed=8), batch(0, 9)])
    assert code == 1
    assert lines[0] == (
        "train: these are different streams: A has seed 7, stream 0, B has seed 8, stream 0. Their batches have to "
        "differ: to compare trainings, give both the same SAFELOADER_SEED."
    )
    assert lines[1].startswith("train: ticket 0 is the first that differs")
    assert not any("thread_id" in line for line in lines), "no advice about what is no fault"
    code, lines = said([header(), batch(0)], [header(stream=1, pool="val"), batch(0, 9)])
    assert lines[0].startswith("a.jsonl: these are different streams: ")
    assert lines[0].endswith(
        "Each loader of a seed has its own: compare training with training, and a rank with itself."
    )


def test_lines_that_were_left_out(said: Any) -> None:
    whole = [header(), *map(batch, range(4))]
    code, lines = said(whole, [header(), batch(0), {**batch(3), "records_left_out": 2}])
    assert (code, lines) == (
        1,
        [
            "train: 2 tickets that both have are the same, and 2 can't be compared: lines are left out "
            "(seed 7, stream 0).",
            "  B: 2 lines are left out, because the storage did not take them in time; the tickets that are missing "
            "for it are not compared.",
        ],
    )


def test_what_else_is_worth_knowing(said: Any) -> None:
    code, lines = said(
        [header(), batch(0, 5), header(), batch(0), '{"ticket": 1, "che'], [header(torch="2.15.0"), batch(0)]
    )
    assert (code, lines) == (
        0,
        [
            "train: the same: 1 ticket, 0 (seed 7, stream 0).",
            "  A: 1 ticket stands there more than once, with other content, the first is ticket 0: a later run of the "
            "same stream made other batches, or two pools of one name write there. The last line counts.",
            "  A: 1 line is passed over: not whole, as a crash leaves them.",
            "  torch: A was made with 2.14.1, B with 2.15.0.",
        ],
    )


def test_a_training_that_was_continued_with_another_seed(said: Any) -> None:
    continued = [header(), batch(0), header(seed=8), batch(0, 1)]
    code, lines = said(continued, [header(seed=8), batch(0, 1)])
    assert code == 0
    assert "it holds several streams (seed 7, stream 0; seed 8, stream 0)" in lines[1]
    assert "goes on without SAFELOADER_SEED" in lines[1]


def test_two_folders_are_compared_pool_by_pool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in ("a", "b"):
        write(tmp_path / folder / "safeloader_audit_train%401.jsonl", header(pool="train@1"), batch(0))
        write(tmp_path / folder / "safeloader_audit_val.jsonl", header(pool="val"), batch(0, ord(folder)))
        write(tmp_path / folder / "safeloader_incidents.jsonl", {"kind": "worker-death"})
    write(tmp_path / "a" / "safeloader_audit_val.20250418-100000.jsonl", header(pool="val"), batch(0, 7))
    assert main(["audit", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "train@1: the same: 1 ticket, 0 (seed 7, stream 0)."
    assert lines[1].startswith("val: ticket 0 is the first that differs")
    assert not any("20250418" in line for line in lines), "what was put aside is another run"
    for folder in ("a", "b"):
        (tmp_path / folder / "safeloader_audit_val.jsonl").unlink()
    assert main(["audit", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    write(tmp_path / "b" / "safeloader_audit_val.jsonl", header(pool="val"), batch(0))
    capsys.readouterr()
    assert main(["audit", str(tmp_path / "a"), str(tmp_path / "b")]) == 1
    assert capsys.readouterr().out.splitlines()[1] == "val: there is no such audit in A."


def not_there(folder: Path) -> tuple[Path, str]:
    path = folder / "none.jsonl"
    said = "can't be read: No such file or directory; name a safeloader_audit_<pool>.jsonl, or the folder that holds it"
    return path, f"{path} {said}"


def no_audit(folder: Path) -> tuple[Path, str]:
    path = folder / "model.pth"
    path.write_bytes(bytes(range(256)) * 100)
    return path, f"{path} holds no line of an audit: name a safeloader_audit_<pool>.jsonl"


def empty_file(folder: Path) -> tuple[Path, str]:
    path = folder / "safeloader_audit_train.jsonl"
    path.touch()
    return path, f"{path} holds no line of an audit"


def a_folder(folder: Path) -> tuple[Path, str]:
    return folder, f"{folder} is a folder and {folder / 'good.jsonl'} is not: name two files, or two folders"


@pytest.mark.parametrize("make", [not_there, no_audit, empty_file, a_folder])
@pytest.mark.parametrize("turned", [False, True])
def test_what_is_no_audit_gets_one_line_and_a_2(
    make: Any, turned: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = write(tmp_path / "good.jsonl", header(), batch(0))
    path, expected = make(tmp_path)
    assert main(["audit", *map(str, (path, good) if turned else (good, path))]) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(f"safeloader audit: {expected}")
    assert (shown.err.count("\n"), shown.out) == (1, "")


def test_a_folder_without_audits_says_how_to_get_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(tmp_path), str(tmp_path)]) == 2
    assert capsys.readouterr().err == (
        f"safeloader audit: {tmp_path} holds no safeloader_audit_<pool>.jsonl: SAFELOADER_AUDIT=1 makes a training "
        "write it\n"
    )
