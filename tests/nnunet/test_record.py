"""What a training says about its loaders, on recorded reports."""

from __future__ import annotations

import io
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from safeloader import Incident, Report
from safeloader.faults.explain.incident_files import is_incidents, summarize
from safeloader.nnunet.record import About, TrainingRecord, report_path

QUIET = Report(
    name="train",
    batches=10,
    next_ticket=10,
    restarts=0,
    incidents=(),
    incident_counts={},
    quarantined=(),
    wait_s=1.25,
    uptime_s=20.0,
    seed=7,
    stream=0,
    workers=2,
    resting=0,
    start_method="clean",
    slots=None,
)
ABOUT = About(trainer="nnUNetTrainerSafeLoader", rank=0, first_epoch=0, workers="the machine has 2 CPUs")


def death(pool: str, signal: str | None = "SIGKILL", exit_code: int | None = None) -> Incident:
    return Incident(
        at="2026-01-01T00:00:00+00:00",
        pool=pool,
        kind="worker-death",
        worker=0,
        pid=1,
        incarnation=0,
        signal=signal,
        exit_code=exit_code,
        stage="loading",
        action="replaced",
        message="a worker died",
    )


class Loader:
    """Stands for a SafeAugmenter."""

    def __init__(self, report: Report) -> None:
        self.now = report

    def report(self) -> Report:
        return self.now

    def happen(self, *incidents: Incident, kept: int = 1000) -> None:
        """Let incidents happen; the report keeps the latest `kept`."""
        counts = {"worker-death": self.now.incident_counts.get("worker-death", 0) + len(incidents)}
        latest = (*self.now.incidents, *incidents)[-kept:]
        restarts = self.now.restarts + len(incidents)
        self.now = replace(self.now, incidents=latest, incident_counts=counts, restarts=restarts)

    def close(self) -> None: ...


@pytest.fixture
def train() -> Loader:
    return Loader(QUIET)


@pytest.fixture
def val() -> Loader:
    return Loader(replace(QUIET, name="val", stream=1))


def record_of(folder: Path, about: About = ABOUT, **loaders: Loader) -> TrainingRecord:
    return TrainingRecord(loaders, report_path(folder, about.rank), about)  # type: ignore[arg-type]


def written(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "safeloader_report.json").read_text())


def test_news_is_one_line_and_only_when_something_happened(train: Loader, val: Loader, tmp_path: Path) -> None:
    record = record_of(tmp_path, train=train, val=val)
    assert record.news() is None
    train.happen(death("train"), death("train"), death("train", "SIGBUS"))
    val.happen(death("val", None, 3))
    assert record.news() == (
        "SafeLoader: 4 incidents (train: 2 × SIGKILL, 1 × SIGBUS; val: 1 × exit code 3), "
        "unfinished batches made again. Details: safeloader_incidents.jsonl"
    )
    assert record.news() is None
    train.happen(death("train"))
    assert "1 incident (train: 1 × SIGKILL)" in str(record.news())


def test_quarantined_cases_are_in_every_line_and_in_the_summary(train: Loader, tmp_path: Path) -> None:
    record = record_of(tmp_path, train=train)
    train.now = replace(train.now, quarantined=("brain_3", "brain_5"))
    for _ in range(2):
        assert record.news() == (
            "SafeLoader: 2 quarantined cases (train: brain_3, train: brain_5). Details: safeloader_incidents.jsonl"
        )
    train.happen(death("train"))
    assert str(record.news()).endswith(
        "unfinished batches made again; 2 quarantined cases (train: brain_3, train: brain_5). Details: "
        "safeloader_incidents.jsonl"
    )
    assert "SafeLoader: train: trained without 2 quarantined cases: brain_3, brain_5" in record.summary()


def test_news_counts_on_when_the_report_forgets_old_incidents(train: Loader, tmp_path: Path) -> None:
    record = record_of(tmp_path, train=train)
    train.happen(*[death("train")] * 5, kept=3)
    assert "3 × SIGKILL" in str(record.news())
    train.happen(death("train", "SIGSEGV"), kept=3)
    assert "1 incident (train: 1 × SIGSEGV)" in str(record.news())
    assert record.news() is None


def test_the_summary_has_a_line_per_loader(train: Loader, val: Loader, tmp_path: Path) -> None:
    train.happen(death("train"), death("train", "SIGBUS"))
    assert record_of(tmp_path, train=train, val=val).summary() == [
        "SafeLoader: train: 10 batches, 2 workers replaced (1 × SIGKILL, 1 × SIGBUS), waited 1.2 s for batches, seed 7",
        "SafeLoader: val: 10 batches, 0 workers replaced, waited 1.2 s for batches, seed 7",
        f"SafeLoader: the report is {tmp_path / 'safeloader_report.json'}",
    ]


def test_the_file_has_every_incident(train: Loader, tmp_path: Path) -> None:
    record = record_of(tmp_path, train=train)
    train.happen(replace(death("train", "SIGSEGV"), stacks="Thread 0x1"))
    record.write("running")
    state = written(tmp_path)
    assert "stacks" not in state["loaders"]["train"]["incidents"][0], "those are in the file of incidents"
    assert (state["outcome"], state["trainer"], state["rank"]) == ("running", "nnUNetTrainerSafeLoader", 0)
    assert state["loaders"]["train"]["incidents"][0]["signal"] == "SIGSEGV"


def test_notes_are_in_the_file_at_once_and_change_no_outcome(train: Loader, tmp_path: Path) -> None:
    record = record_of(tmp_path, train=train)
    record.note("compile-failed", "torch.compile failed", epoch=3)
    assert written(tmp_path)["outcome"] == "running"
    record.write("finished")
    record.note("export", "a case was exported again")
    state = written(tmp_path)
    assert state["outcome"] == "finished"
    assert [(note["kind"], note["text"], note["epoch"]) for note in state["notes"]] == [
        ("compile-failed", "torch.compile failed", 3),
        ("export", "a case was exported again", None),
    ]
    summary = summarize(io.BytesIO((tmp_path / "safeloader_report.json").read_bytes()), b'{"loaders": {}}')
    assert summary.outcome == "finished"
    assert is_incidents((tmp_path / "safeloader_report.json").read_bytes())


def test_each_rank_has_a_file_of_its_own(tmp_path: Path) -> None:
    assert report_path(tmp_path, 0).name == "safeloader_report.json"
    assert report_path(tmp_path, 3).name == "safeloader_report_rank3.json"


def test_a_continued_training_keeps_the_runs_before_it(train: Loader, tmp_path: Path) -> None:
    record_of(tmp_path, train=train).write("KeyboardInterrupt")
    record_of(tmp_path, replace(ABOUT, first_epoch=4), train=train).write("OSError: disk")
    record_of(tmp_path, replace(ABOUT, first_epoch=9), train=train).write("finished")
    assert [run["outcome"] for run in written(tmp_path)["earlier_runs"]] == ["KeyboardInterrupt", "OSError: disk"]
    record_of(tmp_path, train=train).write("finished")
    assert written(tmp_path)["earlier_runs"] == []


@pytest.mark.parametrize("damaged", ["", "[]", '{"half": '])
def test_a_damaged_earlier_report_is_no_obstacle(damaged: str, train: Loader, tmp_path: Path) -> None:
    (tmp_path / "safeloader_report.json").write_text(damaged)
    record_of(tmp_path, replace(ABOUT, first_epoch=4), train=train).write("finished")
    assert written(tmp_path)["earlier_runs"] == []


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    train: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = record_of(tmp_path, train=train)
    record.write("running")

    def full(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        record.write("finished")
    assert written(tmp_path)["outcome"] == "running"
    assert [path.name for path in tmp_path.iterdir()] == ["safeloader_report.json"]
