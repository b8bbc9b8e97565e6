"""Incidents on their way into a file that may be full, gone, or on a storage that stalls."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from enum import Enum, IntEnum
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from safeloader.report.journal import MAX_QUEUED, Errand, Journal, read
from safeloader.testing import wait_until

HEADER = """\
import os, sys, time
from pathlib import Path
from safeloader.report.journal import Journal, read
"""


def script(body: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", HEADER + textwrap.dedent(body), *map(str, arguments)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "incidents.jsonl"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


# ---- lines ----


def test_a_record_is_a_line(path: Path) -> None:
    journal = Journal(path)
    journal.write({"kind": "worker-death", "message": "a\nb", "case": "脳_007", "pid": 4711, "cause": None})
    journal.write({"kind": "worker-error"})
    assert journal.flush(5)
    first, second = path.read_text().splitlines()
    assert first.startswith('{"kind": "worker-death", "message": "a\\nb", "case": "脳_007", "pid": 4711, "cause": null')
    assert json.loads(second)["kind"] == "worker-error"
    found = os.statvfs(path.parent)
    assert 0 < json.loads(first)["disk_free_nbytes"] <= found.f_blocks * found.f_frsize


def test_what_json_does_not_take(path: Path) -> None:
    class Colour(str, Enum):
        RED = "red"

    class Code(IntEnum):
        LOST = 71

    loop: list[Any] = []
    loop.append(loop)
    values = {
        "nan": float("nan"),
        "inf": [-float("inf")],
        "path": Path("/x"),
        "bytes": b"\xff",
        "colour": Colour.RED,
        "code": Code.LOST,
        "float": np.float64(1.5),
        "single": np.float32(1.5),
        "integer": np.int64(7),
        "tuple": (1, {2: {3}}),
        "surrogate": "file\udcff",
        "loop": loop,
        5: "key",
    }
    journal = Journal(path)
    journal.write(values)  # type: ignore[arg-type]
    assert journal.flush(5)
    (line,) = lines(path)
    loop_text = str(line.pop("loop"))
    assert "..." in loop_text
    del line["disk_free_nbytes"]
    assert line == {
        "nan": "nan",
        "inf": ["-inf"],
        "path": "/x",
        "bytes": "b'\\xff'",
        "colour": "red",
        "code": 71,
        "float": 1.5,
        "single": "1.5",
        "integer": "7",
        "tuple": [1, {"2": "{3}"}],
        "surrogate": "file\udcff",
        "5": "key",
    }


def test_a_record_may_be_changed_after_it_was_written(path: Path) -> None:
    journal = Journal(path)
    journal._errand._busy.acquire()  # the thread has not begun
    record = {"cases": ["a"]}
    journal.write(record)
    record["cases"].append("b")
    journal._errand._busy.release()
    assert journal.flush(5)
    assert lines(path)[0]["cases"] == ["a"]


def test_the_mode_is_as_umask_says(path: Path) -> None:
    before = os.umask(0o027)
    try:
        journal = Journal(path)
        journal.write({})
        assert journal.flush(5)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_relative_path_is_where_it_was_when_the_journal_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    journal = Journal(Path("j.jsonl"))
    monkeypatch.chdir("/")
    journal.write({})
    assert journal.flush(5)
    assert (tmp_path / "j.jsonl").exists()


def test_a_line_that_a_crash_cut_off_is_ended_first(path: Path) -> None:
    path.write_bytes(b'{"number": 1}\n{"numb')
    journal = Journal(path)
    journal.write({"number": 2})
    assert journal.flush(5)
    entries = read(path)
    assert [entry["number"] for entry in entries] == [1, 2]
    assert entries.skipped == 1
    assert path.read_bytes().count(b"\n") == 3


def test_a_file_that_can_be_written_but_not_read(path: Path) -> None:
    path.write_bytes(b'{"number": 1}\n{"numb')

    def refuse(path: Path, mode: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(Path, "open", refuse)
        journal = Journal(path)
        journal.write({"number": 2})
        assert journal.flush(5)
    assert [entry["number"] for entry in read(path)] == [1, 2]


def test_several_processes_append_to_the_same_file(path: Path) -> None:
    body = """
        journal = Journal(Path(sys.argv[1]))
        for number in range(200):
            journal.write({"rank": int(sys.argv[2]), "number": number, "text": "x" * 5000})
        assert journal.flush(60)
    """
    ranks = [subprocess.Popen(script(body, path, rank)) for rank in range(4)]
    assert [rank.wait(60) for rank in ranks] == [0] * 4
    entries = read(path)
    found = [(entry["rank"], entry["number"]) for entry in entries]
    assert entries.skipped == 0
    for rank in range(4):
        assert [number for of, number in found if of == rank] == list(range(200))


# ---- storage that fails ----


def test_a_folder_that_is_not_there_is_made_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "run" / "incidents.jsonl"
    journal = Journal(path)
    journal.write({"number": 1})
    assert journal.flush(5)
    path.unlink()
    path.parent.rmdir()
    for number in (2, 3):
        journal.write({"number": number})
        assert not journal.flush(5)
    assert not path.parent.exists(), "what is removed again is meant to be gone"
    (warning,) = [record.getMessage() for record in caplog.records]
    assert str(path) in warning and "No such file or directory (ENOENT)" in warning and "Make the folder" in warning
    path.parent.mkdir()
    journal.write({"number": 4})
    assert journal.flush(5)
    assert [entry["number"] for entry in read(path)] == [2, 3, 4]


def test_a_whole_path_that_is_missing_is_not_made(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path / "not" / "mounted" / "j.jsonl")
    journal.write({})
    assert not journal.flush(5)
    assert os.listdir(tmp_path) == []
    assert "ENOENT" in caplog.text


def _fails(monkeypatch: pytest.MonkeyPatch, name: str, error: int) -> None:
    real = getattr(os, name)

    def fail(*arguments: Any, **options: Any) -> Any:
        if threading.current_thread().name == "safeloader-journal":
            raise OSError(error, os.strerror(error))
        return real(*arguments, **options)

    monkeypatch.setattr(os, name, fail)


@pytest.mark.parametrize(
    ("call", "error", "advice"),
    [
        ("open", errno.EROFS, "Mount it writable"),
        ("open", errno.EACCES, "the right to write"),
        ("open", errno.ESTALE, "Check that storage"),
        ("write", errno.EIO, "Check that storage"),
        ("write", errno.ENOSPC, "Free some space there"),
        ("write", errno.EDQUOT, "quota"),
    ],
)
def test_a_failing_storage_is_told_once_and_tried_again(
    path: Path, caplog: pytest.LogCaptureFixture, call: str, error: int, advice: str
) -> None:
    caplog.set_level(logging.WARNING, logger="safeloader")
    journal = Journal(path)
    with pytest.MonkeyPatch.context() as monkeypatch:
        _fails(monkeypatch, call, error)
        for number in range(3):
            journal.write({"number": number})
            assert not journal.flush(5)
    assert journal.queued == 3
    (warning,) = [record.getMessage() for record in caplog.records]
    assert str(path) in warning and f"({errno.errorcode[error]})" in warning and advice in warning
    journal.write({"number": 3})
    assert journal.flush(5)
    assert [entry["number"] for entry in read(path)] == [0, 1, 2, 3]


def test_free_space_that_nobody_tells_is_not_known(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _fails(monkeypatch, "fstatvfs", errno.EIO)
    journal = Journal(path)
    journal.write({})
    assert journal.flush(5)
    assert lines(path) == [{"disk_free_nbytes": None}]


def test_an_error_told_at_closing_time_has_the_line_written_again(path: Path) -> None:
    journal = Journal(path)
    real = os.close

    def close(fd: int) -> None:
        real(fd)
        if threading.current_thread().name == "safeloader-journal":
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(os, "close", close)
        journal.write({"number": 1})
        assert not journal.flush(5)
    assert journal.flush(5)
    assert len(lines(path)) >= 2, "at least once"
    assert {entry["number"] for entry in read(path)} == {1}


def test_a_full_disk(caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(Path("/dev/full"))
    journal.write({})
    assert not journal.flush(5)
    assert "No space left on device (ENOSPC)" in caplog.text
    assert "1 of at most 1000 are kept" in caplog.text


def test_a_disk_that_fills_up_in_the_middle_of_a_line(path: Path) -> None:
    body = """
        import resource, logging
        logging.basicConfig(stream=sys.stdout, format="%(message)s")
        journal = Journal(Path(sys.argv[1]))
        journal.write({"number": 0, "text": "x" * 500})
        assert journal.flush(5)
        resource.setrlimit(resource.RLIMIT_FSIZE, (800, resource.RLIM_INFINITY))
        journal.write({"number": 1, "text": "x" * 500})
        assert not journal.flush(5)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        journal.write({"number": 2})
        assert journal.flush(5)
    """
    ended = subprocess.run(script(body, path), capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "EFBIG" in ended.stdout
    entries = read(path)
    assert [entry["number"] for entry in entries] == [0, 1, 2]
    assert entries.skipped == 1


def test_a_short_write_is_followed_by_the_whole_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    calls: list[int] = []

    def write(fd: int, data: bytes) -> int:
        calls.append(len(data))
        return real(fd, data[:10] if len(calls) == 1 else data)

    monkeypatch.setattr(os, "write", write)
    journal = Journal(path)
    journal.write({"number": 1})
    assert journal.flush(5)
    entries = read(path)
    assert [entry["number"] for entry in entries] == [1]
    assert entries.skipped == 1


# ---- storage that stalls ----


def test_a_stalled_storage_stops_neither_the_caller_nor_the_interpreter(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    body = """
        journal = Journal(Path(sys.argv[1]))
        began = time.monotonic()
        for number in range(1500):
            journal.write({"number": number})
        assert time.monotonic() - began < 2
        assert not journal.flush(0.2)
        print(journal.queued)
    """
    ended = subprocess.run(script(body, fifo), capture_output=True, text=True, timeout=30, check=False)
    assert (ended.returncode, ended.stdout) == (0, "1000\n"), ended.stderr


def test_what_was_left_out_meanwhile_is_counted(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    journal = Journal(fifo)
    for number in range(MAX_QUEUED + 7):
        journal.write({"number": number})
    assert journal.queued == MAX_QUEUED
    assert not journal.flush(0)
    reading = os.open(fifo, os.O_RDONLY)
    holding = os.open(fifo, os.O_WRONLY)  # so that reading does not end between two lines
    os.set_blocking(reading, False)
    said = b""

    def has_come(count: int) -> bool:
        nonlocal said
        with contextlib.suppress(BlockingIOError):
            said += os.read(reading, 1 << 20)
        return said.count(b"\n") >= count

    wait_until(lambda: has_come(MAX_QUEUED))
    assert journal.flush(5)
    journal.write({"number": "after"})
    journal.write({"number": "later"})
    wait_until(lambda: has_come(MAX_QUEUED + 2))
    os.close(reading)
    os.close(holding)
    records = [json.loads(line) for line in said.splitlines()]
    assert [record["number"] for record in records] == [*range(MAX_QUEUED), "after", "later"]
    assert [record.get("records_left_out") for record in records[-2:]] == [7, None]


def test_what_was_left_out_at_the_end_has_a_line_of_its_own(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "folder" / "j.jsonl", max_queued=2, disk_free=False)
    journal._may_make_folder = False  # so nothing can be written
    for number in range(5):
        journal.write({"number": number})
    assert not journal.flush(5)
    (tmp_path / "folder").mkdir()
    assert journal.close(5)
    expected = [{"number": 0}, {"number": 1}, {"records_left_out": 3}]
    assert lines(journal.path) == expected
    assert journal.close(5)
    assert lines(journal.path) == expected, "it is said once"


def test_the_warning_says_what_the_record_is_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(tmp_path / "not" / "mounted" / "j.jsonl", what="a delivered batch", max_queued=50)
    journal.write({})
    assert not journal.flush(5)
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith("SafeLoader: the record of a delivered batch can't be written to ")
    assert "1 of at most 50 are kept and tried again with the next one." in warning


def test_in_a_forked_child_nothing_happens(path: Path) -> None:
    journal = Journal(path)
    assert journal._errand._busy.acquire()  # as if the thread were at work: it does not exist in the child
    pid = os.fork()
    if pid == 0:
        journal.write({"from": "child"})
        os._exit(0 if journal.flush(5) and journal.queued == 0 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    journal._errand._busy.release()
    journal.write({"from": "trainer"})
    assert journal.flush(5)
    assert [record["from"] for record in lines(path)] == ["trainer"]


# ---- the errand ----


def _count() -> tuple[list[int], Callable[[], None]]:
    done: list[int] = []
    return done, lambda: done.append(1)


def test_nothing_asked_for_is_forgotten() -> None:
    queue: list[int] = []
    done: list[int] = []

    def work() -> None:
        while queue:
            done.append(queue.pop())

    errand = Errand("errand", work)

    def ask() -> None:
        for number in range(300):
            queue.append(number)
            errand.go()
            if number % 50 == 0:
                errand.wait(0.001)

    asking = [threading.Thread(target=ask) for _ in range(4)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert errand.wait(10)
    assert len(done) == 1200


def test_asked_for_while_somebody_waits_is_done_by_who_waits() -> None:
    done, work = _count()
    errand = Errand("errand", work)
    errand._busy.acquire()
    assert errand.go(), "somebody has the lock, and looks again"
    errand._busy.release()
    assert errand.wait(5)
    assert done


def test_no_thread_stays() -> None:
    _, work = _count()
    errand = Errand("safeloader-errand", work)
    errand.go()
    assert errand.wait(5)
    wait_until(lambda: "safeloader-errand" not in [thread.name for thread in threading.enumerate()])


def test_without_a_thread_it_says_so_and_does_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    done, work = _count()
    errand = Errand("errand", work)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", start)
        assert not errand.go()
        began = time.monotonic()
        assert not errand.wait(5)
        assert time.monotonic() - began < 2
    assert errand.wait(5)
    assert done == [1]


# ---- reading ----


def test_lines_that_are_no_record_are_skipped_and_counted(path: Path) -> None:
    path.write_bytes(
        b'{"number": 1}\n\n   \n{"number": 2}{"number": 3}\n[4]\n"five"\n\x00\x00\x00\n\xff\xfe\n'
        + b"[" * 100_000
        + b'\n{"number": 6, "x": NaN}\n{"number": 7}'
    )
    entries = read(path)
    assert [entry["number"] for entry in entries] == [1, 6, 7]
    assert entries.skipped == 6
    assert len(list(entries)) == 3
    assert entries.skipped == 6, "each iteration counts anew"


def test_a_journal_that_is_not_there(path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        list(read(path))
