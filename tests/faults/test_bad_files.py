"""The fault table, part three: damaged files and storage, under real nnU-Net loaders on real preprocessed cases.

    a fault that stays with one case ──► quarantined: from the first ticket on, the stream is that of a loader which
                                         was told before it began to avoid the case
    a fault that goes away            ──► survived: the stream is the undisturbed one, bit for bit
    more than may be quarantined      ──► an error that names the case

The times until the stream goes on are printed (`pytest -s`).
"""

from __future__ import annotations

import functools
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

from safeloader import SafeAugmenter
from safeloader.errors import QuarantineLimitError, RemoteTraceback, WorkerError
from safeloader.faults.incident import Incident
from safeloader.pool import blame
from safeloader.pool.book import INCIDENTS_FILE
from safeloader.report.stats import Report
from safeloader.testing import wait_until
from tests import damage
from tests.damage import Case
from tests.loaders import read_null, read_truncated_mmap, spin_for_ever

pytestmark = pytest.mark.usefixtures("warm_nursery")

BATCHES = 40
SEED = 7
CASES = 8
BAD = "case_003"
"""First drawn for ticket 2."""
GOES_ON_S = 20.0
"""A damaged case may stop the stream for so long, once: eight tries to read it, later and later, take 7 s."""

Batch = tuple[bytes, bytes, tuple[str, ...]]


def fingerprint(batch: dict[str, Any]) -> Batch:
    """Everything in a batch of nnU-Net's, bit for bit."""
    return batch["data"].numpy().tobytes(), batch["target"].numpy().tobytes(), tuple(str(key) for key in batch["keys"])


class Sabotaged(nnUNetDatasetBlosc2):  # type: ignore[misc]  # nnU-Net has no types
    """nnU-Net's dataset, which does `deed` before it opens one of the cases, and `afterwards` once it is open."""

    def __init__(self, folder: Path, deed: Callable[[], object], afterwards: Callable[[], object] = int) -> None:
        super().__init__(str(folder))
        self.deed, self.afterwards = deed, afterwards

    def load_case(self, identifier: str) -> Any:
        if identifier != BAD:
            return super().load_case(identifier)
        self.deed()
        loaded = super().load_case(identifier)
        self.afterwards()
        return loaded


# ---- deeds, done in a worker ----


class NoReduceError(Exception):
    def __reduce__(self) -> Any:
        raise RuntimeError("not me")


def raise_what_cannot_be_pickled() -> None:
    raise NoReduceError("label map is empty")


def raise_50_mb() -> None:
    raise ValueError("begins here " + 50 * 2**20 * "x")


def once(marker: Path, deed: Callable[[], object]) -> None:
    """The first of all workers that comes here does it."""
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return
    deed()


# ---- streams ----


@dataclass
class Run:
    """What a loader has delivered, what it says about that, and the run's folder, if it has one."""

    batches: list[Batch] = field(default_factory=list)
    longest_s: float = 0.0
    report: Report | None = None
    folder: Path = Path()

    def incidents(self, kind: str) -> list[Incident]:
        assert self.report is not None
        return [incident for incident in self.report.incidents if incident.kind == kind]

    @property
    def kinds(self) -> dict[str, int]:
        assert self.report is not None
        return self.report.incident_counts


def take(augmenter: SafeAugmenter, batches: int = BATCHES, run: Run | None = None) -> Run:
    """So many batches; into `run` if there may be fewer."""
    run = run or Run()
    for _ in range(batches):
        asked = time.monotonic()
        run.batches.append(fingerprint(next(augmenter)))
        if len(run.batches) > 1:  # the first one waits for the workers to start
            run.longest_s = max(run.longest_s, time.monotonic() - asked)
    run.report = augmenter.report()
    return run


@contextmanager
def over(cases: Path, *, sabotage: dict[str, Any] | None = None, **options: Any) -> Iterator[SafeAugmenter]:
    loader = damage.tiny_loader(cases, cases=0)
    if sabotage:
        loader._data = Sabotaged(cases, **sabotage)
    with SafeAugmenter(loader, None, 2, 2, seed=SEED, **options) as augmenter:
        yield augmenter


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine") / "preprocessed"
    damage.tiny_loader(folder, cases=CASES)
    return folder


@pytest.fixture
def folder(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "preprocessed"))


@pytest.fixture(scope="module")
def undisturbed(warm_nursery: None, pristine: Path) -> list[Batch]:
    with over(pristine) as augmenter:
        batches = take(augmenter).batches
    assert [BAD in keys for _, _, keys in batches[:4]] == [False, False, True, False]
    return batches


@pytest.fixture(scope="module")
def without_bad(warm_nursery: None, pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Batch]:
    """The stream of a loader that knew of the quarantine before its first batch."""
    earlier = tmp_path_factory.mktemp("run")
    line = {"kind": "quarantine", "pool": "loader", "case": BAD}
    (earlier / INCIDENTS_FILE).write_text(json.dumps(line) + "\n")
    with over(pristine, folder=str(earlier)) as augmenter:
        return take(augmenter).batches


def bad_case(folder: Path) -> Case:
    files = (folder / f"{BAD}.b2nd", folder / f"{BAD}_seg.b2nd", folder / f"{BAD}.pkl")
    return Case(BAD, None, None, *files)  # type: ignore[arg-type]  # nobody asks for its content


# ---- faults that stay ----


def halve(path: Path) -> None:
    damage.truncate(path, path.stat().st_size // 2)


def corrupt_chunks(path: Path) -> None:
    size = path.stat().st_size
    damage.punch_zeros(path, size // 4, size // 2)


@dataclass(frozen=True)
class Fault:
    """A fault of one case.

    Attributes:
        harm: done to the files before the loader starts, or `deed`: done in the worker that opens the case.
        strikes: the incidents that come before the quarantine, of one of these kinds.
        words: a regex for the message of each.
    """

    harm: Callable[[Case], object] = bool
    deed: Callable[[], object] | None = None
    strikes: tuple[str, ...] = ("worker-error",)
    words: str = ""
    options: dict[str, float] = field(default_factory=dict)


DAMAGED = r"(RuntimeError|EOFError|.*UnpicklingError).* a file is truncated, half-written or corrupt; if it stays so, "
READING = ("worker-error", "worker-death")
FAULTS = {
    "a .b2nd of which half is missing": Fault(
        lambda case: halve(case.image), strikes=READING, words=rf"(SIGBUS|{DAMAGED})"
    ),
    "empty labels": Fault(lambda case: damage.truncate(case.labels, 0), strikes=READING, words=rf"(SIGBUS|{DAMAGED})"),
    "a mapped file that shrinks": Fault(
        deed=read_truncated_mmap, strikes=("worker-death",), words="was killed by SIGBUS .*became shorter"
    ),
    "corrupt chunks": Fault(lambda case: corrupt_chunks(case.image), words=DAMAGED),
    "a missing .pkl": Fault(
        lambda case: damage.remove(case.properties), words="FileNotFoundError.* the storage answer"
    ),
    "a half-written .pkl": Fault(lambda case: halve(case.properties), words=DAMAGED),
    "a crash": Fault(deed=read_null, strikes=("worker-death",), words="was killed by SIGSEGV"),
    "a hang": Fault(
        deed=spin_for_ever,
        strikes=("worker-hang",),
        words=r"made no progress for \d\.\d s .*, in spin_for_ever \(loaders\.py:\d+\)\) and was killed",
        options={"hang_timeout_s": 0.5, "hang_timeout_first_s": 2.0},
    ),
    "an exception that can't be pickled": Fault(
        deed=raise_what_cannot_be_pickled, words="NoReduceError: label map is empty while loading"
    ),
    "an exception of 50 MB": Fault(deed=raise_50_mb, words="ValueError: begins here x+ while loading"),
}


def take_with(fault: Fault, folder: Path, run_folder: Path) -> Run:
    """What is delivered, over a folder of cases of which one is harmed."""
    fault.harm(bad_case(folder))
    before = listing(folder)
    sabotage = {"deed": fault.deed} if fault.deed else None
    with over(folder, sabotage=sabotage, folder=str(run_folder), **fault.options) as augmenter:
        run = take(augmenter, run=Run(folder=run_folder))
    assert listing(folder) == before, "nothing is written into the preprocessed folder"
    return run


@pytest.fixture(scope="module")
def runs(warm_nursery: None, pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Future[Run]]:
    """Of each fault: all at once, since they wait for 7 s until they give a case up.

    But for those whose deadline a busy machine could miss: these come alone, afterwards.
    """
    home, alone = tmp_path_factory.mktemp("faults"), {name for name, fault in FAULTS.items() if fault.options}
    for name in FAULTS:
        shutil.copytree(pristine, home / name / "preprocessed")

    def take_one(name: str) -> Run:
        return take_with(FAULTS[name], home / name / "preprocessed", home / name / "run")

    runs: dict[str, Future[Run]] = {}
    for names in (FAULTS.keys() - alone, alone):
        with ThreadPoolExecutor(len(names)) as at_once:
            runs |= {name: at_once.submit(take_one, name) for name in names}
    return runs


@pytest.mark.parametrize("name", FAULTS)
def test_a_case_that_stays_bad_is_no_longer_drawn(
    name: str,
    runs: dict[str, Future[Run]],
    without_bad: list[Batch],
    undisturbed: list[Batch],
) -> None:
    fault, run = FAULTS[name], runs[name].result()
    print(f"\n{name}: goes on after {run.longest_s:.2f} s, {run.kinds}")

    # the stream: none lost, the case never drawn, the others as they were, and the same every time
    assert run.report is not None
    assert (run.report.batches, run.report.next_ticket) == (BATCHES, BATCHES)
    assert not any(BAD in keys for _, _, keys in run.batches)
    assert run.batches == without_bad
    assert all(now == then for now, then in zip(run.batches, undisturbed, strict=True) if BAD not in then[2])
    assert run.longest_s < GOES_ON_S

    # what is said
    assert run.report.quarantined == (BAD,)
    (quarantine,) = run.incidents("quarantine")
    assert quarantine.case == BAD and quarantine.ticket is not None
    assert quarantine.message.startswith(
        f"case {BAD} of pool 'loader' has two strikes while others have none: no longer drawn (quarantined: 1 of "
        f"at most "
        f"1); ticket {quarantine.ticket} is drawn anew. What to do: check this case's preprocessed files, and "
        f"preprocess it again; to have it drawn again, remove this line from {run.folder / INCIDENTS_FILE}. Last: "
    )
    strikes = [incident for incident in run.report.incidents if incident.kind in READING + ("worker-hang",)]
    assert len(strikes) >= 2
    for strike in strikes:
        assert strike.kind in fault.strikes
        assert (strike.case, strike.stage) == (BAD, "loading")
        assert strike.ticket is not None
        assert re.search(fault.words, strike.message), strike.message[:2000]
        assert f"while loading the batch of ticket {strike.ticket} (case {BAD})" in strike.message
        assert len(strike.message) < 3000
    assert set(run.kinds) <= {*fault.strikes, "quarantine", "redraw"}

    # what is written: into the run's folder (and nothing into the preprocessed one, see `take_with`)
    lines = (run.folder / INCIDENTS_FILE).read_text().splitlines()
    assert [json.loads(line)["kind"] for line in lines] == [incident.kind for incident in run.report.incidents]


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir()}


# ---- faults that go away ----


def test_eio_for_a_while_costs_nothing(folder: Path, undisturbed: list[Batch]) -> None:
    restore = damage.replace_by_eio(bad_case(folder).properties)
    with over(folder) as augmenter, ThreadPoolExecutor(1) as storage:
        recovered = storage.submit(_restore_after, restore, augmenter, "worker-error", 2)
        run = take(augmenter)
        recovered.result()
    assert run.batches == undisturbed
    assert run.report is not None and run.report.quarantined == ()
    assert set(run.kinds) == {"worker-error"}
    assert run.longest_s < GOES_ON_S
    for incident in run.incidents("worker-error"):
        assert (incident.case, incident.stage) == (BAD, "loading")
        assert "OSError: [Errno 5] Input/output error" in incident.message
        assert "made again in " in incident.message
        assert "the storage answered with an error; if it goes on, look at the file system" in incident.message


@pytest.mark.parametrize("writer", ["in place", "in one step"])
def test_a_file_that_is_replaced_while_it_is_read(
    writer: str, folder: Path, tmp_path: Path, undisturbed: list[Batch]
) -> None:
    """In place, readers see it shrink for a while; in one step, who has the old one open keeps it."""
    case = bad_case(folder)
    whole = case.image.read_bytes()
    if writer == "in place":
        change: Callable[[], object] = functools.partial(damage.truncate, case.image, len(whole) // 2)
    else:
        change = functools.partial(damage.replace, case.image, whole)
    sabotage = {"deed": int, "afterwards": functools.partial(once, tmp_path / "struck", change)}
    with over(folder, sabotage=sabotage) as augmenter, ThreadPoolExecutor(1) as other:
        if writer == "in place":
            rewrite = functools.partial(damage.rewrite, case.image, whole)
            written = other.submit(_restore_after, rewrite, augmenter, "worker-error worker-death", 1)
        run = take(augmenter)
        if writer == "in place":
            written.result()
    assert (tmp_path / "struck").exists()
    assert run.batches == undisturbed
    assert run.report is not None and run.report.quarantined == ()
    assert set(run.kinds) <= (set(READING) if writer == "in place" else set())
    assert run.longest_s < GOES_ON_S


def _restore_after(restore: Callable[[], object], augmenter: SafeAugmenter, kinds: str, count: int) -> None:
    def happened() -> bool:
        found = augmenter.report().incident_counts
        return sum(found.get(kind, 0) for kind in kinds.split()) >= count

    wait_until(happened, timeout_s=30, what=f"{count} x {kinds}")
    restore()


def test_a_folder_that_is_away_for_a_while_is_an_outage(folder: Path, undisturbed: list[Batch]) -> None:
    def outage(augmenter: SafeAugmenter) -> float:
        wait_until(lambda: augmenter.report().batches >= 10)
        restore = damage.remove(folder)
        went = time.monotonic()
        try:
            wait_until(lambda: augmenter.report().incident_counts.get("outage", 0) > 0, timeout_s=30)
            wait_until(lambda: time.monotonic() - went > 3)  # what storage takes to come back
        finally:
            restore()
        return time.monotonic()

    with over(folder) as augmenter, ThreadPoolExecutor(1) as storage:
        back = storage.submit(outage, augmenter)
        run = take(augmenter)
        back.result()
    print(f"\noutage: goes on after {run.longest_s:.2f} s, {run.kinds}")
    assert run.batches == undisturbed
    assert run.report is not None and run.report.quarantined == ()
    assert set(run.kinds) == {"worker-error", "outage", "outage-over"}
    (began,), (ended,) = run.incidents("outage"), run.incidents("outage-over")
    assert re.fullmatch(
        r"\d cases of pool 'loader' can't be read at the same time \(case_\d+(, case_\d+)*\): that is the storage, not "
        r"the cases\. Waiting and trying again; nothing is quarantined\. What to do: look at the file system that "
        r"holds the preprocessed data \(nnUNet_preprocessed\)\.",
        began.message,
    ), began.message
    assert re.match(r"pool 'loader' can read again, after \d+ s\. Nothing was quarantined for it\.", ended.message)
    assert run.longest_s < GOES_ON_S


# ---- what is not survived ----


def test_a_folder_that_was_never_there_is_an_error_within_5_s(folder: Path) -> None:
    with over(folder) as augmenter:
        shutil.rmtree(folder)
        began = time.monotonic()
        with pytest.raises(WorkerError) as caught:
            next(augmenter)
        took_s = time.monotonic() - began
    print(f"\nmissing folder: raised after {took_s:.2f} s")
    assert took_s < 5
    assert re.match(r"FileNotFoundError: .*, raised in worker loader-\d \(pid \d+\) while loading", str(caught.value))
    assert caught.value.case is not None and caught.value.case.startswith("case_00")
    assert isinstance(caught.value.__cause__, RemoteTraceback)
    assert "in load_case\n" in caught.value.__cause__.text


def test_more_bad_cases_than_may_be_quarantined_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blame, "_BACKOFF_FIRST_S", 0.05)  # how long it takes for one case is tested above
    bad = ["case_004", "case_021", "case_038"]
    folder = tmp_path / "preprocessed"
    loader = damage.tiny_loader(folder, cases=43)
    for case in bad:
        damage.truncate(folder / f"{case}.b2nd", 0)
    run = Run()
    with SafeAugmenter(loader, None, 2, 2, seed=SEED) as augmenter:
        with pytest.raises(QuarantineLimitError) as caught:
            take(augmenter, 500, run)
        report = augmenter.report()
    error = caught.value
    assert sorted([*report.quarantined, str(error.case)]) == bad
    assert len(report.quarantined) == 2
    assert str(error).startswith(f"case {error.case} of pool 'loader' has two strikes, and no more cases may be ")
    assert "Check the preprocessed dataset; `safeloader explain` reads the incidents. Last: worker" in str(error)
    assert not any(set(bad) & set(keys) for _, _, keys in run.batches)
    assert set(report.incident_counts) <= {"worker-error", "worker-death", "quarantine", "redraw"}
    assert run.longest_s < GOES_ON_S
