"""The fault table, part four: whose fault it is. A bug is raised, chance is drawn anew, a bad case is quarantined.

Over nnU-Net's loader, batchgenerators' own, and loaders that tell their cases by `note_case`, or not at all.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from batchgenerators.dataloading.data_loader import DataLoader

from safeloader import SafeAugmenter, note_case
from safeloader.errors import BadCaseError, RemoteTraceback, WorkerError
from safeloader.pool.book import INCIDENTS_FILE
from safeloader.testing import wait_until
from tests import damage

pytestmark = pytest.mark.usefixtures("warm_nursery")

SEED = 7
CASES = 8
BAD = "case_003"


def die() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def fail() -> None:
    raise ValueError("label 7 is unknown")


class Noting:
    """A loader of a user's own, which tells SafeLoader its case. A batch is `data` `(1,)` float64 and `keys`."""

    def __init__(self, deed: Callable[[], object], bad: str | None = BAD) -> None:
        self.deed, self.bad = deed, bad

    def __iter__(self) -> Noting:
        return self

    def __next__(self) -> dict[str, Any]:
        case = f"case_{np.random.randint(CASES):03d}"
        self.tell(case)
        if case == self.bad:
            self.deed()
        return {"data": np.random.uniform(size=1), "keys": [case]}

    def tell(self, case: str) -> None:
        note_case(case)


class Silent(Noting):
    """The same, and it tells nothing."""

    def tell(self, case: str) -> None:
        pass


def generate(deed: Callable[[], object]) -> Iterator[dict[str, Any]]:
    """The same as `Noting`, as a generator."""
    while True:
        case = f"case_{np.random.randint(CASES):03d}"
        note_case(case)
        if case == BAD:
            deed()
        yield {"data": np.random.uniform(size=1), "keys": [case]}


class Plain(DataLoader):  # type: ignore[misc]  # batchgenerators has no types
    """batchgenerators' way: its indices are numbers here, and no case is told."""

    def __init__(self, deed: Callable[[], object]) -> None:
        super().__init__(list(range(CASES)), batch_size=2, infinite=True)
        self.indices = list(range(CASES))
        self.deed = deed

    def generate_train_batch(self) -> dict[str, Any]:
        drawn = self.get_indices()
        if 3 in drawn:
            self.deed()
        return {"data": np.random.uniform(size=(2, 1)), "numbers": list(drawn)}


class Clumsy:
    """A transform with a bug that a share of all draws meets. (A class: it must travel to the workers.)"""

    def __init__(self, share: float) -> None:
        self.share = share

    def __call__(self, **sample: Any) -> dict[str, Any]:
        if np.random.uniform() < self.share:
            raise IndexError("crop is larger than the image")
        return sample


def rows(augmenter: SafeAugmenter, count: int) -> list[tuple[bytes, tuple[str, ...]]]:
    batches = [next(augmenter) for _ in range(count)]
    return [(bytes(np.asarray(b["data"]).data), tuple(map(str, b.get("keys", b.get("numbers"))))) for b in batches]


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "preprocessed"
    damage.tiny_loader(folder, cases=CASES)
    return folder


def nnunet(folder: Path, transforms: Callable[..., dict[str, Any]] | None = None, **options: Any) -> SafeAugmenter:
    loader = damage.tiny_loader(folder, cases=0, transforms=transforms)
    return SafeAugmenter(loader, None, 2, 2, seed=SEED, **options)


# ---- bugs and chance ----


def test_a_bug_in_a_transform_is_raised_at_once(pristine: Path) -> None:
    with nnunet(pristine, Clumsy(share=1.0)) as augmenter:
        next_began = time.monotonic()
        with pytest.raises(WorkerError) as caught:
            next(augmenter)
        took_s = time.monotonic() - next_began
        report = augmenter.report()
    error = caught.value
    assert took_s < 5, "most of it is the workers' start"
    assert (error.stage, error.ticket) == ("transforming", 0)
    assert re.fullmatch(r"case_00\d", str(error.case))
    assert re.fullmatch(
        r"IndexError: crop is larger than the image, raised in worker loader-\d \(pid \d+\) while transforming the "
        rf"batch of ticket 0 \(case {error.case}\)\.",
        str(error),
    )
    assert isinstance(error.exception, IndexError)
    assert isinstance(error.__cause__, RemoteTraceback)
    assert "in __call__\n" in error.__cause__.text and "test_blame.py" in error.__cause__.text
    assert report.quarantined == ()


def test_a_bug_that_one_draw_in_ten_meets_quarantines_nobody(pristine: Path) -> None:
    streams = []
    for _ in range(2):
        with nnunet(pristine, Clumsy(share=0.1)) as augmenter:
            streams.append(rows(augmenter, 150))
            report = augmenter.report()
        assert report.quarantined == ()
        assert report.batches == 150
        assert report.incident_counts["redraw"] >= 10, "about every fifth batch"
        assert set(report.incident_counts) == {"worker-error", "redraw"}
        assert {case for _, keys in streams[-1] for case in keys} == {f"case_{n:03d}" for n in range(CASES)}
    assert streams[0] == streams[1], "a redraw's random numbers follow from the ticket and the attempt"


# ---- what two strikes lead to ----


def test_raise_ends_the_stream_with_the_exception_itself(pristine: Path) -> None:
    with SafeAugmenter(Noting(fail), None, 2, 2, seed=SEED, on_bad_case="raise") as augmenter:
        with pytest.raises(
            WorkerError, match=r"ValueError: label 7 is unknown, raised in .*\(case case_003\)"
        ) as caught:
            rows(augmenter, 100)
        assert augmenter.report().quarantined == ()
    assert (caught.value.case, caught.value.stage) == (BAD, "loading")


def test_raise_ends_the_stream_after_two_deaths(pristine: Path) -> None:
    with SafeAugmenter(Noting(die), None, 2, 2, seed=SEED, on_bad_case="raise") as augmenter:
        with pytest.raises(BadCaseError) as caught:
            rows(augmenter, 100)
        report = augmenter.report()
    assert report.quarantined == ()
    assert caught.value.case == BAD
    assert re.match(
        r"case case_003 of pool 'loader' has two strikes \(on_bad_case='raise'\): \d x SIGSEGV while loading\. Last: "
        r"worker loader-\d \(pid \d+\) was killed by SIGSEGV while loading the batch of ticket \d+ \(case case_003\)",
        str(caught.value),
    )
    assert {incident.case for incident in caught.value.incidents} == {BAD}


class Patient(Noting):
    """Dies of the bad case until the file `repaired` is there."""

    def __init__(self, repaired: Path) -> None:
        super().__init__(die)
        self.repaired = repaired

    def __next__(self) -> dict[str, Any]:
        self.bad = None if self.repaired.exists() else BAD
        return super().__next__()


def test_retry_tries_the_same_draw_until_it_works(tmp_path: Path) -> None:
    with SafeAugmenter(Noting(die, bad=None), None, 2, 2, seed=SEED) as augmenter:
        undisturbed = rows(augmenter, 30)
    assert any(keys == (BAD,) for _, keys in undisturbed)
    augmenter = SafeAugmenter(Patient(tmp_path / "repaired"), None, 2, 2, seed=SEED, on_bad_case="retry")
    with augmenter:
        augmenter._start()
        wait_until(lambda: augmenter.report().incident_counts.get("worker-death", 0) >= 4, timeout_s=30)
        (tmp_path / "repaired").touch()
        assert rows(augmenter, 30) == undisturbed
        assert set(augmenter.report().incident_counts) <= {"worker-death", "degrade"}


# ---- loaders of other kinds ----


@pytest.mark.parametrize("deed", [die, fail])
def test_a_loader_that_notes_its_cases(deed: Callable[[], object]) -> None:
    with SafeAugmenter(Noting(deed), None, 2, 2, seed=SEED) as augmenter:
        batches = rows(augmenter, 100)
        report = augmenter.report()
    assert report.quarantined == (BAD,)
    assert {keys for _, keys in batches} == {(f"case_{n:03d}",) for n in range(CASES) if n != 3}
    (quarantine,) = [incident for incident in report.incidents if incident.kind == "quarantine"]
    assert quarantine.case == BAD


@pytest.mark.parametrize("deed", [die, fail])
def test_a_generator_cannot_pass_over_a_case_but_is_survived(deed: Callable[[], object]) -> None:
    """It dies of the case again and again; each time its ticket is drawn anew."""
    loader = generate(deed)
    with SafeAugmenter(loader, None, 2, 2, seed=SEED, max_restarts=1000) as augmenter:
        batches = rows(augmenter, 40)
        report = augmenter.report()
    assert report.quarantined == (BAD,)
    assert (BAD,) not in {keys for _, keys in batches}
    assert report.batches == 40


def test_outside_of_a_worker_note_case_does_nothing() -> None:
    note_case(BAD)
    assert next(Noting(fail, bad=None))["keys"]


def test_without_a_known_case_an_exception_that_comes_again_is_raised() -> None:
    with SafeAugmenter(Silent(fail), None, 2, 2, seed=SEED) as augmenter:
        with pytest.raises(WorkerError, match="label 7 is unknown") as caught:
            rows(augmenter, 100)
        report = augmenter.report()
    assert caught.value.case is None
    assert report.quarantined == ()


def test_without_a_known_case_a_deadly_ticket_is_drawn_anew() -> None:
    streams = []
    for _ in range(2):
        with SafeAugmenter(Silent(die), None, 2, 2, seed=SEED, max_restarts=1000) as augmenter:
            streams.append(rows(augmenter, 30))
            report = augmenter.report()
        assert report.quarantined == ()
        assert set(report.incident_counts) <= {"worker-death", "redraw", "degrade", "recovery"}
        redraws = [incident for incident in report.incidents if incident.kind == "redraw"]
        assert redraws
        assert all("safeloader.note_case would tell" in redraw.message for redraw in redraws)
    assert streams[0] == streams[1]


class PlainNoting(Plain):
    """The same, and it works on one case after the other."""

    def generate_train_batch(self) -> dict[str, Any]:
        drawn = self.get_indices()
        for number in drawn:
            note_case(number)
            if number == 3:
                self.deed()
        return {"data": np.random.uniform(size=(2, 1)), "numbers": list(drawn)}


@pytest.mark.parametrize("deed", [die, fail])
def test_batchgenerators_own_loader_whose_indices_are_numbers(deed: Callable[[], object]) -> None:
    with SafeAugmenter(PlainNoting(deed), None, 2, 2, seed=SEED) as augmenter:
        batches = rows(augmenter, 60)
        report = augmenter.report()
    assert report.quarantined == ("3",)
    assert {number for _, numbers in batches for number in numbers} == {str(n) for n in range(CASES) if n != 3}


def test_batchgenerators_own_loader_that_does_not_say_which_of_its_batch() -> None:
    """Two cases are in hand: neither is blamed, and the exception is raised with both names."""
    with SafeAugmenter(Plain(fail), None, 2, 2, seed=SEED) as augmenter:
        with pytest.raises(WorkerError, match=r"label 7 is unknown.*\(case [0-7](, [0-7])?\)") as caught:
            rows(augmenter, 60)
        assert augmenter.report().quarantined == ()
    assert "3" in str(caught.value.case).split(", ")


# ---- the memory of a quarantine ----


def quarantining(folder: Path) -> SafeAugmenter:
    return SafeAugmenter(Noting(fail), None, 2, 2, seed=SEED, folder=str(folder))


def test_a_quarantine_survives_a_restart_and_is_remembered_in_the_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with quarantining(tmp_path) as augmenter:
        first = rows(augmenter, 40)
        before = dict(augmenter.report().incident_counts)
        augmenter.restart()
        rows(augmenter, 40)
        assert augmenter.report().quarantined == (BAD,)
        assert augmenter.report().incident_counts == before, "nothing was tried again"
    caplog.clear()
    with quarantining(tmp_path) as augmenter:
        again = rows(augmenter, 40)
        assert augmenter.report().quarantined == (BAD,)
        assert augmenter.report().incident_counts == {}
    assert again == first
    wait_until(lambda: "quarantined since" in caplog.text)
    assert (
        f"cases of pool 'loader' are quarantined since an earlier run ({BAD}): remove their lines from "
        f"{tmp_path / INCIDENTS_FILE} to have them drawn again." in caplog.text
    )


def test_a_quarantine_is_one_pools(tmp_path: Path) -> None:
    with quarantining(tmp_path) as augmenter:
        rows(augmenter, 40)
    loader = Noting(fail, bad=None)
    with SafeAugmenter(loader, None, 2, 2, seed=SEED, folder=str(tmp_path), name="other") as augmenter:
        assert (BAD,) in {keys for _, keys in rows(augmenter, 40)}


def test_who_removes_the_line_has_the_case_back(tmp_path: Path) -> None:
    with quarantining(tmp_path) as augmenter:
        rows(augmenter, 40)
    file = tmp_path / INCIDENTS_FILE
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if json.loads(line)["kind"] != "quarantine"))
    with SafeAugmenter(Noting(fail, bad=None), None, 2, 2, seed=SEED, folder=str(tmp_path)) as augmenter:
        assert (BAD,) in {keys for _, keys in rows(augmenter, 40)}
        assert augmenter.report().quarantined == ()


def test_a_stalled_storage_under_the_incidents_does_not_stop_the_stream(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A FIFO in the incidents file's place, of which nobody opens the other end: to read it hangs, and to write it."""
    stalled = tmp_path / INCIDENTS_FILE
    os.mkfifo(stalled)
    with quarantining(tmp_path) as augmenter:
        began = time.monotonic()
        batches = rows(augmenter, 60)
        assert time.monotonic() - began < 20, "5 s of it for the question what is quarantined"
        assert "could not be read from" in caplog.text and "no answer within 5 s" in caplog.text
        assert augmenter.report().quarantined == (BAD,)
        assert len(batches) == 60
        closing = time.monotonic()
        augmenter.close()
        assert time.monotonic() - closing < 10
    assert stalled.is_fifo()
    _free(stalled)


def test_an_unreadable_incidents_file_does_not_stop_the_stream(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / INCIDENTS_FILE).mkdir()
    with quarantining(tmp_path) as augmenter:
        assert len(rows(augmenter, 20)) == 20
    assert "could not be read" in caplog.text


def _free(stalled: Path) -> None:
    """Let go of whoever waits for the other end."""
    fd = os.open(stalled, os.O_RDWR | os.O_NONBLOCK)
    stalled.unlink()
    os.close(fd)


# ---- what is written ----

ALWAYS = ("at", "pool", "kind", "stage", "action", "advice", "message", "figures", "disk_free_nbytes")


def complain_and_die() -> None:
    os.write(2, b"free(): corrupted unsorted chunks\n")
    die()


def spin_for_ever() -> None:
    while True:
        pass


@pytest.mark.parametrize(
    ("deed", "kind", "evidence"),
    [
        (complain_and_die, "worker-death", {"signal": "SIGSEGV", "stderr_tail": "corrupted unsorted chunks"}),
        (spin_for_ever, "worker-hang", {"stacks": "in spin_for_ever"}),
        (fail, "worker-error", {"stacks": "in fail\n", "cause": "ValueError: label 7 is unknown"}),
    ],
)
def test_each_line_is_json_with_all_evidence(
    deed: Callable[[], object], kind: str, evidence: dict[str, str], tmp_path: Path
) -> None:
    options = {"hang_timeout_s": 0.5, "hang_timeout_first_s": 2.0}
    with SafeAugmenter(Noting(deed), None, 2, 2, seed=SEED, folder=str(tmp_path), **options) as augmenter:
        rows(augmenter, 40)
        incidents = augmenter.report().incidents
    text = (tmp_path / INCIDENTS_FILE).read_text()
    assert text.endswith("\n")
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["message"] for line in lines] == [incident.message for incident in incidents]
    for line in lines:
        assert all(line[name] is not None for name in ALWAYS), line
        assert line["pool"] == "loader"
        assert line["figures"], "memory, cgroup and descriptors"
    strikes = [line for line in lines if line["kind"] == kind]
    assert len(strikes) >= 2
    for line in strikes:
        assert (line["case"], line["stage"]) == (BAD, "loading")
        assert line["pid"] and line["worker"] is not None and line["ticket"] is not None
        assert line["advice"]
        for name, words in evidence.items():
            assert words in line[name], (name, line[name])
    assert [line["case"] for line in lines if line["kind"] == "quarantine"] == [BAD]
