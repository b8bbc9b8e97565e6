"""The page that outlives its worker."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from safeloader.ring.memfile import MemoryFile
from safeloader.ring.status_page import _SEQ, Stage, StatusPage


@pytest.fixture
def page() -> Iterator[StatusPage]:
    page = StatusPage.create()
    yield page
    page.close()


def test_the_other_side_reads_what_was_written(page: StatusPage) -> None:
    writer = StatusPage(MemoryFile(os.dup(page.fd)))
    writer.enter(Stage.TRANSFORMING, 7, case="brain_007, brain_008", batches=3)
    writer.close()
    status = page.read()
    assert (status.stage, status.ticket, status.case, status.batches) == (
        Stage.TRANSFORMING,
        7,
        "brain_007, brain_008",
        3,
    )


def test_a_case_of_any_length_and_script_fits(page: StatusPage) -> None:
    page.enter(Stage.LOADING, 1, case="脳" * 5000)
    case = page.read().case
    assert case is not None
    assert case.startswith("脳" * 600)


def test_a_writer_that_died_in_mid_write_is_read_all_the_same(page: StatusPage) -> None:
    page.enter(Stage.LOADING, 4)
    _SEQ.pack_into(page._map, 0, 99)  # odd: somebody is writing, for ever
    assert page.read().ticket == 4


def test_the_word_is_the_glossarys() -> None:
    assert [stage.word for stage in Stage] == ["starting", "loading", "transforming", "encoding", "idle"]
