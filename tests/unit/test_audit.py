"""Audits: what stands in the file, whatever happens to it, and what two of them say of each other."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from safeloader.errors import ConfigError
from safeloader.report import audit as audit_module
from safeloader.report.audit import FILE_PATTERN, Audit, Header, audit_file
from safeloader.report.comparison import Recording, compare, read
from safeloader.testing import wait_until

SUMS = [f"{number:032x}" for number in range(100)]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def deliver(audit: Audit, tickets: range) -> None:
    for ticket in tickets:
        audit.made(ticket, ("case",), SUMS[ticket], (("data", SUMS[0]),))
        audit.delivered(ticket)


# ---- written ----


def test_a_header_and_a_line_per_delivered_ticket(tmp_path: Path) -> None:
    audit = Audit(str(tmp_path), Header("train", 2**70, 3, 5))
    deliver(audit, range(5, 7))
    audit.made(7, ("never delivered",), SUMS[7], ())
    audit.close()
    header, *rest = lines(tmp_path / "safeloader_audit_train.jsonl")
    assert {key: header[key] for key in ("audit", "pool", "seed", "stream", "first_ticket")} == {
        "audit": 1, "pool": "train", "seed": 2**70, "stream": 3, "first_ticket": 5
    }  # fmt: skip
    assert all(header[package] for package in ("torch", "numpy"))
    assert rest == [
        {"ticket": ticket, "cases": ["case"], "checksum": SUMS[ticket], "parts": {"data": SUMS[0]}} for ticket in (5, 6)
    ]


def test_of_a_batch_that_was_made_again_the_last_counts(tmp_path: Path) -> None:
    audit = Audit(str(tmp_path), Header("train", 1, 0, 0))
    audit.made(0, ("bad",), SUMS[1], ())
    audit.made(0, ("good",), SUMS[2], ())
    audit.delivered(0)
    audit.close()
    assert [(line["cases"], line["checksum"]) for line in lines(tmp_path / audit_file("train"))[1:]] == [
        (["good"], SUMS[2])
    ]


def test_a_delivery_that_was_interrupted_is_said_again(tmp_path: Path) -> None:
    audit = Audit(str(tmp_path), Header("train", 1, 0, 0))
    deliver(audit, range(2))
    audit.delivered(1)
    audit.close()
    assert [line["ticket"] for line in lines(tmp_path / audit_file("train"))[1:]] == [0, 1, 1]
    assert list(audit._made) == [1], "what is delivered is forgotten"


def test_storage_that_stalls_makes_nobody_wait_and_the_file_says_what_it_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_module, "MAX_QUEUED", 10)
    path = tmp_path / audit_file("train")
    os.mkfifo(path)  # opening it blocks until somebody reads
    audit = Audit(str(tmp_path), Header("train", 1, 0, 0))
    deliver(audit, range(30))
    audit.close()
    reading = os.open(path, os.O_RDONLY)
    holding = os.open(path, os.O_WRONLY)
    said = bytearray()

    def has_come() -> bool:
        said.extend(os.read(reading, 1 << 20) if said.count(b"\n") < 11 else b"")
        return said.count(b"\n") == 11

    wait_until(has_come)
    os.close(reading)
    os.close(holding)
    records = [json.loads(line) for line in said.splitlines()]
    assert [record.get("ticket") for record in records] == [None, *range(9), None]
    assert records[-1] == {"records_left_out": 21}


@pytest.mark.parametrize(
    ("pool", "file"),
    [
        ("train", "safeloader_audit_train.jsonl"),
        ("train@1", "safeloader_audit_train%401.jsonl"),
        ("../../etc/x", "safeloader_audit_%2E%2E%2F%2E%2E%2Fetc%2Fx.jsonl"),
        ("a%b", "safeloader_audit_a%25b.jsonl"),
        ("", "safeloader_audit_%.jsonl"),
    ],
)
def test_names_of_files(pool: str, file: str) -> None:
    assert audit_file(pool) == file
    assert FILE_PATTERN.fullmatch(file)


@given(one=st.text(), other=st.text() | st.text(min_size=200))
def test_any_name_is_safe_and_its_own(one: str, other: str) -> None:
    for pool in (one, other):
        file = audit_file(pool)
        assert file.isascii() and len(file) < 200 and Path(file).name == file and FILE_PATTERN.fullmatch(file)
    assert (audit_file(one) == audit_file(other)) == (one == other)


# ---- read and compared ----


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Recording]:
    """Writes the lines into a file (text as it is), and reads it."""
    numbers = iter(range(100))

    def write(*content: dict[str, Any] | str) -> Recording:
        path = tmp_path / f"{next(numbers)}.jsonl"
        path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in content))
        return read(path)

    return write


def header(seed: int = 7, stream: int = 0, **more: Any) -> dict[str, Any]:
    return {"audit": 1, "pool": "train", "seed": seed, "stream": stream, "first_ticket": 0, **more}


def batch(ticket: int, content: int = 0, **more: Any) -> dict[str, Any]:
    parts = {"data": SUMS[content], "keys": SUMS[50]}
    return {"ticket": ticket, "cases": ["a", "b"], "checksum": SUMS[content], "parts": parts, **more}


def batches(*tickets: int) -> Iterator[dict[str, Any]]:
    return (batch(ticket, ticket) for ticket in tickets)


Write = Callable[..., Recording]


def test_the_same(write: Write) -> None:
    found = compare(write(header(), *batches(0, 1, 2)), write(header(), *batches(2, 0, 1)))
    assert found.agree and (found.same, found.first, found.unrecorded) == (3, None, 0)


def test_other_content_of_the_same_cases(write: Write) -> None:
    a = write(header(), *batches(*range(10)))
    b = write(header(), *batches(*range(4)), batch(4, 60), *batches(5, 6, 7), batch(8, 61), batch(9, 9))
    found = compare(a, b)
    assert not found.agree and found.first is not None
    assert (found.first.ticket, found.first.before, found.first.all_in_all, found.same) == (4, 4, 2, 8)
    assert found.first.same_cases and found.first.parts() == (["data"], ["keys"])


def test_other_cases(write: Write) -> None:
    found = compare(write(header(), batch(0)), write(header(), batch(0, 1, cases=["a", "c"])))
    assert found.first is not None and not found.first.same_cases
    assert [line["cases"] for line in (found.first.a, found.first.b) if line] == [["a", "b"], ["a", "c"]]


@pytest.mark.parametrize(("there", "missing"), [([0, 1, 3], 2), ([0, 1], 2), ([2, 3], 0), ([], 0)])
def test_a_ticket_that_is_missing_in_one(write: Write, there: list[int], missing: int) -> None:
    whole, part = write(header(), *batches(0, 1, 2, 3)), write(header(), *batches(*there))
    for one, other in ((whole, part), (part, whole)):
        first = compare(one, other).first
        assert first is not None and first.ticket == missing
        assert (first.a is None, first.b is None) == (one is part, other is part)


def test_lines_that_were_left_out_are_no_difference_but_no_agreement_either(write: Write) -> None:
    a = write(header(), *batches(*range(6)))
    b = write(header(), *batches(0, 1), {**batch(4, 4), "records_left_out": 2}, batch(5, 5))
    found = compare(a, b)
    assert (found.first, found.same, found.unrecorded, found.agree) == (None, 4, 2, False)
    more_missing = write(header(), *batches(0), {**batch(4, 4), "records_left_out": 2}, batch(5, 5))
    first = compare(a, more_missing).first
    assert first is not None and first.ticket == 1
    changed = write(header(), *batches(0, 1), {**batch(4, 4), "records_left_out": 2}, batch(5, 60))
    first = compare(a, changed).first
    assert first is not None and first.ticket == 5


def test_other_streams(write: Write) -> None:
    for other in (header(seed=8), header(stream=1)):
        found = compare(write(header(), batch(0)), write(other, batch(0)))
        assert not found.one_stream and not found.agree and found.first is None


def test_of_repeats_the_last_counts_and_disagreement_is_remembered(write: Write) -> None:
    twice = write(header(), *batches(0, 1, 2), header(), batch(0, 0), batch(1, 60), batch(2, 2))
    assert (twice.repeats, twice.disagreeing) == (3, {1})
    assert compare(twice, write(header(), batch(0, 0), batch(1, 60), batch(2, 2))).agree
    first = compare(twice, write(header(), *batches(0, 1, 2))).first
    assert first is not None and first.ticket == 1


@pytest.mark.parametrize(
    "cut", ['{"ticket": 3, "cas', "\x00" * 50, '{"ticket": 3}', '{"ticket": 3, "checksum": "x"}', "[1]", "[" * 100_000]
)
def test_what_a_crash_leaves_is_passed_over(write: Write, cut: str) -> None:
    whole = write(header(), *batches(0, 1))
    for torn in (write(header(), *batches(0, 1), cut), write(header(), batch(0, 0), f"{cut}\n", batch(1, 1))):
        assert torn.cut == 1
        assert compare(whole, torn).agree


def test_a_last_line_without_its_end_counts_if_it_is_whole(write: Write) -> None:
    whole = write(header(), *batches(0, 1), json.dumps(batch(2, 2)))
    assert (list(whole.tickets), whole.cut) == ([0, 1, 2], 0)


def test_lines_are_found_again_behind_other_characters(write: Write) -> None:
    a = write(header(), json.dumps(batch(0, 0, cases=["脳_007"]), ensure_ascii=False) + "\n\n", batch(1, 1))
    assert (a.line(0)["cases"], a.line(1)["ticket"]) == (["脳_007"], 1)


@pytest.mark.parametrize("content", ["", "\n\n", "no audit\n" * 10, '{"kind": "worker-death"}\n'])
def test_what_is_no_audit_is_refused(write: Write, content: str) -> None:
    with pytest.raises(ConfigError, match=r"holds no line of an audit: name a safeloader_audit_<pool>\.jsonl"):
        write(content)


def test_a_later_format_is_refused(write: Write) -> None:
    with pytest.raises(ConfigError, match="is an audit of format 2, and this SafeLoader reads format 1: compare with"):
        write({**header(), "audit": 2})


@given(
    tickets=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2)), max_size=20),
    others=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 2)), max_size=20),
)
def test_it_is_what_two_dicts_say(
    tickets: list[tuple[int, int]], others: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp()
    for name, side in (("a", tickets), ("b", others)):
        text = "\n".join(map(json.dumps, [header(), *(batch(*place) for place in side)]))
        (folder / f"{name}.jsonl").write_text(text)
    found = compare(read(folder / "a.jsonl"), read(folder / "b.jsonl"))
    a, b = dict(tickets), dict(others)
    differing = [ticket for ticket in range(9) if a.get(ticket) != b.get(ticket)]
    assert found.agree == (a == b)
    assert (found.first.ticket if found.first else None) == min(differing, default=None)
    assert found.same == sum(a[ticket] == b[ticket] for ticket in a.keys() & b.keys())
