"""The page that outlives its worker."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from safeloader.ring.memfile import MemoryFile
from safeloader.ring.status_page import _SEQ, Stage, StatusPage, words


@pytest.fixture
def page() -> Iterator[StatusPage]:
    page = StatusPage.create()
    yield page
    page.close()


def test_the_other_side_reads_what_was_written(page: StatusPage) -> None:
    writer = StatusPage(MemoryFile(os.dup(page.fd)))
    writer.enter(Stage.TRANSFORMING, 7, cases=("brain_007", "brain_008"), batches=3)
    writer.close()
    status = page.read()
    assert (status.stage, status.ticket, status.case, status.batches) == (
        Stage.TRANSFORMING,
        7,
        "brain_007, brain_008",
        3,
    )


def test_a_case_of_any_length_and_script_fits(page: StatusPage) -> None:
    page.enter(Stage.LOADING, 1, cases=["脳" * 5000])
    case = page.read().case
    assert case is not None
    assert case.startswith("脳" * 600)


def test_one_case_is_the_culprit_and_several_are_not(page: StatusPage) -> None:
    page.enter(Stage.LOADING, 1, cases=["brain_007"])
    assert page.read().culprit == "brain_007"
    page.enter(Stage.LOADING, 1, cases=["brain_007", "brain_008"])
    assert page.read().culprit is None
    page.enter(Stage.LOADING, 1)
    assert (page.read().culprit, page.read().case) == (None, None)


def test_of_many_cases_a_few_are_named() -> None:
    assert words([f"c{number}" for number in range(57)]) == "c0, c1, c2, c3 and 53 more"


def test_stacks_are_found_beside_the_page(page: StatusPage) -> None:
    assert page.stacks() is None
    writer = StatusPage(MemoryFile(os.dup(page.fd)))
    os.write(writer.stacks_file(), b"Thread 1\n  File x\n")
    writer.enter(Stage.LOADING, 4)
    writer.close()
    assert page.stacks() == "Thread 1\n  File x"
    assert page.read().ticket == 4


def test_a_writer_that_died_in_mid_write_is_read_all_the_same(page: StatusPage) -> None:
    page.enter(Stage.LOADING, 4)
    _SEQ.pack_into(page._map, 0, 99)  # odd: somebody is writing, for ever
    assert page.read().ticket == 4


def test_the_word_is_the_glossarys() -> None:
    assert [stage.word for stage in Stage] == ["starting", "loading", "transforming", "encoding", "idle"]
