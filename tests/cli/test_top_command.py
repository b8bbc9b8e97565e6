"""`safeloader top`: what a person and a script see of trainings, and what they are told where there is none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import safeloader
from safeloader.cli import main
from safeloader.cli.top import sight as sights
from safeloader.cli.top.page import page
from safeloader.cli.top.sight import Sight

SLOTS = {"free": 0, "filling": 1, "ready": 5, "leased": 1}


def worker(number: int, **changes: Any) -> dict[str, Any]:
    usual = {
        "worker": number,
        "pid": 4140 + number,
        "incarnation": 0,
        "state": "ready",
        "stage": "loading",
        "ticket": 57,
        "case": "brain_004, brain_002",
        "since_s": 0.25,
        "batches": 28,
        "memory_nbytes": 412 << 20,
    }
    return {**usual, **changes}


def pool(**changes: Any) -> dict[str, Any]:
    usual = {
        "name": "train",
        "batches": 57,
        "wait_s": 3.0,
        "waiting_s": 0.0,
        "waits_for": None,
        "restarts": 1,
        "slots": SLOTS,
        "quarantined": [],
        "workers": [worker(0), worker(1, incarnation=1, stage="idle", ticket=None, case=None)],
        "incidents": [],
    }
    return {**usual, **changes}


def sight(*pools: dict[str, Any], at_s: float = 100.0, trouble: str = "") -> Sight:
    state = {} if trouble else {"at_s": at_s, "pools": list(pools)}
    return Sight("safeloader-4123-0", 4123, "nnUNetv2_train 777 3d_fullres 0", 11_567.0, state, trouble)


def test_a_training() -> None:
    earlier = sight(pool(batches=37, wait_s=2.0), at_s=98.0)
    lines = list(page(sight(pool()), earlier))
    assert lines == [
        "nnUNetv2_train 777 3d_fullres 0   [pid 4123, up 3:12:47]",
        "  train: 10.0 batches/s, waited 50% of the time; 57 batches, waited 3.0 s in all; "
        "ring: 1 filling, 5 ready, 1 leased; 1 restart",
        "    worker      pid state    stage            for   ticket    memory  batches  case",
        "         0     4140 ready    loading        0.2 s       57   412 MiB       28  brain_004, brain_002",
        "       1.1     4141 ready    idle           0.2 s            412 MiB       28",
        "",
    ]


def test_a_training_in_trouble() -> None:
    incident = {"at": "2026-11-25T10:00:00+00:00", "kind": "worker-death", "message": "worker train-1 (pid 9) died."}
    down = worker(1, pid=None, incarnation=2, state="down", memory_nbytes=None)
    waits = "worker train-0 (pid 4140) is loading the batch of ticket 57 (case brain_004) for 75.0 s"
    lines = list(
        page(
            sight(
                pool(
                    waits_for=waits,
                    waiting_s=75.0,
                    workers=[down],
                    incidents=[incident],
                    quarantined=["brain_001"],
                )
            ),
            None,
        )
    )
    assert lines[1].startswith("  train: 57 batches, waited 3.0 s in all; ")  # no rate from one look
    assert lines[2] == f"    training has waited 1:15 for its next batch: {waits}"
    assert lines[3] == "    1 quarantined case: brain_001"
    assert lines[5] == "       1.2        - down"
    assert lines[6].endswith(":00:00 worker train-1 (pid 9) died.")


def test_what_can_not_be_seen() -> None:
    assert list(page(sight(trouble="it does not answer within 2 s"), None))[1] == "  it does not answer within 2 s"
    assert list(page(sight(), None))[1] == "  no pool at the moment"


def test_a_pool_that_began_anew_has_no_rate() -> None:
    now, earlier = sight(pool(batches=3)), sight(pool(batches=900), at_s=99.0)
    assert now.rates(now.pools[0], earlier) is None


@pytest.mark.parametrize(
    ("arguments", "code", "line"),
    [
        (["--every", "0"], 2, "--every 0: between 0.1 and 3600 s"),
        (["--every", "nan"], 2, "--every nan: between 0.1 and 3600 s"),
        (
            ["1"],
            1,
            "no training with SafeLoader has the pid 1. It is seen from the same machine, or the same container, while "
            "its workers are there",
        ),
    ],
)
def test_a_wrong_call_gets_one_line(
    arguments: list[str], code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["top", *arguments]) == code
    assert capsys.readouterr().err == f"safeloader top: {line}\n"


def test_none_runs_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sights, "windows", list)
    assert main(["top", "--once"]) == 1
    assert capsys.readouterr().err.startswith("safeloader top: no training with SafeLoader runs here. ")


TRAINING = """
import sys
from safeloader import SafeAugmenter
from tests.loaders import RandomLoader
with SafeAugmenter(RandomLoader(), None, 2, 1, name="live") as batches:
    next(batches)
    print(flush=True)
    for line in sys.stdin:
        next(batches)
"""


def test_a_training_that_runs(capsys: pytest.CaptureFixture[str]) -> None:
    path = os.pathsep.join([str(Path(safeloader.__file__).parents[1]), str(Path(__file__).parents[2])])
    training = subprocess.Popen(
        [sys.executable, "-c", TRAINING],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert training.stdin is not None and training.stdout is not None
    with training, training.stdin, training.stdout:
        training.stdout.readline()
        assert main(["top", "--once", "--json", str(training.pid)]) == 0
        (seen,) = json.loads(capsys.readouterr().out)
        assert main(["top", "--once", str(training.pid)]) == 0
        shown = capsys.readouterr().out
    assert seen["pid"] == training.pid and seen["command"].startswith("-c") and seen["uptime_s"] > 0
    (live,) = seen["pools"]
    assert (live["name"], live["batches"], live["batches_per_s"], live["waited"]) == ("live", 1, 0.0, 0.0)
    assert len(live["workers"]) == 2
    assert "  live: 0.0 batches/s, waited 0% of the time; 1 batches, " in shown
