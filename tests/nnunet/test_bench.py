"""`safeloader bench` on a real dataset: what it measures, what it says, and what it leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

import safeloader
from safeloader.cli import main
from safeloader.nnunet.bench import one_worker, pools
from safeloader.nnunet.bench.measured import Shares
from safeloader.nnunet.stock import Asked, training_loader
from safeloader.nnunet.workspace import SMALL_CONFIGURATION, Workspace
from safeloader.pool.blur import always_convolve_directly
from safeloader.pool.seeding import seed_everything
from safeloader.ring.digest import checksum
from safeloader.testing import wait_until
from tests.processes import lives


@pytest.fixture
def workspace(make_workspace: Callable[..., Workspace], monkeypatch: pytest.MonkeyPatch) -> Workspace:
    made = make_workspace()
    for name, value in made.environment({"nnUNet_n_proc_DA": "1"}).items():
        if name.startswith("nnUNet_"):
            monkeypatch.setenv(name, value)
    package = str(Path(safeloader.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")])))
    return made


def files(workspace: Workspace) -> list[Path]:
    folders = (workspace.raw, workspace.preprocessed, workspace.results)
    return sorted(path for folder in folders if folder.exists() for path in folder.resolve().rglob("*"))


def test_all_of_it(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    before = files(workspace)
    asked = ["-d", workspace.dataset, "-c", SMALL_CONFIGURATION, "--seconds", "0.5"]
    assert main(["bench", *asked, "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert [line.partition(":")[0] for line in shown.err.splitlines()] == [
        "measuring one worker", "measuring all workers (1)", "measuring the network"
    ]  # fmt: skip
    one = found["one_worker"]
    assert (one["cases"], one["all_cases"]) == (4, 4), "fold 0 validates one of five"
    assert one["batches"] >= 4
    for part in ("loading_first", "loading_later", "transforming"):
        assert one[part]["wall_s"] > 0
    assert found["pools"]["stock_per_s"] > 0 and found["pools"]["stock_failed"] is None
    assert found["pools"]["ours_per_s"] > 0
    assert sum(found["pools"]["shares"].values()) == pytest.approx(1)
    assert found["network"]["per_s"] > 0 and found["network"]["steps"] > 0
    assert found["verdict"]["bounds"] and found["verdict"]["finding"].endswith(".")
    assert files(workspace) == before, "nothing is written into nnU-Net's folders"


def test_what_a_person_reads(workspace: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    # A dataset without splits: nnU-Net's training would write them.
    splits = workspace.preprocessed / workspace.dataset / "splits_final.json"
    content = splits.read_text() if splits.exists() else None  # of a training of another test
    splits.unlink(missing_ok=True)
    try:
        asked = ["-d", workspace.dataset, "-c", SMALL_CONFIGURATION, "-tr", "nnUNetTrainerShortSafeLoader"]
        assert main(["bench", *asked, "--seconds", "0.2", "--no-network", "--workers", "1"]) == 0
        assert not splits.exists()
    finally:
        if content is not None:
            splits.write_text(content)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"-d {workspace.dataset} -c 3d_small -f 0 -p nnUNetPlans -tr nnUNetTrainerShortSafeLoader"
    assert "1 worker, batches/s" in lines
    assert any(line.startswith("  loading, the first time") and line.endswith("4 of 4 cases") for line in lines)
    assert any(" the loading: 1 worker makes " in line for line in lines)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["-d", "999"], "nnU-Net does not find -d 999 -c"),
        (["-c", "4d"], "-c 4d -f 0"),
        (["-tr", "nnUNetTrainerOfMine"], "-tr nnUNetTrainerOfMine"),
        (["--seconds", "0"], "--seconds 0: must be more than 0"),
        (["--seconds", "nan"], "--seconds nan: must be more than 0"),
        (["--workers", "0"], "--workers 0: must be at least 1"),
    ],
)
def test_what_is_not_there_gets_one_line(
    options: list[str], words: str, workspace: Workspace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "-d", workspace.dataset, "-c", SMALL_CONFIGURATION, *options]) == 2
    said = capsys.readouterr().err
    assert said.startswith("safeloader bench: ") and words in said
    assert said.count("\n") == 1, said


@pytest.mark.parametrize(("number", "words"), [("0", "say how many with --workers"), ("two", "is no number")])
def test_a_number_of_workers_that_can_not_be(
    number: str, words: str, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("nnUNet_n_proc_DA", number)
    assert main(["bench", "-d", workspace.dataset, "-c", SMALL_CONFIGURATION]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(("stage", "processes"), [("all workers", 2), ("the network", 1)])
def test_ctrl_c_leaves_nothing_running(stage: str, processes: int, workspace: Workspace) -> None:
    asked = ["-d", workspace.dataset, "-c", SMALL_CONFIGURATION, "--seconds", "1"]
    with subprocess.Popen(
        [sys.executable, "-m", "safeloader", "bench", *asked],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as bench:  # fmt: skip
        assert bench.stderr is not None
        for line in bench.stderr:
            if line.startswith(f"measuring {stage}"):
                break
        process = psutil.Process(bench.pid)
        # The nursery and a worker of either class; or who trains.
        wait_until(lambda: len(process.children(recursive=True)) >= processes, timeout_s=60, what="a worker")
        family = process.children(recursive=True)
        os.killpg(bench.pid, signal.SIGINT)  # as a terminal does: everybody gets it
        said = bench.stderr.read()
    assert bench.returncode == 130
    assert said.splitlines()[-1] == "safeloader bench: interrupted", said
    assert "Traceback" not in said
    wait_until(lambda: not any(map(lives, family)))


def test_measuring_changes_no_batch(workspace: Workspace) -> None:
    """The watched copy draws what the plain loader draws, if it is given the same cases."""

    def loader() -> Any:
        return training_loader(Asked(workspace.dataset, SMALL_CONFIGURATION)).loader

    plain, other = loader(), loader()
    always_convolve_directly(plain, other)  # as the command does
    seen: list[str] = []
    watched = one_worker._Watched(other)
    watched.take_in_turn(other.indices)
    make = watched._loader.generate_train_batch
    watched._loader.generate_train_batch = lambda: seen.append(checksum(batch := make())) or batch
    for seed in range(3):
        watched.make(seed, one_worker._Clocks())
    plain.get_indices = one_worker._InTurn(plain.indices, plain.batch_size)
    expected = []
    for seed in range(3):
        seed_everything(one_worker._SEED, 0, seed)
        expected.append(checksum(next(plain)))
    assert seen == expected
    assert watched.transforming.wall_s > 0


class Dead:
    """A loader whose worker ends at once."""

    def set_thread_id(self, thread_id: int) -> None:
        os._exit(3)


def test_a_stock_class_without_batches_is_no_end(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(pools._StockFailedError, match="a worker has died"), pools._stock(Dead(), 1, 1) as take:
        take()


def test_shares() -> None:
    seen = Counter(computing=6, storage=3, handing_over=1)
    assert pools.shares_of(seen) == Shares(computing=0.6, storage=0.3, handing_over=0.1)
    assert pools.shares_of(Counter()) == Shares(computing=1.0, storage=0.0, handing_over=0.0)
